"""Request and response heads at the gateway. No I/O.

A request head comes from the edge, which has validated it; the gateway parses it again as if it came from a stranger,
because its own rules (service, method, path) are only as good as its certainty of what the service will read. What it
sends to the service is built from the parsed parts, never passed through.

With `host_header = "upstream"` the service sees its own name in Host, and in Origin and Referer where those name the
share's origin (Bokeh, JupyterLab and Streamlit refuse WebSockets otherwise). Any other Origin stays: rewriting it would
defeat the application's own cross-site check. The other way round, Location is rewritten back where it names the
service's own origin.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11

Headers = list[tuple[bytes, bytes]]

# SPEC.md, chapter 2.3.
MAX_HEAD = 32 * 1024
MAX_FIELDS = 128

REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]{1,32}) (/[\x21-\x22\x24-\x7e]*|\*) HTTP/1\.1")
FIELD = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*((?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)[ \t]*"
)
CONTENT_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")

# RFC 9110 section 7.6.1, and what frames a message: both are each connection's own.
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    )
)

# RFC 9110 section 9.2.2: may be sent again when nobody knows what became of the first.
IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"))


class BadHead(Exception):
    """A head that is not what SPEC.md says, or a request that no gateway passes on."""


@dataclass(slots=True)
class Request:
    """A parsed request head. `headers` are without hop-by-hop fields; names as they came."""

    method: bytes
    target: bytes
    headers: Headers
    length: int | None
    upgrade: bytes | None
    """Protocol of an upgrade request, e.g. b"websocket"."""

    def get(self, name: bytes) -> bytes | None:
        """The first value of a field; `name` in lower case."""
        return next((value for key, value in self.headers if key.lower() == name), None)


def parse_request(head: bytes) -> Request:
    """Raises BadHead."""
    if len(head) > MAX_HEAD or not head.endswith(b"\r\n\r\n"):
        raise BadHead("the request head is too large or has no end")
    first, *lines = head[:-4].split(b"\r\n")
    line = REQUEST_LINE.fullmatch(first)
    if line is None:
        raise BadHead("the request line is malformed")
    if len(lines) > MAX_FIELDS:
        raise BadHead(f"the request has more than {MAX_FIELDS} fields")
    method = line[1]
    if method in (b"CONNECT", b"TRACE"):
        raise BadHead(f"{method.decode('ascii')} is not passed on")
    headers: Headers = []
    seen: dict[bytes, list[bytes]] = {}
    for text in lines:
        match = FIELD.fullmatch(text)
        if match is None:
            raise BadHead("a request field is malformed")
        lower = match[1].lower()
        if lower in (b"connection", b"upgrade", b"content-length", b"transfer-encoding", b"host"):
            seen.setdefault(lower, []).append(match[2])
        if lower not in HOP_BY_HOP:
            headers.append((match[1], match[2]))
    if b"transfer-encoding" in seen:
        raise BadHead("the edge passed on Transfer-Encoding")
    if len(seen.get(b"host", ())) != 1:
        raise BadHead("Host is missing or repeated")
    connection = _tokens(seen.get(b"connection", ()))
    upgrades = seen.get(b"upgrade", [])
    upgrade = upgrades[0] if len(upgrades) == 1 and b"upgrade" in connection else None
    nominated = connection - {b"upgrade"}
    if nominated:
        headers = [(name, value) for name, value in headers if name.lower() not in nominated]
    length = _length(seen.get(b"content-length", []))
    if upgrade is not None and (length or method != b"GET"):
        raise BadHead("an upgrade is a GET without a body")
    return Request(method, line[2], headers, length, upgrade)


def _tokens(values: Iterable[bytes]) -> set[bytes]:
    return {token.strip(b" \t").lower() for value in values for token in value.split(b",")} - {b""}


def _length(values: list[bytes]) -> int | None:
    if not values:
        return None
    if len(values) > 1 or not CONTENT_LENGTH.fullmatch(values[0]):
        raise BadHead("Content-Length is repeated or malformed")
    return int(values[0])


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Naming:
    """How a service is called to itself: `host` for Host, `origin` for Origin. Both empty: as the visitor calls it."""

    host: bytes
    origin: bytes

    @classmethod
    def of(cls, url: str, host_header: str) -> Naming:
        """For a service's `url` and `host_header` (see gateway.toml)."""
        if host_header == "public":
            return cls(b"", b"")
        parts = urlsplit(url)
        scheme = "http" if parts.scheme == "unix" else parts.scheme
        if host_header != "upstream":
            host = host_header
        elif parts.scheme == "unix":
            host = "localhost"
        else:
            name = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
            default = 443 if scheme == "https" else 80
            host = name if parts.port in (None, default) else f"{name}:{parts.port}"
        return cls(host.encode("ascii"), f"{scheme}://{host}".encode("ascii"))

    def request(self, request: Request) -> tuple[Headers, bytes]:
        """(headers as the service is to see them, the share's public origin or b"")."""
        scheme, host = request.get(b"x-forwarded-proto"), request.get(b"x-forwarded-host")
        public = scheme + b"://" + host if scheme and host else b""
        if not self.host:
            return request.headers, b""
        headers: Headers = []
        for name, value in request.headers:
            lower = name.lower()
            if lower == b"host":
                value = self.host
            elif lower == b"origin" and public:
                value = self.origin if value == public else value
            elif lower == b"referer" and public:
                value = _move(value, public, self.origin)
            headers.append((name, value))
        return headers, public

    def location(self, value: bytes, public: bytes) -> bytes:
        """A redirect's target as the visitor must see it."""
        return _move(value, self.origin, public) if public and self.origin else value


