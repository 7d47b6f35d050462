"""Records what this version says over a tunnel: tests/vectors/tunnel/v1/*.json.

    PYTHONPATH=tests python tests/vectors/record.py NAME      a new set, NAME.json, for a version that is released
    PYTHONPATH=tests python tests/vectors/record.py rules     rules.json anew: rules of SPEC.md and their outcome

Frames come from the real session and handshake, with fixed keys, nonces and clocks. A set that is committed is never
recorded again: it is other people's software. `test_vectors.py` replays each in both roles.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from speedups import model
from speedups.pair import End, Recorder

from guestpass._version import VERSION
from guestpass.mux import handshake
from guestpass.mux.handshake import Hello, Proof, Verdict
from guestpass_speedups.session import Budget

FOLDER = Path(__file__).parent / "tunnel" / "v1"

KEY = bytes(range(32))
EDGE_NONCE, GATEWAY_NONCE = bytes(range(64, 96)), bytes(range(96, 128))
CERTIFICATE = bytes(range(128, 160))
WEBSOCKET_KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455, 1.3.
EDGE = Hello(role="edge", epoch=1785585600000000000, nonce=EDGE_NONCE, edge="share.example.com")
GATEWAY = Hello(role="gateway", epoch=1785585500000000001, nonce=GATEWAY_NONCE)
SITE, NAME, SERVICE = "plant-a", "plant-a-1", "dashboards"
INFO_GATEWAY = {
    "services": {SERVICE: {"healthy": True, "url_scheme": "http"}},
    "weight": 1,
    "labels": {"zone": "hall-3"},
    "load": {"streams": 3},
}
INFO_EDGE = {"edges": ["https://e2.example.com"], "drain": False, "spread": 0}

GET = b"GET /x?y=1 HTTP/1.1\r\nHost: a.share.example.com\r\nAccept: */*\r\n\r\n"
POST = b"POST /upload HTTP/1.1\r\nHost: a.share.example.com\r\nContent-Length: 40000\r\n\r\n"
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: a.share.example.com\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
)
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n"
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def proof() -> Proof:
    return Proof.sign(
        Ed25519PrivateKey.from_private_bytes(KEY),
        site=SITE,
        name=NAME,
        certificate=CERTIFICATE,
        edge=EDGE,
        gateway=GATEWAY,
    )


def dumps(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


class Exchange:
    """Both ends of a tunnel, whose frames are noted as they pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.frames: list[dict[str, Any]] = []
        self.ends = {"edge": End(edge=True, budget=Budget()), "gateway": End(edge=False, budget=Budget())}
        for end in self.ends.values():
            end.session.set_peer_limits(floor=32_768, max_streams=16_384)
        self.edge, self.gateway = (end.session for end in self.ends.values())
        self.edge.send_hello(EDGE.encode())
        self.gateway.send_hello(GATEWAY.encode())
        self.flow()
        self.gateway.send_auth(proof().encode())
        self.flow()
        self.edge.send_auth(Verdict(True).encode())
        self.flow()

    def flow(self) -> None:
        for name, other in (("edge", "gateway"), ("gateway", "edge")) * 4:
            data = self.ends[name].session.fill(65_536, self.now)
            self.now += 0.01
            for frame in self.ends[name].splitter.feed(data):
                self.frames.append(note(name, frame))
            if data:
                self.ends[other].session.receive(data, self.now)

    def open(self, head: bytes, **more: Any) -> Any:
        stream = self.edge.open(SERVICE, head, Recorder(), **more)
        self.flow()
        return stream

    def served(self) -> Any:
        """The gateway's stream that was opened last."""
        return self.ends["gateway"].owner.opened[-1][0]


def note(sender: str, frame: model.Frame) -> dict[str, Any]:
    """A frame as hex, with what it is beside it for people."""
    names = [name for bit, name in ((model.FIN, "FIN"), (model.INTERIM, "INTERIM")) if frame.flags & bit]
    return {
        "from": sender,
        "type": model.NAMES[frame.kind],
        "stream": frame.stream,
        "flags": names,
        "about": about(frame),
        "hex": model.frame(frame.kind, frame.flags, frame.stream, frame.payload).hex(),
    }


