"""A small client of the management API, for the commands.

Synchronous, on the standard library: a command makes a request or two, and starts quickly. It follows no redirects
(the API key is for the host that the person named) and uses HTTPS_PROXY/NO_PROXY, but never for loopback.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import ssl
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from email.message import Message
from pathlib import Path
from typing import IO, Any

from guestpass import __version__
from guestpass.cli.parser import Parser, read_secret
from guestpass.errors import EdgeUnreachable, GuestpassError, Unauthorized, UsageError
from guestpass.hosts import is_loopback

# A deletion waits for every worker to have ended its streams; everything else answers in milliseconds.
TIMEOUT = 30.0

# Creations that the edge answers alike when the same Idempotency-Key comes twice: a connection that broke before the
# answer is tried once more.
IDEMPOTENT = frozenset(("/shares",))

# An answer of the API is a page of shares at most; more is not our edge.
MAX_ANSWER = 16 << 20


def management_options() -> Parser:
    """How to reach and convince the edge."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("management")
    group.add_argument("--edge", metavar="URL", help="the edge's public URL (or GUESTPASS_EDGE)")
    group.add_argument(
        "--api-key-file", metavar="FILE", help="file with the edge's API key, - for standard input"
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help="the key itself; better use GUESTPASS_API_KEY or --api-key-file, arguments are visible in ps",
    )
    group.add_argument("--ca", metavar="FILE", help="trust only this CA for the edge (or GUESTPASS_CA)")
    return parser


def connect(args: argparse.Namespace) -> Client:
    """The client that the options and the environment describe. Raises UsageError."""
    return Client(edge_url(args.edge), api_key(args), ca=ca_file(args.ca))


def edge_url(given: str | None) -> str:
    """Raises UsageError."""
    url = given or os.environ.get("GUESTPASS_EDGE", "")
    if not url:
        raise UsageError("which edge?", hint="Give --edge URL, or set GUESTPASS_EDGE.")
    try:
        parts = urllib.parse.urlsplit(url)
        wrong = parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/")
        _ = parts.port
    except ValueError:
        wrong = True
    if wrong:
        raise UsageError(f"--edge {url!r} is not of the form https://HOST[:PORT]")
    return url.rstrip("/")


def ca_file(given: str | None) -> Path | None:
    path = given or os.environ.get("GUESTPASS_CA", "")
    return Path(path) if path else None


