"""Cases of the WebSocket protocol, in the groups and the numbering of the Autobahn test-suite.

That suite needs Python 2.7, which no current distribution has, so what its groups are about stands here as data: what a
client sends, byte by byte and piece by piece. A case has no expected answer: its verdict is whatever a server says to
it, and a proxy is right when the verdict through it is the verdict without it.

| group | about |
|---|---|
| 1 | text and binary messages of sizes around the length encodings |
| 2 | ping and pong |
| 3 | reserved bits |
| 4 | reserved opcodes |
| 5 | fragmentation |
| 6 | UTF-8 |
| 7 | closing |
| 9 | limits: large messages, small fragments, many messages |
| 10 | automatic fragmentation |
| 12, 13 | compression (RFC 7692), with its parameters |
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA

# Not zero, so that a proxy that forgets to pass the mask on is noticed.
MASK = bytes((0x37, 0xFA, 0x21, 0x3D))


@dataclass(frozen=True, slots=True)
class Case:
    id: str
    about: str
    pieces: tuple[bytes, ...]
    """Each is a write of its own, and arrives as one or more reads."""
    offer: str = ""
    """Sec-WebSocket-Extensions of the handshake."""
    closes: bool = True
    """The client sends a Close when it has the answer to the rest; else the case has one, or ends in a violation."""
    large: bool = False

    @property
    def messages(self) -> int:
        """How many messages the client sends."""
        data, at, found = b"".join(self.pieces), 0, 0
        while at < len(data):
            first, size, head = data[at], data[at + 1] & 0x7F, 6
            if size == 126:
                (size,), head = struct.unpack_from("!H", data, at + 2), 8
            elif size == 127:
                (size,), head = struct.unpack_from("!Q", data, at + 2), 14
            found += bool(first & 0x80) and first & 0x0F < CLOSE
            at += head + size
        return found


def masked(payload: bytes, mask: bytes = MASK) -> bytes:
    if not payload:
        return b""
    stretched = (mask * (len(payload) // 4 + 1))[: len(payload)]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(stretched, "little")).to_bytes(
        len(payload), "little"
    )


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0) -> bytes:
    """One frame of a client (RFC 6455 §5.2)."""
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", first, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, size)
    return head + MASK + masked(payload)


def fragments(opcode: int, payload: bytes, size: int, *, rsv: int = 0) -> list[bytes]:
    parts = [payload[at : at + size] for at in range(0, len(payload), size)] or [b""]
    last = len(parts) - 1
    return [
        frame(opcode if n == 0 else CONTINUATION, part, fin=n == last, rsv=rsv if n == 0 else 0)
        for n, part in enumerate(parts)
    ]


def chopped(data: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(data[at : at + size] for at in range(0, len(data), size))


def close(code: int | None = 1000, reason: bytes = b"") -> bytes:
    return frame(CLOSE, b"" if code is None else struct.pack("!H", code) + reason)


def numbered(group: str, rows: Iterator[tuple[str, tuple[bytes, ...], bool]]) -> Iterator[Case]:
    for number, (about, pieces, closes) in enumerate(rows, 1):
        yield Case(f"{group}.{number}", about, pieces, closes=closes)


def all_cases() -> list[Case]:
    return [
        *numbered("1.1", messages(TEXT, b"*")),
        *numbered("1.2", messages(BINARY, b"\xfe")),
        *numbered("2", pings()),
        *numbered("3", reserved_bits()),
        *numbered("4.1", reserved_opcodes(range(3, 8))),
        *numbered("4.2", reserved_opcodes(range(11, 16))),
        *numbered("5", fragmentation()),
        *numbered("6", utf8()),
        *numbered("7", closing()),
        *large(),
        *numbered("10", automatic_fragmentation()),
        *compression(),
    ]


# ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────

Row = tuple[str, tuple[bytes, ...], bool]


def messages(opcode: int, byte: bytes) -> Iterator[Row]:
    for size in (0, 125, 126, 127, 128, 65535, 65536):
        yield f"{size} bytes", (frame(opcode, byte * size),), True
    yield "65,536 bytes in writes of 997", chopped(frame(opcode, byte * 65536), 997), True


def pings() -> Iterator[Row]:
    yield "no payload", (frame(PING),), True
    yield "small payload", (frame(PING, b"Hello, world!"),), True
    yield "binary payload", (frame(PING, bytes((0, 255, 254, 253, 252, 251, 0, 255))),), True
    yield "the longest payload", (frame(PING, b"\xfe" * 125),), True
    yield "a payload that is too long", (frame(PING, b"\xfe" * 126),), False
    yield "the longest payload, byte by byte", chopped(frame(PING, b"\xfe" * 125), 1), True
    yield "a pong that nobody asked for", (frame(PONG),), True
    yield "a pong with payload that nobody asked for", (frame(PONG, b"unsolicited"),), True
    yield "such a pong, then a ping", (frame(PONG, b"unsolicited"), frame(PING, b"ping")), True
    yield "ten pings", tuple(frame(PING, b"payload-%d" % n) for n in range(10)), True
    ten = b"".join(frame(PING, b"payload-%d" % n) for n in range(10))
    yield "ten pings, byte by byte", chopped(ten, 1), True


def reserved_bits() -> Iterator[Row]:
    hello = frame(TEXT, b"Hello, world!")
    for rsv in range(1, 8):
        broken = frame(TEXT, b"Hello, world!", rsv=rsv)
        yield f"RSV={rsv}", (broken,), False
        yield f"a message, then RSV={rsv}", (hello, broken), False
        yield f"a message, then RSV={rsv}, byte by byte", chopped(hello + broken, 1), False
        yield f"RSV={rsv} in a ping", (frame(PING, b"x", rsv=rsv),), False
        yield f"RSV={rsv} in a close", (frame(CLOSE, struct.pack("!H", 1000), rsv=rsv),), False


def reserved_opcodes(opcodes: range) -> Iterator[Row]:
    hello = frame(TEXT, b"Hello, world!")
    for opcode in opcodes:
        yield f"opcode {opcode}", (frame(opcode),), False
        yield f"opcode {opcode} with payload", (frame(opcode, b"reserved"),), False
        yield f"a message, then opcode {opcode}", (hello, frame(opcode, b"reserved")), False
        yield f"opcode {opcode}, byte by byte", chopped(hello + frame(opcode, b"reserved"), 1), False


def fragmentation() -> Iterator[Row]:
    a, b = b"fragment1", b"fragment2"
    start, middle, end = frame(TEXT, a, fin=False), frame(CONTINUATION, b, fin=False), frame(CONTINUATION, b)
    ping = frame(PING, b"ping payload")
    yield "a ping in fragments", (frame(PING, a, fin=False), end), False
    yield "a pong in fragments", (frame(PONG, a, fin=False), end), False
    yield "text in two", (start, end), True
    yield "text in two, in one write", (start + end,), True
    yield "text in two, byte by byte", chopped(start + end, 1), True
    yield "text in two, a ping between", (start, ping, end), True
    yield "the same in one write", (start + ping + end,), True
    yield "the same byte by byte", chopped(start + ping + end, 1), True
    for fin, name in ((True, "final"), (False, "not final")):
        orphan = frame(CONTINUATION, b"non-continuation payload", fin=fin)
        yield f"a continuation of nothing, {name}", (orphan,), False
        yield f"the same, then text, {name}", (orphan + frame(TEXT, b"Hello"),), False
        yield f"the same byte by byte, {name}", chopped(orphan, 1), False
    yield "a continuation after a whole message", (start, end, middle), False
    yield "the same, final", (start, end, end), False
    yield "the same byte by byte", chopped(start + end + middle, 1), False
    yield "text inside a fragmented text", (start, frame(TEXT, b)), False
    yield "five fragments, two pings between", (start, middle, ping, middle, middle, ping, end), True
    yield (
        "the same byte by byte, pong instead",
        chopped(start + middle + frame(PONG, b"p") + middle + end, 1),
        True,
    )
    yield "empty fragments", tuple(fragments(TEXT, b"abc", 1)) + tuple(fragments(TEXT, b"", 1)), True
    empty = (
        frame(TEXT, b"", fin=False),
        frame(CONTINUATION, b"", fin=False),
        frame(CONTINUATION, b""),
    )
    yield "three empty fragments", empty, True


GOOD_TEXT = (
    "",
    "Hello-µ@ßöäüàá-UTF-8!!",
    "κόσμε",
    "\x00\x7f",
    "\u0080\u07ff",
    "\u0800\uffff",
    "\ud7ff\ue000\ufffd",
    "\U00010000\U0010ffff",
    "\ufdd0\ufffe\U0001ffff",
    "日本語 — 한국어 — 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "e\u0301\u200d\u202e\ufeff",
)

BAD_TEXT: tuple[tuple[str, bytes], ...] = (
    *((f"a lone continuation byte {b:02x}", bytes((b,))) for b in (0x80, 0xBF)),
    *((f"{n} continuation bytes", b"\x80\xbf" * (n // 2) + b"\x80" * (n % 2)) for n in (2, 3, 4, 5, 64)),
    *((f"a lone first byte {b:02x}", bytes((b, 0x20))) for b in (0xC0, 0xC2, 0xDF, 0xE0, 0xEF, 0xF0, 0xF4)),
    *(
        (f"cut off: {s.hex()}", s)
        for s in (b"\xc2", b"\xe0\xa0", b"\xe3\x80", b"\xf0\x90\x80", b"\xf4\x8f\xbf")
    ),
    *((f"impossible byte {b:02x}", bytes((b,))) for b in (0xF5, 0xF8, 0xFC, 0xFE, 0xFF)),
    *(
        (f"overlong: {s.hex()}", s)
        for s in (
            b"\xc0\xaf",
            b"\xe0\x80\xaf",
            b"\xf0\x80\x80\xaf",
            b"\xf8\x80\x80\x80\xaf",
            b"\xc1\xbf",
            b"\xe0\x9f\xbf",
            b"\xf0\x8f\xbf\xbf",
            b"\xc0\x80",
            b"\xe0\x80\x80",
            b"\xf0\x80\x80\x80",
        )
    ),
    *(
        (f"surrogate: {s.hex()}", s)
        for s in (
            b"\xed\xa0\x80",
            b"\xed\xad\xbf",
            b"\xed\xae\x80",
            b"\xed\xaf\xbf",
            b"\xed\xb0\x80",
            b"\xed\xbe\x80",
            b"\xed\xbf\xbf",
            b"\xed\xa0\x80\xed\xb0\x80",
            b"\xed\xad\xbf\xed\xbf\xbf",
        )
    ),
    *(
        (f"past U+10FFFF: {s.hex()}", s)
        for s in (b"\xf4\x90\x80\x80", b"\xf7\xbf\xbf\xbf", b"\xfb\xbf\xbf\xbf\xbf")
    ),
)


def utf8() -> Iterator[Row]:
    for text in GOOD_TEXT:
        data = text.encode("utf-8", "surrogatepass")
        yield f"valid: {data.hex()}", (frame(TEXT, data),), True
        yield f"valid, a byte a fragment: {data.hex()}", tuple(fragments(TEXT, data, 1)), True
        yield f"valid, byte by byte: {data.hex()}", chopped(frame(TEXT, data), 1), True
    for about, data in BAD_TEXT:
        around = b"\xce\xba\xe1\xbd\xb9" + data + b"edited"
        yield f"{about}", (frame(TEXT, data),), False
        yield f"{about}, in between", (frame(TEXT, around),), False
        yield f"{about}, byte by byte", chopped(frame(TEXT, around), 1), False
        yield f"{about}, in fragments", (b"".join(fragments(TEXT, around, 3)),), False
    # binary messages may hold anything
    yield "no text in a binary message", (frame(BINARY, b"\xff\xfe\xed\xa0\x80"),), True


VALID_CODES = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 3000, 3999, 4000, 4999)
INVALID_CODES = (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)


def closing() -> Iterator[Row]:
    hello = frame(TEXT, b"Hello World!")
    yield "a message, then close", (hello, close()), False
    yield "two closes", (close() + close(),), False
    yield "a ping after the close", (close() + frame(PING),), False
    yield "text after the close", (close() + hello,), False
    yield "half a message, then close", (frame(TEXT, b"fragment1", fin=False), close()), False
    yield (
        "the rest of it after the close",
        (frame(TEXT, b"a", fin=False), close() + frame(CONTINUATION, b"b")),
        False,
    )
    yield "256 KiB, then close", (frame(TEXT, b"BAsd7&jh23" * 26214) + close(),), False
    yield "no payload", (close(None),), False
    yield "a payload of one byte", (frame(CLOSE, b"a"),), False
    yield "a code alone", (close(1000),), False
    yield "a reason", (close(1000, b"Hello World!"),), False
    yield "the longest reason", (close(1000, b"*" * 123),), False
    yield "a reason that is too long", (close(1000, b"*" * 124),), False
    yield "a reason that is no UTF-8", (close(1000, b"\xce\xba\xe1\xbd\xb9\xed\xa0\x80edited"),), False
    yield "byte by byte", chopped(close(1000, b"bye"), 1), False
    for code in VALID_CODES:
        yield f"code {code}", (close(code),), False
        yield f"code {code} with a reason", (close(code, b"why"),), False
    for code in INVALID_CODES:
        yield f"invalid code {code}", (close(code),), False
        yield f"invalid code {code} with a reason", (close(code, b"why"),), False


def large() -> Iterator[Case]:
    number = itertools.count(1)
    for opcode, name in ((TEXT, "text"), (BINARY, "binary")):
        for kib in (64, 256, 1024, 4096, 8192, 16384):
            payload = (b"0123456789abcdef" * 64) * kib
            yield Case(
                f"9.{next(number)}", f"{name} of {kib} KiB", (frame(opcode, payload),), large=kib > 1024
            )
        payload = (b"0123456789abcdef" * 64) * 1024
        for size in (64, 256, 1024, 4096, 65536, 262144):
            yield Case(
                f"9.{next(number)}",
                f"{name} of 1 MiB in fragments of {size}",
                chopped(b"".join(fragments(opcode, payload, size)), 65536),
                large=size < 1024,
            )
        for size in (1, 64, 997, 4096):
            whole = frame(opcode, payload[: 64 * 1024])
            yield Case(
                f"9.{next(number)}",
                f"{name} of 64 KiB in writes of {size}",
                chopped(whole, size),
                large=size == 1,
            )
        for size in (0, 16, 64, 256, 1024, 4096, 16384):
            many = b"".join(frame(opcode, b"*" * size) for _ in range(1000))
            yield Case(
                f"9.{next(number)}",
                f"1,000 {name} messages of {size}",
                chopped(many, 65536),
                large=size > 1024,
            )


def automatic_fragmentation() -> Iterator[Row]:
    yield "65,536 bytes in fragments of 1,300", tuple(fragments(TEXT, b"*" * 65536, 1300)), True


OFFERS = (
    "permessage-deflate",
    "permessage-deflate; client_no_context_takeover",
    "permessage-deflate; server_no_context_takeover",
    "permessage-deflate; client_no_context_takeover; server_no_context_takeover",
    "permessage-deflate; client_max_window_bits",
    "permessage-deflate; server_max_window_bits=9; client_max_window_bits=15",
    "permessage-deflate; server_max_window_bits=15, permessage-deflate",
    "x-unknown-extension, permessage-deflate",
)


def deflated(compressor: object, payload: bytes) -> bytes:
    """RFC 7692 §7.2.1: without the four bytes that end the flush."""
    packed = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)  # type: ignore[attr-defined]
    return bytes(packed[:-4])


def compression() -> Iterator[Case]:
    for group, offer in enumerate(OFFERS, 1):
        for number, (size, count) in enumerate(
            ((0, 3), (16, 100), (64, 100), (256, 100), (1024, 100), (4096, 50), (32768, 10), (131072, 4)), 1
        ):
            # a window of 8 bits' size and a context per message satisfy whatever the server agrees to
            frames = []
            for n in range(count):
                compressor = zlib.compressobj(wbits=-9)
                text = (b"%08d The quick brown fox jumps over the lazy dog. " % n * (size // 32 + 1))[:size]
                frames.append(frame(TEXT if n % 2 else BINARY, deflated(compressor, text), rsv=4))
            yield Case(
                f"12.{group}.{number}",
                f"{count} compressed messages of {size}; {offer}",
                chopped(b"".join(frames), 16384),
                offer=offer,
            )
        text = b"The quick brown fox " * 400
        packed = deflated(zlib.compressobj(wbits=-9), text)
        yield Case(
            f"13.{group}.1",
            f"compressed, in fragments; {offer}",
            tuple(fragments(TEXT, packed, 7, rsv=4)),
            offer=offer,
        )
        yield Case(f"13.{group}.2", f"not compressed; {offer}", (frame(TEXT, text),), offer=offer)
        yield Case(
            f"13.{group}.3",
            f"RSV1 in a continuation; {offer}",
            (frame(TEXT, packed, fin=False, rsv=4) + frame(CONTINUATION, b"", rsv=4),),
            offer=offer,
            closes=False,
        )
        yield Case(
            f"13.{group}.4",
            f"what is no deflate stream; {offer}",
            (frame(TEXT, b"\xff\xff\xff\xff", rsv=4),),
            offer=offer,
            closes=False,
        )