def about(frame: model.Frame) -> str:
    payload = frame.payload
    if frame.kind in (model.HELLO, model.AUTH, model.INFO):
        return payload.decode()
    if frame.kind == model.OPEN:
        size = payload[0]
        head = payload[4 + size : len(payload) - len(frame.body)]
        return f"{payload[1 : 1 + size].decode()}, class {payload[1 + size]}, {head.decode()!r}, {len(frame.body)} B"
    if frame.kind == model.HEAD:
        return f"{payload[2 : len(payload) - len(frame.body)].decode()!r}, {len(frame.body)} B"
    if frame.kind == model.GOAWAY:
        return f"last {int.from_bytes(payload[:4], 'big')}, code {int.from_bytes(payload[4:], 'big')}"
    if frame.kind in (model.DATA, model.TRAILERS):
        return f"{len(payload)} B"
    return str(int.from_bytes(payload, "big")) if payload else ""


def get(exchange: Exchange) -> None:
    """A GET, answered with head, body and FIN in one frame."""
    exchange.open(GET, fin=True)
    exchange.served().send_head(OK)
    exchange.served().send(b"hello", fin=True)
    exchange.flow()


def interim_and_trailers(exchange: Exchange) -> None:
    """Two interim heads, the final one, a body in two pieces, trailers."""
    exchange.open(GET, fin=True)
    stream = exchange.served()
    stream.send_head(EARLY, interim=True)
    stream.send_head(EARLY, interim=True)
    exchange.flow()
    stream.send_head(OK)
    stream.send(b"one ")
    exchange.flow()
    stream.send(b"two")
    stream.send_trailers(b"Server-Timing: total;dur=5\r\n\r\n")
    exchange.flow()


def upload(exchange: Exchange) -> None:
    """40,000 bytes up, more than the first credit; CREDIT follows what the gateway consumes."""
    stream = exchange.open(POST, body=b"u" * 1000)
    stream.send(b"u" * 39_000, fin=True)
    for _ in range(4):
        exchange.flow()
    exchange.served().send_head(OK, fin=True)
    exchange.flow()


def upgrade(exchange: Exchange) -> None:
    """101, bytes both ways, and each side's half-close."""
    stream = exchange.open(UPGRADE)
    served = exchange.served()
    served.send_head(SWITCHING)
    exchange.flow()
    stream.send(b"from the visitor")
    served.send(b"from the application")
    exchange.flow()
    stream.send(b"", fin=True)
    exchange.flow()
    served.send(b"", fin=True)
    exchange.flow()


def reset_by_edge(exchange: Exchange) -> None:
    """The visitor leaves in the middle of a response; RESET_ACK when the work has ended."""
    stream = exchange.open(GET, fin=True)
    served = exchange.served()
    served.send_head(OK)
    served.send(b"part")
    exchange.flow()
    stream.reset(5)
    exchange.flow()
    served.cancelled()
    exchange.flow()


def reset_by_gateway(exchange: Exchange) -> None:
    """A service that cannot be reached."""
    stream = exchange.open(GET, fin=True)
    exchange.served().reset(8)
    exchange.flow()
    stream.cancelled()
    exchange.flow()


def burned(exchange: Exchange) -> None:
    """A stream that was given up before its OPEN was written: RESET of the next id. Then one that is served."""
    exchange.edge.open(SERVICE, GET, Recorder(), fin=True).reset(5)
    exchange.flow()
    get(exchange)


def infos_and_pings(exchange: Exchange) -> None:
    """INFO of both ends, PING and PONG of both ends."""
    exchange.gateway.send_info(dumps(INFO_GATEWAY))
    exchange.edge.send_info(dumps(INFO_EDGE))
    exchange.flow()
    exchange.now += 3.5
    exchange.edge.ping(exchange.now)
    exchange.gateway.ping(exchange.now)
    exchange.flow()


def drain(exchange: Exchange) -> None:
    """The gateway leaves: GOAWAY twice, the live stream is served to its end."""
    exchange.open(GET, fin=True)
    exchange.gateway.goaway(13, 2**30 - 1)
    exchange.flow()
    exchange.gateway.goaway(13)
    exchange.served().send_head(OK)
    exchange.served().send(b"late", fin=True)
    exchange.flow()


EXCHANGES: tuple[Callable[[Exchange], None], ...] = (
    get,
    interim_and_trailers,
    upload,
    upgrade,
    reset_by_edge,
    reset_by_gateway,
    burned,
    infos_and_pings,
    drain,
)


