"""What released versions said over a tunnel, replayed against today's code in both roles; and the rules that let
versions differ (SPEC.md, 12.)."""

from __future__ import annotations

import asyncio
import importlib.resources
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from speedups import model
from speedups.pair import End, Recorder
from vectors import record

from guestpass.mux import handshake
from guestpass.mux.handshake import Hello, Proof, Verdict
from guestpass.mux.link import EdgeLink, GatewayLink
from guestpass_speedups.session import Budget, ErrorCode, TunnelError
from guestpass_speedups.websocket import WebSocket

FOLDER = Path(__file__).parent / "tunnel" / "v1"
RELEASES = {
    path.stem: json.loads(path.read_text("utf-8"))
    for path in sorted(FOLDER.glob("*.json"))
    if path.stem != "rules"
}
RULES: list[dict[str, str]] = json.loads((FOLDER / "rules.json").read_text("utf-8"))["rules"]
ROLES = ("edge", "gateway")


def every_exchange() -> Iterator[Any]:
    for release, recorded in RELEASES.items():
        for exchange in recorded["exchanges"]:
            for role in ROLES:
                yield pytest.param(exchange, role, id=f"{release}-{exchange['name']}-{role}")


def test_there_are_vectors() -> None:
    assert RELEASES
    assert {e["name"] for e in RELEASES["0.1"]["exchanges"]} >= {s.__name__ for s in record.EXCHANGES}
    types = {frame["type"] for e in RELEASES["0.1"]["exchanges"] for frame in e["frames"]}
    assert types == set(model.NAMES), "each type is recorded"


# ── the session ──────────────────────────────────────────────────────────────────────────────────────────────────


class Replay:
    """One end is today's session, the other one is the recording. What the recorded end of our own role said tells
    what our owner asks for; what the session writes may differ, and goes nowhere."""

    def __init__(self, role: str) -> None:
        self.end = End(edge=role == "edge", budget=Budget())
        self.session = self.end.session
        self.session.set_peer_limits(floor=32_768, max_streams=16_384)
        self.streams: dict[int, Any] = {}
        self.handlers: dict[int, Recorder] = {}
        self.now = 0.0

    def run(self, frames: list[dict[str, Any]], role: str) -> None:
        for noted in frames:
            data = bytes.fromhex(noted["hex"])
            (frame,) = model.Splitter().feed(data)
            self.now += 0.01
            if noted["from"] == role:
                self.ask(frame)
            else:
                self.session.receive(data, self.now)
            while self.session.has_output and self.session.fill(65_536, self.now):
                pass

    def stream(self, number: int) -> Any:
        for stream, *_, handler in self.end.owner.opened:
            self.streams[stream.id], self.handlers[stream.id] = stream, handler
        return self.streams[number]

    def ask(self, frame: model.Frame) -> None:
        payload, fin = frame.payload, bool(frame.flags & model.FIN)
        if frame.kind == model.HELLO:
            self.session.send_hello(payload)
        elif frame.kind == model.AUTH:
            self.session.send_auth(payload)
        elif frame.kind == model.INFO:
            self.session.send_info(payload)
        elif frame.kind == model.PING:
            self.session.ping(self.now)
        elif frame.kind == model.GOAWAY:
            self.session.goaway(int.from_bytes(payload[4:], "big"), int.from_bytes(payload[:4], "big"))
        elif frame.kind == model.OPEN or (frame.kind == model.RESET and frame.stream not in self.known()):
            self.open(frame, fin)
        elif frame.kind == model.HEAD:
            head = payload[2 : len(payload) - len(frame.body)]
            self.stream(frame.stream).send_head(head, interim=bool(frame.flags & model.INTERIM))
            if frame.body or fin:
                self.stream(frame.stream).send(frame.body, fin=fin)
        elif frame.kind == model.DATA:
            self.stream(frame.stream).send(payload, fin=fin)
        elif frame.kind == model.TRAILERS:
            self.stream(frame.stream).send_trailers(payload)
        elif frame.kind == model.RESET:
            self.stream(frame.stream).reset(int.from_bytes(payload, "big"))
        elif frame.kind == model.RESET_ACK:
            self.stream(frame.stream).cancelled()
        else:
            assert frame.kind in (model.PONG, model.CREDIT)  # the session's own affair

    def known(self) -> set[int]:
        return {*self.streams, *(stream.id for stream, *_ in self.end.owner.opened)}

    def open(self, frame: model.Frame, fin: bool) -> None:
        burned = frame.kind == model.RESET
        size = 0 if burned else frame.payload[0]
        head = b"" if burned else frame.payload[4 + size : len(frame.payload) - len(frame.body)]
        service = "-" if burned else frame.payload[1 : 1 + size].decode()
        handler = Recorder()
        stream = self.session.open(service, head, handler, fin=fin, body=frame.body)
        assert stream.id == frame.stream
        self.streams[stream.id], self.handlers[stream.id] = stream, handler
        if burned:
            stream.reset(5)


