"""Writes the first inputs of the fuzzer, one for each thing that SPEC.md knows, to tests/corpus/tunnel.

    PYTHONPATH=tests python tests/fuzz/seeds.py

What the fuzzer found since (`TARGET.found-*.bin`) stays. Deterministic: running it again changes nothing.
"""

from __future__ import annotations

from pathlib import Path

from speedups import model

CORPUS = Path(__file__).parents[1] / "corpus" / "tunnel"

HEAD = b"GET /x HTTP/1.1\r\nhost: a.b\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n\r\n"
KEY = b"\x37\xfa\x21\x3d"

GATEWAY, EDGE = 0, 1


def options(edge: int, *, how: int = 0, streams: int = 0, bare: bool = False) -> bytes:
    return bytes([edge | bare << 1 | how << 2 | streams << 4])


def frame(kind: int, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return model.frame(kind, flags, stream, payload)


def opened(number: int, *, fin: bool = True, body: bytes = b"") -> bytes:
    return frame(model.OPEN, number, model.open_payload("web", HEAD, body), model.FIN if fin else 0)


def credit(number: int, offset: int) -> bytes:
    return frame(model.CREDIT, number, offset.to_bytes(8, "big"))


def reset(number: int, code: int = 5) -> bytes:
    return frame(model.RESET, number, code.to_bytes(4, "big"))


def goaway(last: int, code: int = 0) -> bytes:
    return frame(model.GOAWAY, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big"))


def u64(kind: int, value: int) -> bytes:
    return frame(kind, 0, value.to_bytes(8, "big"))


def head(number: int, body: bytes = b"", flags: int = 0) -> bytes:
    return frame(model.HEAD, number, model.head_payload(OK, body), flags)


def data(number: int, body: bytes, flags: int = 0) -> bytes:
    return frame(model.DATA, number, body, flags)


def websocket(first: int, payload: bytes, *, mask: bool) -> bytes:
    size = len(payload)
    form = 0 if size < 126 else 2 if size < 65536 else 8
    short = size if form == 0 else 126 if form == 2 else 127
    length = bytes([short | (0x80 if mask else 0)]) + (size.to_bytes(form, "big") if form else b"")
    if not mask:
        return bytes([first]) + length + payload
    return bytes([first]) + length + KEY + bytes(byte ^ KEY[i % 4] for i, byte in enumerate(payload))


def to_gateway() -> dict[str, bytes]:
    """What an edge may say, right and wrong."""
    return {
        "hello": frame(model.HELLO, 0, b"{}") + frame(model.AUTH, 0, b"{}"),
        "open": opened(1),
        "open-body": opened(1, fin=False, body=b"b" * 100) + data(1, b"more") + data(1, b"", model.FIN),
        "opens": b"".join(opened(number) for number in range(1, 9)),
        "too-many": b"".join(opened(number, fin=False) for number in range(1, 11)),
        "trailers": opened(1, fin=False) + frame(model.TRAILERS, 1, b"a: b\r\n\r\n"),
        "over-credit": opened(1, fin=False) + data(1, b"d" * 4096) + data(1, b"e"),
        "credit": opened(2 - 1) + credit(1, 8192) + credit(1, 8193) + credit(1, 2**64 - 1),
        "credit-same": opened(1, fin=False) + credit(1, 4096),
        "reset": opened(1, fin=False) + reset(1) + reset(1) + credit(1, 9999),
        "burned": reset(1) + reset(2) + opened(3),
        "drain": opened(1) + goaway(2**30 - 1, 13) + opened(2),
        "ping": u64(model.PING, 1) + u64(model.PONG, 1) + u64(model.PONG, 2),
        "info": frame(model.INFO, 0, b'{"drain":true,"edges":[]}'),
        "unknown": frame(13, 0, b"later") + frame(200, 5, b"later", 255) + opened(1),
        "never-opened": opened(1) + data(3, b"x"),
        "gap": opened(2),
        "head-too-long": frame(model.OPEN, 1, b"\x03web\x01\xff\xff" + b"h" * 100),
        "name": frame(model.OPEN, 1, b"\x03w\nb\x01\x00\x00"),
        "empty-data": opened(1, fin=False) + data(1, b"") * 3,
        "bit-31": frame(model.DATA, 2**31 + 1, b"x"),
        "big": opened(1, fin=False) + data(1, b"d" * 4096, model.FIN),
    }


def to_edge() -> dict[str, bytes]:
    """What a gateway may say about streams 1, 2 and 3."""
    return {
        "answer": head(1, b"body", model.FIN) + head(2) + data(2, b"x" * 500, model.FIN),
        "interim": frame(
            model.HEAD, 1, model.head_payload(b"HTTP/1.1 103 Early Hints\r\n\r\n"), model.INTERIM
        )
        * 3
        + head(1, b"", model.FIN),
        "interims": frame(model.HEAD, 1, model.head_payload(b"HTTP/1.1 100 Continue\r\n\r\n"), model.INTERIM)
        * 40,
        "early-data": data(1, b"x"),
        "two-heads": head(1) + head(1),
        "trailers": head(1, b"x") + frame(model.TRAILERS, 1, b"a: b\r\n\r\n"),
        "credit": credit(1, 9000) + credit(2, 2**63) + head(1, b"", model.FIN),
        "reset": reset(1, 8) + head(2) + reset(2, 9) + frame(model.RESET_ACK, 1),
        "acks": frame(model.RESET_ACK, 1) + frame(model.RESET_ACK, 9),
        "goaway": goaway(2**30 - 1, 13) + goaway(2, 13) + head(1, b"x", model.FIN) + head(3),
        "goaway-up": goaway(1, 13) + goaway(2, 13),
        "open": opened(4),
        "closed-then": head(1, b"", model.FIN) + data(1, b"x") + credit(1, 9000),
        "over-credit": head(1, b"x" * 4096) + data(1, b"y"),
        "ping": u64(model.PING, 7) * 25,
        "info": frame(model.INFO, 0, b"{}") * 25,
        "hello-again": frame(model.HELLO, 0, b"{}"),
    }


def inputs() -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for number, (name, wire) in enumerate(to_gateway().items()):
        found[f"session.gateway-{name}.bin"] = options(GATEWAY, how=number % 4) + wire
        found[f"link.gateway-{name}.bin"] = options(GATEWAY) + websocket(0x82, wire, mask=False)
        found[f"frames.gateway-{name}.bin"] = wire
    for number, (name, wire) in enumerate(to_edge().items()):
        found[f"session.edge-{name}.bin"] = options(EDGE, how=number % 4, streams=3) + wire
        found[f"link.edge-{name}.bin"] = options(EDGE, streams=3) + websocket(0x82, wire, mask=True)
    found["session.garbage.bin"] = options(GATEWAY, bare=True) + b"GET / HTTP/1.1\r\n\r\n"
    found["session.bare-hello.bin"] = options(EDGE, bare=True) + frame(model.HELLO, 0, b"{}")
    found["session.bare-goaway.bin"] = options(EDGE, bare=True) + goaway(0, 1)
    for side, mask in ((0, True), (1, False)):
        start = bytes([side])
        pieces = {
            "message": websocket(0x82, b"Hello", mask=mask),
            "lengths": websocket(0x82, b"a" * 126, mask=mask) + websocket(0x82, b"b" * 70_000, mask=mask),
            "fragments": websocket(0x02, b"Hel", mask=mask)
            + websocket(0x89, b"ping", mask=mask)
            + websocket(0x00, b"", mask=mask)
            + websocket(0x80, b"lo", mask=mask),
            "close": websocket(0x82, b"last", mask=mask)
            + websocket(0x88, b"\x03\xe9bye", mask=mask)
            + websocket(0x82, b"more", mask=mask),
            "close-empty": websocket(0x88, b"", mask=mask),
            "text": websocket(0x81, b"text", mask=mask),
            "rsv": websocket(0xC2, b"x", mask=mask),
            "long-control": websocket(0x89, b"x" * 126, mask=mask),
            "wrong-mask": websocket(0x82, b"x", mask=not mask),
            "pongs": websocket(0x8A, b"", mask=mask) * 3,
            "wide": b"\x82" + (b"\xff" if mask else b"\x7f") + b"\xff" * 8,
        }
        for name, wire in pieces.items():
            found[f"websocket.{'client' if side else 'server'}-{name}.bin"] = start + wire
    for number in range(12):
        program = bytes((number * 37 + i * i * (number + 3)) % 256 for i in range(60 + number * 30))
        found[f"program.{number}.bin"] = program
    return found


def main() -> None:
    CORPUS.mkdir(parents=True, exist_ok=True)
    for name, content in inputs().items():
        (CORPUS / name).write_bytes(content)


if __name__ == "__main__":
    main()
