"""RFC 6455 framing of a tunnel, sans-I/O: binary messages, whose boundaries mean nothing."""

from typing import Final

from guestpass_speedups.session import Session

NORMAL: Final = 1000
GOING_AWAY: Final = 1001
PROTOCOL_ERROR: Final = 1002
UNSUPPORTED_DATA: Final = 1003

class WebSocketError(Exception):
    """The peer broke RFC 6455. `code` is the close code to send."""

    code: int
    reason: str
    def __init__(self, code: int, reason: str) -> None: ...

class WebSocket:
    """One end of a connection after the opening handshake."""

    client: bool
    close_code: int | None  # of the peer's close frame; 1005 if it had none
    close_sent: bool
    def __init__(self, client: bool) -> None: ...
    def feed(self, data: bytes | bytearray | memoryview) -> bytes: ...  # payload bytes. Raises WebSocketError
    def feed_into(self, buffer: memoryview, size: int) -> memoryview: ...
    #   The same for the first `size` bytes of `buffer`, unmasked in place: a view that is valid until the next read.
    def wrap(self, payload: bytes | bytearray | memoryview) -> bytes: ...  # one binary message; one copy
    def wrap_output(self, session: Session, limit: int, now: float) -> bytes: ...
    #   One binary message of what `session.fill(limit, now)` would give, or b""; one copy less than wrap() of that.
    def close(self, code: int = ..., reason: bytes = ...) -> bytes: ...  # a close frame; b"" after the first
    def take_replies(self) -> bytes: ...  # to be written: a pong, the answer to a close frame, or b""
