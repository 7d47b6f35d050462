"""Header fields on their way through the edge, in both directions. No I/O.

Towards the application (`request_head`): framing and hop-by-hop fields are dropped *first*, by what Connection names
and by name; then every alias of a reserved name; then our cookies and bearer token; then what the edge vouches for is
injected. Towards the visitor (`ResponseHead`): what a gateway sends is parsed strictly and trusted for nothing; the
edge frames the body itself.

Sources: RFC 9110 §7.6 (hop-by-hop, Via), RFC 9112 §6 (framing), RFC 7239 (Forwarded).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

RawHeaders = Sequence[tuple[bytes, bytes]]

SESSION_COOKIE = b"__Host-guestpass"
# Cookies of these prefixes are ours on every origin: they never reach an application, and none may set them.
OUR_COOKIE_PREFIXES = (b"__host-guestpass", b"__host-gp-")

HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization")
    + (b"proxy-authentication-info", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)  # fmt: skip

# Names that only the edge may say to an application, compared with every non-alphanumeric folded to "-". They tell who
# somebody is or where they come from, as other proxies put it (CGI, Grafana, oauth2-proxy, Envoy and the large clouds):
# behind the gateway an application may believe them. The names of the fifth line and the last prefixes make frameworks
# see another URL, host or method than the one that was checked; "proxy" becomes HTTP_PROXY to CGI programs.
RESERVED = frozenset(
    (b"forwarded", b"forwarded-for", b"x-forwarded", b"x-real-ip", b"x-client-ip", b"client-ip", b"true-client-ip")
    + (b"x-cluster-client-ip", b"cf-connecting-ip", b"cf-connecting-ipv6", b"fastly-client-ip", b"fly-client-ip")
    + (b"x-proxyuser-ip", b"front-end-https", b"x-url-scheme", b"x-scheme", b"proxy", b"x-client-cert")
    + (b"remote-user", b"x-remote-user", b"x-authenticated-user", b"x-authenticated-email", b"x-auth-user")
    + (b"x-http-method-override", b"x-http-method", b"x-method-override", b"x-host", b"x-http-host-override")
    + (b"x-script-name",)
)  # fmt: skip
RESERVED_PREFIXES = (
    (b"x-guestpass-", b"x-forwarded-", b"x-auth-request-", b"x-webauth-", b"x-remote-", b"x-ssl-")
    + (b"cf-access-", b"x-goog-authenticated-user-", b"x-goog-iap-", b"x-amzn-oidc-", b"x-ms-client-principal")
    + (b"x-original-", b"x-rewrite-", b"x-envoy-")
)  # fmt: skip
OUR_RESPONSE_PREFIX = b"x-guestpass-"

# What an application may not say to the browser on a share's origin: these speak for the domain or outlive the share.
DROPPED_FROM_RESPONSES = frozenset(
    (b"alt-svc", b"nel", b"report-to", b"reporting-endpoints", b"strict-transport-security", b"service-worker-allowed")
    + (b"public-key-pins", b"expect-ct", b"clear-site-data")
)  # fmt: skip

TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
FIELD_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
TARGET = re.compile(rb"/[\x21-\x22\x24-\x7e]*")  # visible ASCII without "#"
STATUS_LINE = re.compile(rb"HTTP/1\.1 ([1-5][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?")
CONTENT_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")
# A registered name with labels of letters, digits and hyphens, or an IPv6 literal; an optional port.
HOST = re.compile(rb"(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?", re.IGNORECASE)
NON_ALNUM = re.compile(rb"[^a-z0-9]")

# Limits of the frame (SPEC.md): a head of more would not fit the tunnel.
MAX_HEAD = 32 * 1024
MAX_FIELDS = 128
# Of them what the edge adds: nine fields of its own, two for an upgrade, and those of filters.
ADDED_FIELDS = 16

NO_BODY_STATUS = frozenset((204, 304))
SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))
IDEMPOTENT_METHODS = SAFE_METHODS | {"PUT", "DELETE"}


class BadRequest(Exception):
    """The visitor's request is malformed or ambiguous. `status` is what to answer; the connection is closed."""

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


class BadResponse(Exception):
    """A gateway sent a response head that the edge will not pass on: 502."""


