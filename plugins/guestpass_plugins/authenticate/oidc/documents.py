"""What a provider sends, taken in strictly: JSON without surprises, in bounded size and time, from where it was asked.

A document that two parsers could read in two ways is refused: keys that come twice, bytes that are not UTF-8, numbers
that are not JSON. Redirects are not followed: a token endpoint that sends the client's secret elsewhere is none.
"""

from __future__ import annotations

import json
import ssl
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from guestpass.plugin import is_loopback

# A discovery document or a key set is some kilobytes; the largest seen in the wild are below 40 KiB.
MAX_DOCUMENT = 256 << 10
# One answer. The edge's deadline of a sign-in, 15 s, has to hold three: metadata, token, keys.
ANSWER_SECONDS = 4.5
# What of a provider's words is worth a line in the log.
MAX_QUOTED = 200


class ProviderFault(Exception):
    """A provider's answer cannot be used. The text is for the operator's log, never for the visitor."""


class Unreachable(ProviderFault):
    """There was no answer, or one that says that the provider is out of order: what was known before holds on."""


class Misfit(ProviderFault):
    """Its metadata is that of another provider, or one that must not be used: waiting does not help."""


def quoted(value: object) -> str:
    """Foreign text, fit for a line in the log."""
    text = ascii(value)
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "…"


def parse(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises ProviderFault."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ProviderFault(f"{what} has a key twice")
        return found

    def no_constant(name: str) -> Any:
        raise ProviderFault(f"{what} holds {name}, which is not JSON")

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)
    except (ValueError, RecursionError) as exc:
        raise ProviderFault(f"{what} is not JSON: {type(exc).__name__}") from exc
    if not isinstance(found, dict):
        raise ProviderFault(f"{what} is not a JSON object")
    return found


def secure_url(value: object, what: str, *, plain: bool) -> str:
    """An https URL, or, where `plain` says that the provider as a whole is one for tests, http on loopback.
    Raises ProviderFault."""
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or " " in value:
        raise ProviderFault(f"{what} is not a URL: {quoted(value)}")
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError as exc:
        raise ProviderFault(f"{what} is not a URL: {quoted(value)}") from exc
    if not host or parts.username is not None or parts.fragment or "\\" in value:
        raise ProviderFault(f"{what} is not a plain URL: {quoted(value)}")
    if parts.scheme == "https" or (plain and parts.scheme == "http" and is_loopback(host)):
        return value
    raise ProviderFault(f"{what} is not https: {quoted(value)}")


async def fetch(
    http: aiohttp.ClientSession,
    method: str,
    url: str,
    what: str,
    *,
    tls: ssl.SSLContext | None,
    data: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Status and document. Raises Unreachable, ProviderFault."""
    try:
        async with http.request(
            method,
            URL(url, encoded=True),
            data=data,
            headers={"Accept": "application/json", "Accept-Encoding": "identity", **(headers or {})},
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS),
            ssl=tls if tls is not None else True,
        ) as response:
            if 300 <= response.status < 400:
                raise ProviderFault(f"{what} answers with a redirect ({response.status})")
            if response.status >= 500 or response.status == 429:
                raise Unreachable(f"{what} answers {response.status}")
            if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                raise ProviderFault(f"{what} is compressed, which was not asked for")
            body = bytearray()
            async for chunk in response.content.iter_chunked(16 << 10):
                body += chunk
                if len(body) > MAX_DOCUMENT:
                    raise ProviderFault(f"{what} is larger than {MAX_DOCUMENT >> 10} KiB")
            kind = response.content_type
            if kind != "application/json" and not (
                kind.startswith("application/") and kind.endswith("+json")
            ):
                raise ProviderFault(f"{what} answers {response.status} with {quoted(kind)}, not JSON")
            return response.status, parse(bytes(body), what)
    except TimeoutError as exc:
        raise Unreachable(f"{what} gives no whole answer within {ANSWER_SECONDS:g} seconds") from exc
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        raise Unreachable(f"{what} cannot be reached: {type(exc).__name__}: {quoted(str(exc))}") from exc