def _move(url: bytes, old: bytes, new: bytes) -> bytes:
    """`url` with its origin changed, if that is `old`."""
    rest = url[len(old) :]
    return new + rest if url.startswith(old) and rest[:1] in (b"", b"/", b"?", b"#") else url


# ── building ─────────────────────────────────────────────────────────────────────────────────────────────────────


def request_bytes(request: Request, headers: Headers, *, chunked: bool) -> bytes:
    """The head for the service."""
    lines = [request.method + b" " + request.target + b" HTTP/1.1"]
    lines += [name + b": " + value for name, value in headers]
    if request.upgrade is not None:
        lines.append(b"Connection: Upgrade")
        lines.append(b"Upgrade: " + request.upgrade)
    elif chunked:
        lines.append(b"Transfer-Encoding: chunked")
    lines.append(b"\r\n")
    return b"\r\n".join(lines)


def response_bytes(
    response: h11.Response | h11.InformationalResponse, naming: Naming, public: bytes
) -> bytes:
    """The head for the edge: hop-by-hop fields removed, order and case of names kept. Raises BadHead."""
    raw = response.headers.raw_items()
    nominated = _tokens(value for name, value in raw if name.lower() == b"connection")
    drop = HOP_BY_HOP | nominated
    lines = [b"HTTP/1.1 %d %s" % (response.status_code, response.reason)]
    for name, value in raw:
        lower = name.lower()
        if lower in drop:
            continue
        if lower in (b"location", b"content-location"):
            value = naming.location(value, public)
        lines.append(name + b": " + value)
    if response.status_code == 101:
        lines.append(b"Connection: Upgrade")
        lines += [b"Upgrade: " + value for name, value in raw if name.lower() == b"upgrade"]
    if len(lines) - 1 > MAX_FIELDS:
        raise BadHead(f"the response has more than {MAX_FIELDS} fields")
    lines.append(b"\r\n")
    head = b"\r\n".join(lines)
    if len(head) > MAX_HEAD:
        raise BadHead("the response head is too large")
    return head


def check_trailers(trailers: bytes) -> bytes:
    """Trailer lines and the empty line, if they are well-formed and none belongs to a head. Raises BadHead."""
    if not trailers.endswith(b"\r\n"):
        raise BadHead("trailers have no end")
    for line in trailers[:-2].split(b"\r\n")[:-1] if len(trailers) > 2 else ():
        match = FIELD.fullmatch(line)
        if match is None or match[1].lower() in HOP_BY_HOP | {b"content-length", b"host"}:
            raise BadHead("a trailer field is malformed")
    return trailers


def trailer_bytes(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Trailer fields of a response for the edge."""
    return (
        b"".join(name + b": " + value + b"\r\n" for name, value in headers if name.lower() not in HOP_BY_HOP)
        + b"\r\n"
    )
