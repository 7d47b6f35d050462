"""Bad input at the edge's tunnel port, and at the gateway from an edge that is none.

Each kind ends its tunnel, and only that, with a coded reason in the log; the process lives, and its memory does not
grow over 10⁵ of them (10³ in the short form).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, cycle
from pathlib import Path

import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from faults.dialers import Crowd
from faults.world import SITE, until
from speedups import model
from speedups.model import AUTH, CREDIT, DATA, GOAWAY, HEAD, HELLO, OPEN, PING, RESET
from support import tunnel
from support.scoreboard import LONG, row
from support.tunnel import TestGateway

from guestpass.gateway import agent as agent_module
from guestpass.mux import handshake
from guestpass.mux.handshake import Hello, Proof
from guestpass_speedups.session import ErrorCode
from guestpass_speedups.websocket import WebSocket

pytestmark = pytest.mark.timeout(600 if LONG else 120)

AT_EDGE = 100_000 if LONG else 1_000
AT_GATEWAY = 10_000 if LONG else 500

# Connections at a time: fewer than the strangers that the edge lets in from one address.
AT_ONCE = 24

# What a process may grow after the first tenth: allocators, caches.
GROWTH = 8 << 20

SECONDS = 20.0


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


# ── at the edge ───────────────────────────────────────────────────────────────────────────────────────────────────


class Bad:
    """A connection to the edge's tunnel port, by hand."""

    def __init__(self, crowd: Crowd, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._crowd = crowd
        self._reader = reader
        self._writer = writer
        self._websocket = WebSocket(client=True)
        self._splitter = model.Splitter()
        self.frames: list[model.Frame] = []
        self.hello = Hello(role="gateway", epoch=time.time_ns())

    @classmethod
    async def call(cls, crowd: Crowd) -> Bad:
        return cls(crowd, *await asyncio.open_connection(crowd.address, crowd.port))

    async def upgrade(self) -> None:
        self.raw(
            handshake.upgrade_request(f"{self._crowd.address}:{self._crowd.port}", "dGhlIHNhbXBsZSBub25jZQ==")
        )
        head = await asyncio.wait_for(self._reader.readuntil(b"\r\n\r\n"), SECONDS)
        assert head.startswith(b"HTTP/1.1 101 "), head

    def raw(self, data: bytes) -> None:
        self._writer.write(data)

    def say(self, *frames: bytes) -> None:
        self._writer.write(self._websocket.wrap(b"".join(frames)))

    async def frame(self, kind: int) -> model.Frame:
        """The next frame of that kind."""
        async with asyncio.timeout(SECONDS):
            while True:
                for frame in self.frames:
                    if frame.kind == kind:
                        self.frames.remove(frame)
                        return frame
                data = await self._reader.read(65536)
                if not data:
                    raise ConnectionResetError("hung up")
                self.frames += self._splitter.feed(self._websocket.feed(data))

    async def prove(self, name: str, key: Ed25519PrivateKey, *, replay: bytes = b"") -> bytes:
        """HELLO and a proof (or `replay`); returns the proof."""
        self.say(model.frame(HELLO, 0, 0, self.hello.encode()))
        edge = Hello.decode((await self.frame(HELLO)).payload, role="edge")
        proof = Proof.sign(key, site=SITE, name=name, certificate=b"", edge=edge, gateway=self.hello).encode()
        self.say(model.frame(AUTH, 0, 0, replay or proof))
        return proof

    async def join(self) -> None:
        """A gateway in good standing, so far."""
        await self.upgrade()
        name, key = next(self._crowd.free)  # type: ignore[attr-defined]
        await self.prove(name, key)
        verdict = await self.frame(AUTH)
        assert b'"ok":true' in verdict.payload, verdict.payload

    async def goaway(self) -> str:
        """Name of the code with which the edge ends the tunnel."""
        frame = await self.frame(GOAWAY)
        return ErrorCode(int.from_bytes(frame.payload[4:8], "big")).name

    def close(self) -> None:
        self._writer.transport.abort()


Kind = Callable[[Bad], Awaitable[None]]
AT_EDGE_KINDS: dict[str, tuple[str, Kind]] = {}
"""What it is → (code with which the tunnel must end, "" if there was none yet; what is sent)."""


def kind(what: str, code: str) -> Callable[[Kind], Kind]:
    def register(function: Kind) -> Kind:
        AT_EDGE_KINDS[what] = (code, function)
        return function

    return register


@kind("garbage instead of a request", "")
async def _(bad: Bad) -> None:
    bad.raw(b"\x16\x03\x01" + bytes(range(200)))


@kind("an upgrade that is none", "")
async def _(bad: Bad) -> None:
    bad.raw(b"GET /.guestpass/tunnel HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n")


@kind("garbage instead of WebSocket frames", "PROTOCOL_ERROR")
async def _(bad: Bad) -> None:
    await bad.upgrade()
    bad.raw(b"\xff" * 300)


@kind("garbage instead of a handshake", "PROTOCOL_ERROR")
async def _(bad: Bad) -> None:
    await bad.upgrade()
    bad.say(b"\xde\xad\xbe\xef" * 50)


@kind("half a frame, then gone", "")
async def _(bad: Bad) -> None:
    await bad.upgrade()
    bad.say(model.frame(HELLO, 0, 0, bad.hello.encode())[:50])
    await bad.frame(HELLO)


@kind("a DATA frame over its limit", "PROTOCOL_ERROR")
async def _(bad: Bad) -> None:
    await bad.join()
    bad.say(struct.pack(">HBBI", 65_535, DATA, 0, 1))


@kind("a HELLO over its limit", "PROTOCOL_ERROR")
async def _(bad: Bad) -> None:
    await bad.upgrade()
    bad.say(struct.pack(">HBBI", 16_385, HELLO, 0, 0))


@kind("credit beyond u64", "PROTOCOL_ERROR")
async def _(bad: Bad) -> None:
    await bad.join()
    bad.say(model.frame(CREDIT, 0, 1, b"\xff" * 9))


@kind("credit for a stream that was never opened", "PROTOCOL_ERROR")
async def _(bad: Bad) -> None:
    await bad.join()
    bad.say(model.frame(CREDIT, 0, 7, b"\xff" * 8))


@kind("a reset of a stream that was never opened", "PROTOCOL_ERROR")
async def _(bad: Bad) -> None:
    await bad.join()
    bad.say(model.frame(RESET, 0, 1, u32(5)))


@kind("a stream that the gateway opens", "PROTOCOL_ERROR")
async def _(bad: Bad) -> None:
    await bad.join()
    bad.say(model.frame(OPEN, 0, 1, model.open_payload("web", b"GET / HTTP/1.1\r\n\r\n", b"")))


@kind("an answer before it was asked", "PROTOCOL_ERROR")
async def _(bad: Bad) -> None:
    await bad.join()
    bad.say(model.frame(HEAD, 0, 1, b"\x00\x13HTTP/1.1 200 OK\r\n\r\n"))


@kind("an answer before it was let in", "PROTOCOL_ERROR")
async def _(bad: Bad) -> None:
    await bad.upgrade()
    bad.say(model.frame(HELLO, 0, 0, bad.hello.encode()), model.frame(DATA, 0, 1, b"x"))


@kind("a flood of PINGs", "LIMIT_EXCEEDED")
async def _(bad: Bad) -> None:
    await bad.join()
    bad.say(*(model.frame(PING, 0, 0, bytes(8)) for _ in range(30)))


@kind("a replayed proof", "AUTH_FAILED")
async def _(bad: Bad) -> None:
    crowd = bad._crowd
    await bad.upgrade()
    await bad.prove(*next(crowd.free), replay=crowd.old_proof)  # type: ignore[attr-defined]


@kind("a key that was removed", "AUTH_FAILED")
async def _(bad: Bad) -> None:
    await bad.upgrade()
    await bad.prove("gw-removed", bad._crowd.removed)  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def crowd_of(folder: Path) -> AsyncIterator[Crowd]:
    """An edge process with a few enrolled keys, one of which is taken away again."""
    crowd = Crowd(folder, AT_ONCE * 2 + 2)
    await crowd.prepare()
    await crowd.start_edge()
    *free, good = crowd.keys.items()
    crowd.free = cycle(free)  # type: ignore[attr-defined]
    crowd.removed = Ed25519PrivateKey.generate()  # type: ignore[attr-defined]
    crowd.keys = dict([good])
    try:
        await crowd.connect()
        bad = await Bad.call(crowd)
        await bad.upgrade()
        crowd.old_proof = await bad.prove(*free[0])  # type: ignore[attr-defined]
        await bad.frame(AUTH)
        bad.close()
        yield crowd
    finally:
        await crowd.close()


async def end_of(crowd: Crowd, what: str) -> str:
    """Do it once; the code with which the edge ended the tunnel."""
    code, send = AT_EDGE_KINDS[what]
    bad = await Bad.call(crowd)
    try:
        await send(bad)
        return await bad.goaway() if code else ""
    finally:
        bad.close()


async def test_bad_gateways(tmp_path: Path) -> None:
    """Every kind once, with what both sides hear of it; then all of them again and again."""
    async with crowd_of(tmp_path) as crowd:
        for what, (code, _) in AT_EDGE_KINDS.items():
            assert await end_of(crowd, what) == code, what
        logged = crowd.edge.output()
        codes = Counter(re.findall(r"tunnel with \S+ ended: ([A-Z_]+):", logged))
        expected = Counter(code for code, _ in AT_EDGE_KINDS.values() if code)
        assert codes == expected, logged
        process = psutil.Process(crowd.edge.process.pid)
        # Those that need a whole handshake first cost the most: one of them for each round of the others.
        cheap = [what for what, (_, send) in AT_EDGE_KINDS.items() if "join" not in send.__code__.co_names]
        dear = cycle([what for what in AT_EDGE_KINDS if what not in cheap])
        kinds = chain.from_iterable((*cheap, next(dear)) for _ in count())
        wrong: Counter[str] = Counter()
        done = 0

        async def work() -> None:
            nonlocal done
            while done < AT_EDGE:
                done += 1
                what = next(kinds)
                try:
                    code = await end_of(crowd, what)
                except (ConnectionError, asyncio.IncompleteReadError):
                    code = "cut off before the code was read"
                if code != AT_EDGE_KINDS[what][0]:
                    wrong[f"{what}: {code}"] += 1
                if done == AT_EDGE // 10:
                    sizes.append(process.memory_info().rss)

        sizes: list[int] = []
        began = time.monotonic()
        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
        took = time.monotonic() - began
        await asyncio.sleep(0.5)
        growth = process.memory_info().rss - sizes[0]
        alive = crowd.edge.process.poll() is None and crowd.ready == 1
        traces = crowd.edge.output().count("Traceback")
        row(
            "bad gateways",
            f"{done} tunnels of {len(AT_EDGE_KINDS)} kinds of bad input at the edge's port, {took:.0f} s",
            f"each ended with its code at both ends ({sum(wrong.values())} otherwise); a good gateway beside them "
            f"{'stayed' if alive else 'WAS LOST'}; memory {growth / 1e6:+.1f} MB after the first tenth",
            f"none otherwise, ≤ {GROWTH >> 20} MiB",
            ok=alive and not wrong and not traces and growth <= GROWTH,
        )


async def test_half_a_handshake_then_silence(tmp_path: Path) -> None:
    """Who falls silent is waited for so long, and no longer."""
    async with crowd_of(tmp_path) as crowd:
        bad, proven = await Bad.call(crowd), await Bad.call(crowd)
        began = time.monotonic()
        await bad.upgrade()
        bad.say(model.frame(HELLO, 0, 0, bad.hello.encode())[:50])
        await proven.join()
        proven.say(model.frame(PING, 0, 0, bytes(8))[:5])
        codes = await asyncio.gather(bad.goaway(), proven.goaway())
        took = time.monotonic() - began
        bad.close()
        proven.close()
        row(
            "half a frame, then silence",
            "a stranger inside HELLO, and a gateway inside a PING",
            f"both ended with {' and '.join(codes)} within {took:.1f} s",
            "TIMEOUT, ≤ 12 s",
            ok=codes == ["TIMEOUT", "TIMEOUT"],
        )


# ── at the gateway ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class FakeEdge:
    """Answers the upgrade, and then says what it likes."""

    websocket: WebSocket
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    splitter: model.Splitter

    def raw(self, data: bytes) -> None:
        self.writer.write(data)

    def say(self, *frames: bytes) -> None:
        self.writer.write(self.websocket.wrap(b"".join(frames)))

    def hello(self, nonce: bytes | None = None) -> bytes:
        more = {} if nonce is None else {"nonce": nonce}
        return model.frame(HELLO, 0, 0, Hello(role="edge", epoch=1, edge="fake", **more).encode())  # type: ignore[arg-type]

    def let_in(self) -> None:
        self.say(self.hello(), model.frame(AUTH, 0, 0, b'{"step":"verdict","ok":true}'))


REQUEST = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
AT_GATEWAY_KINDS: dict[str, tuple[str, Callable[[FakeEdge], None]]] = {
    "garbage instead of WebSocket frames": ("PROTOCOL_ERROR", lambda e: e.raw(b"\xff" * 300)),
    "garbage instead of a handshake": ("PROTOCOL_ERROR", lambda e: e.say(b"\xde\xad\xbe\xef" * 50)),
    "an edge that is a gateway": (
        "PROTOCOL_ERROR",
        lambda e: e.say(model.frame(HELLO, 0, 0, Hello(role="gateway", epoch=1).encode())),
    ),
    "HELLO twice": ("PROTOCOL_ERROR", lambda e: e.say(e.hello(), e.hello())),
    "a request before the verdict": (
        "PROTOCOL_ERROR",
        lambda e: e.say(e.hello(), model.frame(OPEN, 0, 1, model.open_payload("web", REQUEST, b""))),
    ),
    "a DATA frame over its limit": (
        "PROTOCOL_ERROR",
        lambda e: (e.let_in(), e.say(struct.pack(">HBBI", 65_535, DATA, 0, 1)))[0],
    ),
    "credit beyond u64": (
        "PROTOCOL_ERROR",
        lambda e: (e.let_in(), e.say(model.frame(CREDIT, 0, 1, b"\xff" * 9)))[0],
    ),
    "data on a stream that was never opened": (
        "PROTOCOL_ERROR",
        lambda e: (e.let_in(), e.say(model.frame(DATA, 0, 9, b"x")))[0],
    ),
    "a stream id that skips one": (
        "PROTOCOL_ERROR",
        lambda e: (e.let_in(), e.say(model.frame(OPEN, 0, 2, model.open_payload("web", REQUEST, b""))))[0],
    ),
    "more body than credit": (
        "FLOW_CONTROL_ERROR",
        lambda e: (
            e.let_in(),
            e.say(
                model.frame(OPEN, 0, 1, model.open_payload("web", REQUEST, b"")),
                *(model.frame(DATA, 0, 1, bytes(16_368)) for _ in range(3)),
            ),
        )[0],
    ),
    "a flood of PINGs": (
        "LIMIT_EXCEEDED",
        lambda e: (e.let_in(), e.say(*(model.frame(PING, 0, 0, bytes(8)) for _ in range(30))))[0],
    ),
}


@contextlib.asynccontextmanager
async def fake_edge(which: Iterator[str], codes: Counter[str]) -> AsyncIterator[str]:
    """Says one bad thing to each caller and notes with which code the caller ends the tunnel."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            key = re.search(rb"Sec-WebSocket-Key: (\S+)", head)
            assert key is not None
            writer.write(handshake.upgrade_response(key[1].decode()))
            edge = FakeEdge(WebSocket(client=False), reader, writer, model.Splitter())
            what = next(which)
            AT_GATEWAY_KINDS[what][1](edge)
            said: list[model.Frame] = []
            while data := await reader.read(65536):
                said += edge.splitter.feed(edge.websocket.feed(data))
            for frame in said:
                if frame.kind == GOAWAY:
                    codes[f"{what}: {ErrorCode(int.from_bytes(frame.payload[4:8], 'big')).name}"] += 1
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def test_bad_edges(tmp_path: Path) -> None:
    """A gateway that dials something malicious: each tunnel ends with a code, the process and its memory stay."""
    codes: Counter[str] = Counter()
    kinds = cycle(AT_GATEWAY_KINDS)
    gateway = TestGateway()
    sizes: list[int] = []
    process = psutil.Process()
    async with fake_edge(kinds, codes) as url:
        at = tunnel.dial.edge_at(url)
        ended: Counter[str] = Counter()

        async def work(times: int) -> None:
            for _ in range(times):
                _, link = await tunnel.dial.connect(at, lambda: gateway.make(at.authority))
                await asyncio.wait_for(asyncio.shield(link.closed), SECONDS)
                assert link.end is not None
                ended[link.end.code.name] += 1
                gateway.ends.clear()
                gateway.infos.clear()
                gateway.streams.clear()
                if sum(ended.values()) == AT_GATEWAY // 10:
                    sizes.append(process.memory_info().rss)

        began = time.monotonic()
        await asyncio.gather(*(work(AT_GATEWAY // 10) for _ in range(10)))
        took = time.monotonic() - began
        await asyncio.sleep(0.2)
        growth = process.memory_info().rss - sizes[0]
    expected = {f"{what}: {code}" for what, (code, _) in AT_GATEWAY_KINDS.items()}
    total = sum(ended.values())
    assert set(codes) == expected, codes
    row(
        "bad edges",
        f"{total} tunnels of {len(AT_GATEWAY_KINDS)} kinds of bad input at a gateway, {took:.0f} s",
        f"each ended with its code, at both ends ({total - sum(codes.values())} otherwise); memory of both ends "
        f"together {growth / 1e6:+.1f} MB after the first tenth",
        f"none otherwise, ≤ {GROWTH >> 20} MiB",
        ok=sum(codes.values()) == total and growth <= GROWTH,
    )


async def test_a_gateway_logs_the_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent says once what is wrong with the edge, code included, and goes on trying."""
    from guestpass.config import GatewayConfig, parse
    from guestpass.gateway.agent import Agent
    from guestpass.gateway.enroll import load_or_create_key

    monkeypatch.setattr(agent_module, "BACKOFF_FIRST", 0.02)
    monkeypatch.setattr(agent_module, "BACKOFF_MOST", 0.05)
    caplog.set_level(logging.INFO)
    codes: Counter[str] = Counter()
    kinds = cycle(["garbage instead of a handshake"])
    load_or_create_key(tmp_path / "gateway.key")
    async with fake_edge(kinds, codes) as url:
        settings = {
            "gateway": {"name": "gw-1", "site": SITE, "edges": [url], "tunnels": 1, "drain_seconds": 0},
            "services": {},
        }
        agent = Agent(parse(GatewayConfig, settings, tmp_path / "gateway.toml"))
        task = asyncio.create_task(agent.run())
        await until(lambda: sum(codes.values()) >= 5, "several tries")
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    lines = [record.message for record in caplog.records if "PROTOCOL_ERROR" in record.message]
    row(
        "an edge that talks garbage",
        f"{sum(codes.values())} tries of a gateway",
        f"{len(lines)} log line: {lines[0] if lines else '-'}",
        "1 line, with the code",
        ok=len(lines) == 1,
    )
