"""Strict scanner for HTTP/1.1 (RFC 9112). The C interface is http1.pxd; this one is for tests, tools and code that is
not on the fast path."""

from array import array
from typing import Literal

class BadHttp(ValueError):
    """What the scanner refuses. `code` is the Error of http1.pxd, `status` what to answer to a visitor."""

    code: int
    status: int
    reason: str
    def __init__(self, code: int) -> None: ...

class Request:
    """A request head as Python objects."""

    size: int  # of the head with its empty line
    method: bytes
    target: bytes
    minor: int
    fields: list[tuple[bytes, bytes]]
    flags: list[int]  # FieldFlag of http1.pxd, for each field
    framing: Literal["none", "length", "chunked"]
    content_length: int
    keep_alive: bool
    upgrade: Literal["websocket", "other"] | None
    expect_continue: bool

class Response:
    """A response head as Python objects."""

    size: int
    status: int
    reason: bytes | None
    minor: int
    fields: list[tuple[bytes, bytes]]
    flags: list[int]
    framing: Literal["none", "length", "chunked", "close"]
    content_length: int | None
    keep_alive: bool
    upgrade: Literal["websocket", "other"] | None

# The head at the start of `data`; None when it is not complete. These raise BadHttp.
def parse_request(data: bytes, from_edge: bool = ...) -> Request | None: ...
def parse_response(data: bytes, to_head: bool = ..., from_gateway: bool = ...) -> Response | None: ...

# (result, searched) of one call of scan_request or scan_response, as C code sees them.
def resume(data: bytes | array[int], searched: int, response: bool = ...) -> tuple[int, int]: ...

# headers.request_head and headers.response_head of the edge, on complete heads. These raise BadHttp.
def request_for_gateway(data: bytes, inject: bytes, bearer_prefix: bytes) -> bytes: ...
def response_for_visitor(data: bytes) -> bytes: ...
def cookies_named(data: bytes, name: bytes) -> tuple[int, bytes | None]: ...
def bearer_token(data: bytes, prefix: bytes) -> bytes | None: ...
def reserved(name: bytes, response: bool = ...) -> bool: ...
def field_id(name: bytes) -> int: ...
def repeat(data: bytes, loops: int, response: bool = ..., write: bool = ...) -> None: ...  # for benchmarks

class ChunkedDecoder:
    """A chunked body, fed in pieces of any size."""

    trailers: bytes  # as they came, with the empty line
    ended: bool
    def __init__(self, response: bool = ...) -> None: ...
    def feed(self, data: bytes | array[int]) -> tuple[bytes, int]: ...  # (body, how much of `data` was its). Raises BadHttp