def record() -> dict[str, Any]:
    signed = proof()
    exchanges = []
    for scenario in EXCHANGES:
        exchange = Exchange()
        scenario(exchange)
        exchanges.append(
            {"name": scenario.__name__, "about": scenario.__doc__ or "", "frames": exchange.frames}
        )
    return {
        "software": f"guestpass/{VERSION}",
        "upgrade": {
            "request": handshake.upgrade_request(EDGE.edge, WEBSOCKET_KEY).decode(),
            "response": handshake.upgrade_response(WEBSOCKET_KEY).decode(),
        },
        "handshake": {
            "private_key": KEY.hex(),
            "site": SITE,
            "name": NAME,
            "certificate_hash": CERTIFICATE.hex(),
            "edge_hello": EDGE.encode().decode(),
            "gateway_hello": GATEWAY.encode().decode(),
            "signed": handshake._transcript(EDGE, GATEWAY, SITE, NAME, signed.key, CERTIFICATE).hex(),
            "signature": signed.signature.hex(),
            "proof": signed.encode().decode(),
            "accepted": Verdict(True).encode().decode(),
            "refused": [
                Verdict(False, code, f"Refused: {code}.").encode().decode()
                for code in (
                    "unknown_key",
                    "bad_signature",
                    "wrong_certificate",
                    "stale_epoch",
                    "unavailable",
                )
            ],
        },
        "exchanges": exchanges,
    }


LIVES = "lives"
HELLO_EDGE = model.frame(model.HELLO, 0, 0, EDGE.encode())
HELLO_GATEWAY = model.frame(model.HELLO, 0, 0, GATEWAY.encode())
OPENED = model.frame(model.OPEN, 0, 1, model.open_payload(SERVICE, POST))