def fold(name: bytes) -> bytes:
    """Lower case with every non-alphanumeric as "-": how CGI-like servers make names collide."""
    return NON_ALNUM.sub(b"-", name.lower())


def is_reserved(name: bytes) -> bool:
    folded = fold(name)
    return folded in RESERVED or folded.startswith(RESERVED_PREFIXES)


def values(headers: RawHeaders, name: bytes) -> list[bytes]:
    """All values of the field with exactly this name in any case."""
    return [v for k, v in headers if k.lower() == name]


def nominated(headers: RawHeaders) -> frozenset[bytes]:
    """What Connection names, lower case."""
    return frozenset(
        option.strip(b" \t").lower()
        for value in values(headers, b"connection")
        for option in value.split(b",")
    )


def check_request(method: str, target: bytes, headers: RawHeaders, *, http11: bool) -> None:
    """Refuse what parsers disagree on, whatever aiohttp made of it. Raises BadRequest."""
    if method in ("CONNECT", "TRACE"):
        raise BadRequest(f"{method} is not proxied", 405)
    if target != b"*" and not TARGET.fullmatch(target):
        raise BadRequest("the request target is not an absolute path")
    if target == b"*" and method != "OPTIONS":
        raise BadRequest("the request target * belongs to OPTIONS")
    if (
        len(headers) > MAX_FIELDS - ADDED_FIELDS
        or sum(len(k) + len(v) + 4 for k, v in headers) > MAX_HEAD - 2048
    ):
        raise BadRequest("the header is too large", 431)
    hosts = values(headers, b"host")
    if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
        raise BadRequest("Host is missing, repeated or malformed")
    for name, value in headers:
        if not TOKEN.fullmatch(name) or not FIELD_VALUE.fullmatch(value):
            raise BadRequest("a header field is malformed")
    lengths = values(headers, b"content-length")
    codings = values(headers, b"transfer-encoding")
    if len(lengths) > 1 or (lengths and not CONTENT_LENGTH.fullmatch(lengths[0])):
        raise BadRequest("Content-Length is repeated or malformed")
    if codings and (
        len(codings) > 1 or codings[0].strip(b" \t").lower() != b"chunked" or lengths or not http11
    ):
        raise BadRequest("Transfer-Encoding is other than chunked, or beside Content-Length")
    if len(values(headers, b"expect")) > 1:
        raise BadRequest("Expect is repeated")


# ── cookies ───────────────────────────────────────────────────────────────────────────────────────────────────────


def cookie(headers: RawHeaders, name: bytes) -> str | None:
    """The value of the cookie of exactly this name, read from the raw field; None when absent *or repeated* (a
    sibling origin may have tossed a second one)."""
    found: list[bytes] = []
    for value in values(headers, b"cookie"):
        for pair in value.split(b";"):
            key, separator, content = pair.strip(b" \t").partition(b"=")
            if separator and key == name:
                found.append(content)
    return found[0].decode("ascii", "replace") if len(found) == 1 else None


def strip_our_cookies(value: bytes) -> bytes:
    """A Cookie field without the cookies that are ours."""
    kept = [
        pair.strip(b" \t")
        for pair in value.split(b";")
        if pair.strip(b" \t") and not pair.strip(b" \t").lower().startswith(OUR_COOKIE_PREFIXES)
    ]
    return b"; ".join(kept)


def bearer(headers: RawHeaders, prefix: str) -> str | None:
    """A bearer token that begins with `prefix`; None when there is none or more than one Authorization."""
    found = values(headers, b"authorization")
    if len(found) != 1:
        return None
    scheme, credentials = split_credentials(found[0])
    token = credentials.decode("ascii", "replace")
    return token if scheme == b"bearer" and token.startswith(prefix) else None


def split_credentials(value: bytes) -> tuple[bytes, bytes]:
    """(scheme in lower case, credentials) of an Authorization field, however many blanks are between them."""
    scheme, credentials = (*value.split(maxsplit=1), b"", b"")[:2]
    return scheme.lower(), credentials.strip(b" \t")


def is_our_token(authorization: bytes, prefix: bytes) -> bool:
    """Whether an Authorization field carries a bearer token that begins with `prefix`, in any spelling."""
    scheme, credentials = split_credentials(authorization)
    return scheme == b"bearer" and credentials.lower().startswith(prefix)