@pytest.mark.parametrize(("exchange", "role"), [*every_exchange()])
def test_recorded_frames(exchange: Mapping[str, Any], role: str) -> None:
    replay = Replay(role)
    replay.run(exchange["frames"], role)
    assert replay.session.failure is None
    assert replay.session.streams == 0, "every recorded exchange ends all its streams"
    assert replay.session.stats()["glitches"] == sum(
        frame["type"] == "GOAWAY" and frame["from"] != role for frame in exchange["frames"]
    )
    theirs = [
        model.Splitter().feed(bytes.fromhex(f["hex"]))[0] for f in exchange["frames"] if f["from"] != role
    ]
    documents = {model.HELLO: "hello", model.AUTH: "auth", model.INFO: "info", model.GOAWAY: "goaway"}
    assert [entry[0] for entry in replay.end.owner.log] == [
        documents[frame.kind] for frame in theirs if frame.kind in documents
    ]
    for stream, _, _, head, _, handler in replay.end.owner.opened:
        (opened,) = (f for f in theirs if f.kind == model.OPEN and f.stream == stream.id)
        assert model.open_payload("dashboards", head, opened.body) == opened.payload
        replay.handlers[stream.id] = handler
    for number, handler in replay.handlers.items():
        own = [frame for frame in theirs if frame.stream == number]
        heads = [f.payload[2 : len(f.payload) - len(f.body)] for f in own if f.kind == model.HEAD]
        resets = [int.from_bytes(f.payload, "big") for f in own if f.kind == model.RESET]
        trailers = [f.payload for f in own if f.kind == model.TRAILERS]
        if handler.reset_code is None and not any(f["type"] == "RESET" for f in exchange["frames"]):
            assert handler.interims + handler.heads == heads
            assert bytes(handler.body) == b"".join(f.body for f in own)
            assert handler.trailers == (trailers[0] if trailers else None)
            assert handler.fin
        assert handler.reset_code == (resets[0] if resets else None)
        assert handler.closed == 1


# ── the handshake ────────────────────────────────────────────────────────────────────────────────────────────────


class Wire(asyncio.Transport):
    """What a link writes, and nothing behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class Owner:
    """Of a link in the middle of nowhere."""

    def __init__(self) -> None:
        self.ready: list[Any] = []
        self.infos: list[Any] = []
        self.ends: list[Any] = []
        self.proofs: list[Proof] = []

    def link_ready(self, link: Any) -> None:
        self.ready.append(link)

    def link_info(self, link: Any, fields: Mapping[str, Any]) -> None:
        self.infos.append(fields)

    def link_ended(self, link: Any, end: Any) -> None:
        self.ends.append(end)

    async def authenticate(self, link: Any, proof: Proof) -> Verdict:
        self.proofs.append(proof)
        return Verdict(True)


async def let_pass() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def edge_link(owner: Owner, recorded: Mapping[str, Any]) -> tuple[EdgeLink, Wire]:
    """Today's edge, which has drawn the recorded nonce."""
    hello = Hello.decode(recorded["edge_hello"].encode(), role="edge")
    link = EdgeLink(
        owner,
        budget=Budget(),
        hello=hello,
        websocket_key=record.WEBSOCKET_KEY,
        certificate=bytes.fromhex(recorded["certificate_hash"]),
    )
    wire = Wire()
    link.connection_made(wire)
    return link, wire


