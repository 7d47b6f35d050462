"""Frame codec of the tunnel. Wire format: guestpass/mux/SPEC.md, section 2."""

from enum import IntEnum, IntFlag

class FrameType(IntEnum):
    DATA = 0
    OPEN = 1
    HEAD = 2
    TRAILERS = 3
    CREDIT = 4
    RESET = 5
    RESET_ACK = 6
    PING = 7
    PONG = 8
    GOAWAY = 9
    HELLO = 10
    AUTH = 11
    INFO = 12

class Flag(IntFlag):
    FIN = 1
    INTERIM = 2

def encode_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes: ...
def decode_header(data: bytes | bytearray | memoryview) -> tuple[int, int, int, int]: ...
def split_frames(data: bytes) -> tuple[list[tuple[int, int, int, bytes]], bytes]: ...