def for_plugins(headers: RawHeaders, bearer_prefix: bytes | None = None) -> list[tuple[str, str]]:
    """The fields as text, without what lets somebody in: our cookies, and, where a prefix is given, our tokens. A
    plugin that decides on a request does not need them, and one that is hostile would be whoever sent it."""
    found = []
    for name, value in headers:
        lower = name.lower()
        if lower == b"cookie":
            value = strip_our_cookies(value)
            if not value:
                continue
        elif lower == b"authorization" and bearer_prefix and is_our_token(value, bearer_prefix):
            continue
        found.append((name.decode("latin-1"), value.decode("latin-1")))
    return found


# ── towards the application ───────────────────────────────────────────────────────────────────────────────────────


def request_head(
    method: str,
    target: bytes,
    headers: RawHeaders,
    *,
    inject: bytes,
    bearer_prefix: bytes,
    upgrade: bool,
) -> bytes:
    """The head that goes into OPEN: HTTP/1.1, no framing but a known Content-Length, `inject` (complete lines) last.

    `upgrade` keeps the visitor's `Upgrade: websocket`. Raises BadRequest (431) when it does not fit.
    """
    drop = nominated(headers) | HOP_BY_HOP
    out = [method.encode("ascii"), b" ", target, b" HTTP/1.1\r\n"]
    for name, value in headers:
        lower = name.lower()
        if lower in drop or lower == b"expect" or is_reserved(lower):
            continue
        if lower == b"cookie":
            value = strip_our_cookies(value)
            if not value:
                continue
        elif lower == b"authorization" and is_our_token(value, bearer_prefix):
            continue
        out += (name, b": ", value, b"\r\n")
    if upgrade:
        out.append(b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
    out += (inject, b"\r\n")
    head = b"".join(out)
    if len(head) > MAX_HEAD:
        raise BadRequest("the header is too large", 431)
    return head


def one_hop_fewer(method: str, headers: RawHeaders) -> RawHeaders | None:
    """The fields with Max-Forwards counted down, which is for OPTIONS (and TRACE, which is not proxied); None when it
    was 0 and whoever has the request is to answer it (RFC 9110 §7.6.2). What is no number counts nothing."""
    found = values(headers, b"max-forwards") if method == "OPTIONS" else []
    if len(found) != 1 or not CONTENT_LENGTH.fullmatch(found[0]):
        return headers
    left = int(found[0]) - 1
    if left < 0:
        return None
    return [(k, b"%d" % left if k.lower() == b"max-forwards" else v) for k, v in headers]


def forwarded_fields(client: str, scheme: str, host: bytes) -> bytes:
    """X-Forwarded-*, Forwarded and Via as complete lines. The edge is the first proxy that counts: what came in under
    these names was either from a trusted proxy (then `client` already is what it said) or dropped."""
    address = client.encode("ascii")
    quoted = b'"[' + address + b']"' if b":" in address else address
    lines = (
        (b"X-Forwarded-For: ", address),
        (b"X-Forwarded-Proto: ", scheme.encode("ascii")),
        (b"X-Forwarded-Host: ", host),
        (b"Forwarded: for=", quoted + b";proto=" + scheme.encode("ascii") + b';host="' + host + b'"'),
        (b"Via: ", b"1.1 guestpass"),
    )
    return b"".join(name + value + b"\r\n" for name, value in lines)


def client_address(
    peer: str, headers: RawHeaders, trusted: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]
) -> str:
    """Who the visitor is: the peer, or, as long as hops are trusted, what X-Forwarded-For says, from the right."""
    networks = tuple(trusted)
    address = peer
    if not networks:
        return address
    hops = [
        h.strip()
        for v in values(headers, b"x-forwarded-for")
        for h in v.decode("ascii", "replace").split(",")
    ]
    while hops and within(address, networks):
        try:
            hop = ipaddress.ip_address(hops.pop().strip("[]"))
        except ValueError:
            break
        # A zone may hold any text ("fe80::1%…"), and says nothing outside of the machine that it is of.
        if isinstance(hop, ipaddress.IPv6Address) and hop.scope_id is not None:
            break
        address = str(hop)
    return address