def from_gateway(*payloads: tuple[int, str]) -> bytes:
    return WebSocket(True).wrap(b"".join(model.frame(kind, 0, 0, text.encode()) for kind, text in payloads))


@pytest.mark.parametrize("recorded", RELEASES.values(), ids=RELEASES)
async def test_a_recorded_gateway_is_let_in(recorded: Mapping[str, Any]) -> None:
    said, owner = recorded["handshake"], Owner()
    assert handshake.check_upgrade_request(recorded["upgrade"]["request"].encode()) == record.WEBSOCKET_KEY
    link, wire = edge_link(owner, said)
    hello = from_gateway((model.HELLO, said["gateway_hello"]), (model.AUTH, said["proof"]))
    link.feed(hello + from_gateway((model.INFO, json.dumps(record.INFO_GATEWAY))))
    await let_pass()
    assert owner.ready == [link]
    assert link.peer is not None
    assert (link.peer.site, link.peer.name) == (said["site"], said["name"])
    assert link.peer.services == {"dashboards": True}
    assert wire.written.startswith(b"HTTP/1.1 101 ")
    link.abort()


@pytest.mark.parametrize("recorded", RELEASES.values(), ids=RELEASES)
async def test_a_recorded_edge_is_believed(recorded: Mapping[str, Any]) -> None:
    said, owner = recorded["handshake"], Owner()
    handshake.check_upgrade_response(recorded["upgrade"]["response"].encode(), record.WEBSOCKET_KEY)
    for verdict in (said["accepted"], *said["refused"]):
        link = gateway_link(owner, said)
        server = WebSocket(False)
        answer = handshake.upgrade_response(link._websocket_key)
        link._received(writable(answer), len(answer))
        frames = model.frame(model.HELLO, 0, 0, said["edge_hello"].encode())
        frames += model.frame(model.AUTH, 0, 0, verdict.encode())
        data = server.wrap(frames)
        link._received(writable(data), len(data))
        await let_pass()
        if verdict == said["accepted"]:
            assert owner.ready == [link]
            assert link.edge == "share.example.com"
            link.abort()
        else:
            assert owner.ends[-1].code is ErrorCode.AUTH_FAILED
            assert owner.ends[-1].verdict == Verdict.decode(json.loads(verdict))
    assert len(owner.ready) == 1


def writable(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def gateway_link(owner: Owner, recorded: Mapping[str, Any]) -> GatewayLink:
    async def serve(*arguments: Any) -> None:
        raise AssertionError("nothing is opened")

    link = GatewayLink(
        owner,
        budget=Budget(),
        hello=Hello.decode(recorded["gateway_hello"].encode(), role="gateway"),
        host="share.example.com",
        site=recorded["site"],
        name=recorded["name"],
        key=Ed25519PrivateKey.from_private_bytes(bytes.fromhex(recorded["private_key"])),
        serve=serve,
    )
    link.connection_made(Wire())
    return link


@pytest.mark.parametrize("recorded", RELEASES.values(), ids=RELEASES)
def test_what_is_signed(recorded: Mapping[str, Any]) -> None:
    """Ed25519 is deterministic: the same key over the same text is the same signature, in every implementation."""
    said = recorded["handshake"]
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(said["private_key"]))
    assert key.sign(bytes.fromhex(said["signed"])).hex() == said["signature"]
    edge = Hello.decode(said["edge_hello"].encode(), role="edge")
    gateway = Hello.decode(said["gateway_hello"].encode(), role="gateway")
    proof = Proof.decode(json.loads(said["proof"]))
    assert proof.holds(edge, gateway)
    assert proof.signature.hex() == said["signature"]
    again = Proof.sign(
        key,
        site=said["site"],
        name=said["name"],
        certificate=bytes.fromhex(said["certificate_hash"]),
        edge=edge,
        gateway=gateway,
    )
    assert again == proof