def api_key(args: argparse.Namespace) -> str:
    """Raises UsageError."""
    if args.api_key_file:
        return read_secret(args.api_key_file, "API key")
    key = args.api_key or os.environ.get("GUESTPASS_API_KEY", "").strip()
    if not key:
        raise UsageError(
            "no API key",
            hint="Set GUESTPASS_API_KEY or give --api-key-file; the edge keeps its key in api.key beside its database.",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError("the API key has characters that no API key has", hint="Copy it from api.key again.")
    return str(key)


def tls_context(ca: Path | None) -> ssl.SSLContext:
    """Trusts `ca` only, or else what the system trusts. Raises UsageError."""
    try:
        return ssl.create_default_context(cafile=str(ca) if ca else None)
    except (OSError, ssl.SSLError) as exc:
        reason = (
            exc.strerror
            if isinstance(exc, FileNotFoundError | PermissionError)
            else "it is not a PEM certificate"
        )
        raise UsageError(f"cannot use the CA file {ca}: {reason}") from exc


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


class Client:
    """One edge. Every method raises GuestpassError with the edge's own code and words where it gave some."""

    def __init__(self, edge: str, key: str, *, ca: Path | None = None, timeout: float = TIMEOUT) -> None:
        self.edge = edge
        self._key = key
        self._timeout = timeout
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        parts = urllib.parse.urlsplit(edge)
        if parts.scheme == "https":
            handlers.append(urllib.request.HTTPSHandler(context=tls_context(ca)))
        if is_loopback(parts.hostname or ""):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def get(self, path: str, **query: str | None) -> dict[str, Any]:
        given = {key: value for key, value in query.items() if value is not None}
        return self._request("GET", path + ("?" + urllib.parse.urlencode(given) if given else ""))

    def pages(self, path: str, items: str, **query: str | None) -> Iterator[dict[str, Any]]:
        """Every item of a listing, page by page."""
        cursor: str | None = None
        while True:
            page = self.get(path, cursor=cursor, **query)
            yield from page[items]
            cursor = page.get("next")
            if not cursor:
                return

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What cannot be repeated safely is sent once: a second try would mail, or make, the same thing twice."""
        key = {"Idempotency-Key": uuid.uuid4().hex} if path in IDEMPOTENT else {}
        return self._request("POST", path, body, key)

    def patch(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._request("PATCH", path, body)

    def delete(self, path: str) -> dict[str, Any]:
        return self._request("DELETE", path)

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.edge}/api/v1{path}", method=method)
        request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        request.add_header("Accept", "application/json, application/problem+json")
        request.add_header("User-Agent", f"guestpass/{__version__}")
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        for last in (False, True) if method != "POST" or headers else (True,):
            try:
                with self._opener.open(request, timeout=self._timeout) as answer:
                    return self._parse(answer.read(MAX_ANSWER), answer.status)
            except urllib.error.HTTPError as exc:
                with exc:
                    raise self._refusal(exc) from exc
            except urllib.error.URLError as exc:
                raise unreachable(self.edge, exc.reason) from exc
            except (ConnectionError, http.client.RemoteDisconnected) as exc:
                if last:
                    raise unreachable(self.edge, exc) from exc
            except (OSError, http.client.HTTPException) as exc:
                raise unreachable(self.edge, exc) from exc
        raise AssertionError("unreachable")

    def _parse(self, data: bytes, status: int) -> dict[str, Any]:
        try:
            value = json.loads(data) if data else {}
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._not_an_edge(status)
        return value

    def _refusal(self, exc: urllib.error.HTTPError) -> GuestpassError:
        """The edge's problem details (RFC 9457) as an error."""
        if 300 <= exc.code < 400:
            target = urllib.parse.urlsplit(exc.headers.get("Location", ""))
            to = f" to {target.scheme}://{target.netloc}" if target.netloc else ""
            return EdgeUnreachable(
                f"{self.edge} redirects{to}", hint="Give the edge's own public URL with --edge."
            )
        try:
            problem = json.loads(exc.read(MAX_ANSWER))
        except (ValueError, OSError, http.client.HTTPException):
            problem = None
        if not isinstance(problem, dict) or not isinstance(problem.get("code"), str):
            return self._not_an_edge(exc.code)
        message = str(problem.get("detail") or problem.get("title") or f"the edge answered {exc.code}")
        hint = str(problem.get("hint") or "")
        if exc.code == 401:
            hint = hint or "Check GUESTPASS_API_KEY; the edge keeps its key in api.key beside its database."
            return Unauthorized(message, hint=hint, code=problem["code"])
        return GuestpassError(message, hint=hint, code=problem["code"])

    def _not_an_edge(self, status: int) -> EdgeUnreachable:
        return EdgeUnreachable(
            f"{self.edge} answers, but not like the management API of an edge (status {status})",
            hint="Check --edge: it is the edge's public_url, without a path.",
        )


def unreachable(edge: str, reason: object) -> EdgeUnreachable:
    """What went wrong on the way to the edge, and what to look at."""
    parts = urllib.parse.urlsplit(edge)
    where = parts.hostname or edge
    if isinstance(reason, ssl.SSLCertVerificationError):
        return EdgeUnreachable(
            f"the certificate of {where} is not accepted: {_verdict(reason)}", hint=_advice(reason)
        )
    if isinstance(reason, ssl.SSLError):
        if reason.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            return EdgeUnreachable(f"{edge} does not speak TLS", hint="Is it http:// there?")
        return EdgeUnreachable(f"TLS with {where} failed: {reason.reason or reason}")
    if isinstance(reason, socket.gaierror):
        return EdgeUnreachable(
            f"the name {where} is not known", hint="Check the URL, and this machine's DNS."
        )
    if isinstance(reason, ConnectionRefusedError):
        return EdgeUnreachable(f"nothing listens at {edge}", hint="Is the edge running? Is the port right?")
    if isinstance(reason, TimeoutError):
        return EdgeUnreachable(
            f"{edge} did not answer in time", hint="Is a firewall or an HTTP proxy in between?"
        )
    if isinstance(reason, ConnectionError | http.client.RemoteDisconnected | http.client.BadStatusLine):
        return EdgeUnreachable(
            f"{edge} closed the connection without an answer", hint="Is it https:// there? Is the edge well?"
        )
    text = getattr(reason, "strerror", None) or str(reason)
    return EdgeUnreachable(f"cannot reach {edge}: {text}")


def _verdict(exc: ssl.SSLCertVerificationError) -> str:
    return exc.verify_message.rstrip(".")


def _advice(exc: ssl.SSLCertVerificationError) -> str:
    """By OpenSSL's verification codes (x509_vfy.h)."""
    if exc.verify_code in (9, 10):  # not yet valid, expired
        return "Check this machine's clock, then the certificate's dates."
    if exc.verify_code in (62, 64):  # host name or address mismatch
        return "Use the name that stands in the certificate."
    return "Give the CA that signed it with --ca, or GUESTPASS_CA."