def within(address: str, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    """Whether the address is in one of the networks."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return any(ip.version == network.version and ip in network for network in networks)


# ── towards the visitor ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A response head from a gateway, checked. `fields` are what the visitor gets; framing is not among them."""

    status: int
    reason: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    length: int | None  # Content-Length

    @property
    def interim(self) -> bool:
        return 100 <= self.status < 200 and self.status != 101


def parse_response(data: bytes) -> ResponseHead:
    """Strict: one CRLF per line, no folding, no control characters. Raises BadResponse."""
    if len(data) > MAX_HEAD or not data.endswith(b"\r\n\r\n"):
        raise BadResponse("the response head is too large or not ended")
    lines = data[:-4].split(b"\r\n")
    match = STATUS_LINE.fullmatch(lines[0])
    if match is None:
        raise BadResponse("malformed status line")
    if len(lines) - 1 > MAX_FIELDS:
        raise BadResponse("too many header fields")
    raw: list[tuple[bytes, bytes]] = []
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        value = value.strip(b" \t")
        if not colon or not TOKEN.fullmatch(name) or not FIELD_VALUE.fullmatch(value):
            raise BadResponse("malformed header field")
        raw.append((name, value))
    status = int(match[1])
    lengths = values(raw, b"content-length")
    if len(lengths) > 1 or (lengths and not CONTENT_LENGTH.fullmatch(lengths[0])):
        raise BadResponse("Content-Length is repeated or malformed")
    return ResponseHead(
        status,
        match[2] if match[2] is not None else _reason(status),
        tuple(_visible(raw, status)),
        int(lengths[0]) if lengths else None,
    )


def _reason(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode("ascii")
    except ValueError:
        return b""


def _visible(raw: RawHeaders, status: int) -> Iterable[tuple[bytes, bytes]]:
    drop = nominated(raw) | HOP_BY_HOP | DROPPED_FROM_RESPONSES
    cache: list[bytes] = []
    for name, value in raw:
        lower = name.lower()
        if lower in drop or lower == b"content-length" or fold(lower).startswith(OUR_RESPONSE_PREFIX):
            continue
        if lower == b"set-cookie":
            cookie_value = clean_set_cookie(value)
            if cookie_value is not None:
                yield name, cookie_value
        elif lower == b"cache-control":
            cache.append(value)
        else:
            yield name, value
    if status == 101:
        yield b"Connection", b"Upgrade"
        yield b"Upgrade", b"websocket"
    elif status >= 200:
        yield b"Cache-Control", private_cache_control(b", ".join(cache))


def private_cache_control(value: bytes) -> bytes:
    """The application's Cache-Control with nothing left that lets a shared cache store the response: it was made for
    one person."""
    directives = [d.strip(b" \t") for d in value.split(b",") if d.strip(b" \t")]
    kept = [d for d in directives if d.lower().partition(b"=")[0] not in (b"public", b"s-maxage")]
    if not any(d.lower() in (b"private", b"no-store") for d in kept):
        kept.insert(0, b"private")
    return b", ".join(kept)


def clean_set_cookie(value: bytes) -> bytes | None:
    """A Set-Cookie of an application without Domain, so that it stays on the share's own origin; None for our names."""
    parts = [part.strip(b" \t") for part in value.split(b";")]
    # "=__Host-…" is a cookie without a name that a browser would send back as one of ours.
    if parts[0].lstrip(b"= \t").lower().startswith(OUR_COOKIE_PREFIXES):
        return None
    return b"; ".join(
        p for i, p in enumerate(parts) if i == 0 or p.lower().partition(b"=")[0].strip(b" \t") != b"domain"
    )


def response_head(head: ResponseHead, framing: bytes, *, keep_alive: bool, http11: bool) -> bytes:
    """Status line and fields as bytes. `framing` are complete lines (Content-Length or Transfer-Encoding)."""
    out = [b"HTTP/1.1 %d " % head.status, head.reason, b"\r\n"]
    for name, value in head.fields:
        out += (name, b": ", value, b"\r\n")
    out.append(framing)
    if keep_alive != http11:  # other than the version's default
        out.append(b"Connection: keep-alive\r\n" if keep_alive else b"Connection: close\r\n")
    out.append(b"\r\n")
    return b"".join(out)