def rules() -> list[dict[str, str]]:
    """`to`: who receives; `after`: "nothing", "hello" or "verdict" was exchanged, or "open": stream 1 was opened, both
    its directions are open; `hex`: what comes then; `outcome`: "lives", or the code of the GOAWAY."""
    both = ("gateway", "edge")
    found: list[dict[str, str]] = []

    def rule(name: str, to: tuple[str, ...], after: str, data: bytes, outcome: str) -> None:
        found.extend(
            {"name": name, "to": who, "after": after, "hex": data.hex(), "outcome": outcome} for who in to
        )

    def frame(kind: int, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
        return model.frame(kind, flags, stream, payload)

    wrong, flow, limit = "PROTOCOL_ERROR", "FLOW_CONTROL_ERROR", "LIMIT_EXCEEDED"
    gateway, edge = ("gateway",), ("edge",)
    for kind in (13, 14, 127, 255):
        rule(f"unknown type {kind}", both, "hello", frame(kind, 0), LIVES)
        rule(
            f"unknown type {kind} with flags, an id, a payload",
            both,
            "open",
            frame(kind, 77, b"x" * 20, 255),
            LIVES,
        )
    rule("unknown type with bit 31", both, "hello", frame(200, 2**31), wrong)
    rule("unknown type before HELLO", both, "nothing", frame(200, 0), wrong)
    rule("unknown flags", both, "hello", frame(model.PING, 0, bytes(8), 0xFC), LIVES)
    rule("FIN on a type that has none", both, "hello", frame(model.PING, 0, bytes(8), 1), LIVES)
    rule("GOAWAY before HELLO", both, "nothing", frame(model.GOAWAY, 0, bytes(4) + b"\0\0\0\1"), LIVES)
    rule("PING before HELLO", both, "nothing", frame(model.PING, 0, bytes(8)), wrong)
    rule("a second HELLO", gateway, "hello", HELLO_EDGE, wrong)
    rule("a second HELLO", edge, "hello", HELLO_GATEWAY, wrong)
    rule("a ninth AUTH", both, "verdict", frame(model.AUTH, 0, b"{}") * 8, wrong)
    least = {model.OPEN: 4, model.HEAD: 2, model.CREDIT: 8, model.RESET: 4}
    least |= {model.PING: 8, model.PONG: 8, model.GOAWAY: 8}
    for kind, name in enumerate(model.NAMES):
        misplaced = frame(kind, 0 if kind < model.PING else 1, bytes(least.get(kind, 0)))
        rule(f"{name} on the wrong kind of stream", both, "verdict", misplaced, wrong)
    for kind, size in (
        (model.DATA, 16_369),
        (model.CREDIT, 7),
        (model.RESET, 5),
        (model.RESET_ACK, 1),
        (model.PING, 9),
    ):
        header = size.to_bytes(2, "big") + frame(kind, 0 if kind >= model.PING else 1)[2:]
        rule(f"{model.NAMES[kind]} of {size} bytes, header only", both, "verdict", header, wrong)
    rule("OPEN before the verdict", gateway, "hello", OPENED, wrong)
    rule(
        "OPEN of stream 2 first",
        gateway,
        "verdict",
        frame(model.OPEN, 2, model.open_payload(SERVICE, GET)),
        wrong,
    )
    rule("OPEN twice", gateway, "open", OPENED, wrong)
    rule("OPEN at an edge", edge, "verdict", OPENED, wrong)
    rule("OPEN of class 200", gateway, "verdict", frame(model.OPEN, 1, b"\3web\xc8\0\x05GET /"), LIVES)
    rule("OPEN without a name", gateway, "verdict", frame(model.OPEN, 1, b"\0\1\0\0"), wrong)
    rule("OPEN with a line end in its name", gateway, "verdict", frame(model.OPEN, 1, b"\3w\nb\1\0\0"), wrong)
    rule("OPEN whose head does not fit", gateway, "verdict", frame(model.OPEN, 1, b"\3web\1\0\5GET"), wrong)
    rule("OPEN with a head of 32,769 bytes", gateway, "verdict",
         frame(model.OPEN, 1, model.open_payload(SERVICE, bytes(32_769))), limit)  # fmt: skip
    rule("RESET of the next id", gateway, "verdict", frame(model.RESET, 1, bytes(4)), LIVES)
    rule("RESET of a later id", gateway, "verdict", frame(model.RESET, 2, bytes(4)), wrong)
    rule("a frame for a stream that was never opened", both, "open", frame(model.DATA, 9, b"x"), wrong)
    rule("HEAD at a gateway", gateway, "open", frame(model.HEAD, 1, model.head_payload(OK)), wrong)
    rule("DATA before HEAD", edge, "open", frame(model.DATA, 1, b"x"), wrong)
    rule("HEAD twice", edge, "open", frame(model.HEAD, 1, model.head_payload(OK)) * 2, wrong)
    rule("an interim HEAD with FIN", edge, "open", frame(model.HEAD, 1, model.head_payload(EARLY), 3), wrong)
    rule(
        "32,768 body bytes",
        gateway,
        "open",
        frame(model.DATA, 1, bytes(16_000)) * 2 + frame(model.DATA, 1, bytes(768)),
        LIVES,
    )
    rule(
        "32,769 body bytes",
        gateway,
        "open",
        frame(model.DATA, 1, bytes(16_000)) * 2 + frame(model.DATA, 1, bytes(769)),
        flow,
    )
    rule("an empty DATA without FIN", gateway, "open", frame(model.DATA, 1), LIVES)
    rule("DATA after FIN", gateway, "open", frame(model.DATA, 1, b"", 1) + frame(model.DATA, 1, b"x"), wrong)
    rule(
        "DATA after RESET",
        gateway,
        "open",
        frame(model.RESET, 1, bytes(4)) + frame(model.DATA, 1, b"x"),
        wrong,
    )
    rule("RESET twice", gateway, "open", frame(model.RESET, 1, bytes(4)) * 2, wrong)
    rule("RESET_ACK without RESET", both, "open", frame(model.RESET_ACK, 1), wrong)
    rule("CREDIT up to u64", both, "open", frame(model.CREDIT, 1, b"\xff" * 8), LIVES)
    rule("CREDIT that does not grow", both, "open", frame(model.CREDIT, 1, (32_768).to_bytes(8, "big")), flow)
    rule("CREDIT that shrinks", both, "open", frame(model.CREDIT, 1, bytes(8)), flow)
    rule("RESET with an unknown code", both, "open", frame(model.RESET, 1, b"\xff" * 4), LIVES)
    rule("GOAWAY with an unknown code", both, "open", frame(model.GOAWAY, 0, b"\x3f" + b"\xff" * 7), LIVES)
    one, two = (bytes(3) + bytes((last,)) + bytes(4) for last in (1, 2))
    raised = frame(model.GOAWAY, 0, one) + frame(model.GOAWAY, 0, two)
    rule("GOAWAY that raises its id", edge, "open", raised, wrong)
    rule("a PONG that nobody waits for", both, "verdict", frame(model.PONG, 0, b"\xff" * 8), LIVES)
    rule("20 PINGs", both, "verdict", frame(model.PING, 0, bytes(8)) * 20, LIVES)
    rule("21 PINGs", both, "verdict", frame(model.PING, 0, bytes(8)) * 21, limit)
    rule("20 INFOs", both, "verdict", frame(model.INFO, 0, b"{}") * 20, LIVES)
    rule("21 INFOs", both, "verdict", frame(model.INFO, 0, b"{}") * 21, limit)
    rule("1,001 glitches", both, "verdict", frame(model.PONG, 0, b"\xff" * 8) * 1001, limit)
    return found


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    path = FOLDER / f"{sys.argv[1]}.json"
    if sys.argv[1] == "rules":
        path.write_text(json.dumps({"about": rules.__doc__, "rules": rules()}, indent=1) + "\n", "utf-8")
        return
    if path.exists():
        sys.exit(f"{path} is recorded; a later version gets a set of its own")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record(), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