def test_the_proof_of_the_specification() -> None:
    """SPEC.md, 13.: what is signed, and the signature, byte by byte; both are recorded."""
    page = importlib.resources.files("guestpass").joinpath("mux/SPEC.md").read_text(encoding="utf-8")
    _, signed, _, signature, *_ = page.split("*A proof.*")[1].split("```")
    hexadecimal = re.compile(r"(?:[0-9a-f]{2}(?:  ?|$))+", re.MULTILINE)

    def octets(block: str) -> str:
        found = (hexadecimal.match(line.strip()) for line in block.strip().splitlines())
        return bytes.fromhex("".join(match[0] for match in found if match)).hex()

    said = RELEASES["0.1"]["handshake"]
    assert octets(signed) == said["signed"]
    assert octets(signature) == said["signature"]


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rules_are_committed() -> None:
    assert record.rules() == RULES, "run tests/vectors/record.py rules"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule['to']}-{rule['name']}")
def test_rules(rule: dict[str, str]) -> None:
    end = End(edge=rule["to"] == "edge", budget=Budget())
    session, stages = end.session, ("nothing", "hello", "verdict", "open")
    session.set_peer_limits(floor=32_768, max_streams=16_384)
    session.send_hello(b"{}")
    stage = stages.index(rule["after"])
    handler = Recorder(auto=False)
    end.owner.accept = lambda stream: handler
    if stage >= 1:
        session.receive(record.HELLO_GATEWAY if rule["to"] == "edge" else record.HELLO_EDGE, 0.0)
    if stage >= 2:
        if rule["to"] == "edge":
            session.send_auth(b"{}")
        session.receive(model.frame(model.AUTH, 0, 0, b"{}"), 0.0)
    if stage >= 3 and rule["to"] == "edge":
        session.open(record.SERVICE, record.POST, handler)
    elif stage >= 3:
        session.receive(record.OPENED, 0.0)
    session.fill(65_536, 0.0)
    data = bytes.fromhex(rule["hex"])
    if rule["outcome"] == record.LIVES:
        session.receive(data, 0.0)
        assert session.failure is None
        return
    with pytest.raises(TunnelError) as caught:
        session.receive(data, 0.0)
    assert caught.value.code.name == rule["outcome"]
    assert session.fill(65_536, 0.0).endswith(int(caught.value.code).to_bytes(4, "big"))


@pytest.mark.parametrize("version", [1, 2, 99])
def test_unknown_fields_and_higher_versions(version: int) -> None:
    for role, hello in (("edge", record.EDGE), ("gateway", record.GATEWAY)):
        fields = {**json.loads(hello.encode()), "version": version, "later": {"deep": [1, None]}, "": 0}
        found = Hello.decode(json.dumps(fields).encode(), role=role)
        assert (found.version, found.nonce, found.epoch) == (version, hello.nonce, hello.epoch)
    proof = {**json.loads(record.proof().encode()), "later": 5}
    assert Proof.decode(proof).holds(record.EDGE, record.GATEWAY)
    assert Verdict.decode({"step": "verdict", "ok": True, "later": []}) == Verdict(True)
    assert Verdict.decode({"ok": False, "code": "later_code"}).code == "later_code"


async def test_unknown_fields_of_info_and_steps_of_auth() -> None:
    said, owner = RELEASES["0.1"]["handshake"], Owner()
    link, _ = edge_link(owner, said)
    info = json.dumps({**record.INFO_GATEWAY, "later": 1, "services": {"dashboards": {"later": True}}})
    link.feed(from_gateway((model.HELLO, said["gateway_hello"]), (model.AUTH, '{"step":"later","ok":7}')))
    link.feed(from_gateway((model.AUTH, said["proof"]), (model.INFO, info)))
    await let_pass()
    assert owner.ready == [link]
    assert link.peer is not None
    assert link.peer.services == {"dashboards": True}, "healthy is the default"
    link.abort()
