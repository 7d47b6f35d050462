"""Who is let in as a gateway, and who is not: real connections, with and without TLS."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support import tunnel
from support.tunnel import HEAD, NAME, SERVICE, SITE, TestEdge, TestGateway, until

from guestpass.edge import tunnels as tunnels_module
from guestpass.errors import NoGateway
from guestpass.mux import handshake, link
from guestpass.mux.handshake import Proof, Verdict
from guestpass.mux.link import GatewayLink
from guestpass.mux.stream import StreamReset
from guestpass_speedups.session import ErrorCode, StreamRefused
from guestpass_speedups.websocket import WebSocket


@pytest_asyncio.fixture(params=[False, True], ids=["plain", "tls"])
async def edge(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[TestEdge]:
    async with tunnel.edge(tmp_path, tls=request.param) as made:
        yield made


@pytest_asyncio.fixture
async def gateway(edge: TestEdge) -> AsyncIterator[TestGateway]:
    made = TestGateway()
    edge.enrol(made.key)
    yield made
    await made.close()


async def refusal(edge: TestEdge, gateway: TestGateway) -> Verdict | None:
    """What the edge says to somebody whom it does not let in."""
    made = await gateway.dial(edge)
    await until(lambda: made.end is not None or made.ready, "a verdict")
    assert made.end is not None
    assert made.end.code is ErrorCode.AUTH_FAILED
    assert not edge.tunnels.is_connected(gateway.site, gateway.name)
    return made.end.verdict


# ── proofs ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_enrolled_key_is_let_in(edge: TestEdge, gateway: TestGateway) -> None:
    made = await gateway.join(edge)
    assert made.edge == "test edge"
    assert edge.tunnels.is_connected(SITE, NAME)
    (candidate,) = edge.tunnels.candidates(SITE, SERVICE)
    assert (candidate.site, candidate.name, candidate.healthy) == (SITE, NAME, True)
    assert edge.tunnels.candidates(SITE, "unknown") == []
    assert edge.tunnels.candidates("elsewhere", SERVICE) == []
    assert edge.kinds() == ["gateway.connected"]
    assert edge.touched == [(SITE, NAME)]


async def test_key_that_is_not_enrolled(edge: TestEdge, gateway: TestGateway) -> None:
    stranger = TestGateway()
    verdict = await refusal(edge, stranger)
    assert verdict is not None
    assert verdict.code == "unknown_key"
    assert NAME in verdict.message
    await stranger.close()


async def test_enrolled_key_under_another_name(edge: TestEdge, gateway: TestGateway) -> None:
    for site, name in ((SITE, "plant-2"), ("other-site", NAME)):
        other = TestGateway(key=gateway.key, site=site, name=name)
        verdict = await refusal(edge, other)
        assert verdict is not None
        assert verdict.code == "unknown_key"
        await other.close()


async def test_replayed_proof(edge: TestEdge, gateway: TestGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proof that was seen on the wire is worth nothing: both nonces are part of what it signs."""
    seen: list[Proof] = []
    sign = Proof.sign

    def recording(*args: Any, **more: Any) -> Proof:
        seen.append(sign(*args, **more))
        return seen[-1]

    monkeypatch.setattr(Proof, "sign", recording)
    made = await gateway.join(edge)
    made.abort()
    await until(lambda: not edge.tunnels.is_connected(SITE, NAME), "gone")
    monkeypatch.setattr(Proof, "sign", lambda *args, **more: seen[0])
    verdict = await refusal(edge, gateway)
    assert verdict is not None
    assert verdict.code == "bad_signature"


async def test_every_part_of_the_proof_counts(
    edge: TestEdge, gateway: TestGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = Proof.sign
    other = TestGateway()
    for change in (
        {"site": "x"},
        {"name": "x"},
        {"certificate": b"\1" * 32},
        {"signature": b"\0" * 64},
        {"signature": b""},
        {"key": other.key.public_key().public_bytes_raw()},
        {"key": b"short"},
    ):

        def changed(*args: Any, change: dict[str, Any] = change, **more: Any) -> Proof:
            proof = sign(*args, **more)
            fields = {name: getattr(proof, name) for name in Proof.__slots__} | change
            return Proof(**fields)

        monkeypatch.setattr(Proof, "sign", changed)
        verdict = await refusal(edge, gateway)
        assert verdict is not None
        assert verdict.code == "bad_signature", change


async def test_somebody_between_who_ends_tls(tmp_path: Path) -> None:
    """The gateway's proof names the certificate that it saw; the edge knows its own."""
    async with tunnel.edge(tmp_path, tls=True, binding=b"\1" * 32) as edge:
        gateway = TestGateway()
        edge.enrol(gateway.key)
        verdict = await refusal(edge, gateway)
        assert verdict is not None
        assert verdict.code == "wrong_certificate"
        edge.certificate = None  # switched off by name
        await gateway.join(edge)
        await gateway.close()


async def test_edge_of_another_name(edge: TestEdge, gateway: TestGateway) -> None:
    gateway.edge_name = "my edge"
    assert await refusal(edge, gateway) is None
    (end,) = gateway.ends
    assert "'test edge'" in end.reason
    gateway.edge_name = "test edge"
    await gateway.join(edge)


async def test_keys_that_cannot_be_checked(
    edge: TestEdge, gateway: TestGateway, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken() -> None:
        raise OSError("the store is gone")

    edge.gate = broken
    verdict = await refusal(edge, gateway)
    assert verdict is not None
    assert verdict.code == "unavailable"
    assert "the store is gone" in caplog.text


# ── registrations ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_tunnels_of_one_epoch_live_together(edge: TestEdge, gateway: TestGateway) -> None:
    one = await gateway.join(edge)
    two = await gateway.join(edge)
    (status,) = edge.tunnels.status()
    assert status.tunnels == 2
    streams = [edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=False) for _ in range(4)]
    await until(lambda: len(gateway.streams) == 4, "all streams at the gateway")
    assert [made.session.streams for made in (one, two)] == [2, 2]
    one.abort()
    await until(lambda: edge.tunnels.status()[0].tunnels == 1, "one tunnel is left")
    assert edge.tunnels.is_connected(SITE, NAME)
    assert sorted(stream.reset_code is None for stream in streams) == [False, False, True, True]
    assert edge.kinds() == ["gateway.connected"]


async def test_newer_epoch_evicts_the_older(edge: TestEdge, gateway: TestGateway) -> None:
    """The gateway was restarted, its old connection still looks alive: nobody is told "already in use"."""
    old = [await gateway.join(edge), await gateway.join(edge)]
    stream = edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=False)
    newer = TestGateway(key=gateway.key, epoch=2)
    await newer.join(edge)
    with pytest.raises(StreamReset) as caught:
        await stream.head()
    assert caught.value.code == ErrorCode.REPLACED
    await until(lambda: all(made.end is not None for made in old), "both old tunnels have ended")
    assert {made.goaway for made in old} == {ErrorCode.REPLACED}
    assert edge.tunnels.status()[0].tunnels == 1
    assert edge.kinds() == ["gateway.connected", "gateway.connected"]
    # The older process does not throw the newer one out in its turn.
    verdict_link = await gateway.dial(edge)
    await until(lambda: verdict_link.end is not None, "a verdict")
    assert verdict_link.end is not None
    assert verdict_link.end.verdict is not None
    assert verdict_link.end.verdict.code == "stale_epoch"
    # But it is let in when the newer one is gone: nothing is held against it.
    await newer.close()
    await until(lambda: not edge.tunnels.is_connected(SITE, NAME), "the newer one is gone")
    await gateway.join(edge)


async def test_new_key_replaces_the_old_one(edge: TestEdge, gateway: TestGateway) -> None:
    old = await gateway.join(edge)
    successor = TestGateway(epoch=0)
    edge.enrol(successor.key)
    await successor.join(edge)
    await until(lambda: old.end is not None, "the old key's tunnel has ended")
    await successor.close()


async def test_disconnect_ends_tunnels_and_streams_at_once(edge: TestEdge, gateway: TestGateway) -> None:
    made = await gateway.join(edge)
    streams = [edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=False) for _ in range(3)]
    del edge.keys[SITE, NAME]
    assert edge.tunnels.disconnect(SITE, NAME) == 3
    assert all(stream.closed for stream in streams)
    assert not edge.tunnels.is_connected(SITE, NAME)
    with pytest.raises(NoGateway):
        edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=True)
    await until(lambda: made.end is not None, "the gateway knows")
    assert made.goaway is ErrorCode.AUTH_FAILED
    assert edge.tunnels.disconnect(SITE, NAME) == 0
    await refusal(edge, gateway)


async def test_disconnect_while_the_key_is_being_checked(edge: TestEdge, gateway: TestGateway) -> None:
    """The answer "enrolled" may be older than the removal."""
    checking, go = asyncio.Event(), asyncio.Event()

    async def gate() -> None:
        checking.set()
        await go.wait()

    edge.gate = gate
    made = await gateway.dial(edge)
    await asyncio.wait_for(checking.wait(), 5)
    edge.tunnels.disconnect(SITE, NAME)
    go.set()
    await until(lambda: made.end is not None, "the tunnel has ended")
    assert not made.ready
    assert not edge.tunnels.is_connected(SITE, NAME)


async def test_service_that_is_down_is_no_candidate(edge: TestEdge, gateway: TestGateway) -> None:
    made = await gateway.join(edge)
    info = {**tunnel.INFO, "services": {SERVICE: {"healthy": False}, "other": {"healthy": True}}, "weight": 3}
    made.send_info({**info, "labels": {"zone": "hall"}, "something": "new"})
    await until(lambda: not edge.tunnels.candidates(SITE, SERVICE), "the service is down")
    (other,) = edge.tunnels.candidates(SITE, "other")
    assert (other.weight, other.labels) == (3, {"zone": "hall"})
    assert edge.tunnels.is_connected(SITE, NAME), "it is connected all the same"
    made.send_info(tunnel.INFO)
    await until(lambda: edge.tunnels.candidates(SITE, SERVICE), "the service is up again")
    assert [(e.type, e.detail.get("healthy")) for e in edge.events[1:]] == [
        ("gateway.service", False),
        ("gateway.service", True),
    ]


async def test_no_memory_for_another_stream(edge: TestEdge, gateway: TestGateway) -> None:
    await gateway.join(edge)
    edge.budget.limit = 3 * 32768
    for _ in range(3):
        edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=False)
    with pytest.raises(StreamRefused) as caught:
        edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=False)
    assert caught.value.code is ErrorCode.OVERLOADED


@pytest.mark.parametrize(
    "info",
    [
        [],
        {"services": []},
        {"services": {"dash": 1}},
        {"services": {"dash": {"healthy": "yes"}}},
        {"services": {}, "weight": "heavy"},
        {"services": {}, "weight": -1},
        {"services": {}, "labels": {"a": 1}},
    ],
)
async def test_malformed_info_ends_the_tunnel(edge: TestEdge, gateway: TestGateway, info: Any) -> None:
    made = await gateway.join(edge)
    made.send_info(info)
    await until(lambda: made.end is not None, "the tunnel has ended")
    assert made.goaway is ErrorCode.PROTOCOL_ERROR
    assert not edge.tunnels.is_connected(SITE, NAME)


# ── other than gateways ───────────────────────────────────────────────────────────────────────────────────────────

GOOD = {
    "Host": "edge",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Protocol": "guestpass.v1",
}


class Stranger:
    """A connection to the edge by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.websocket = WebSocket(client=True)

    @classmethod
    async def call(cls, edge: TestEdge) -> Stranger:
        port = int(edge.url.rpartition(":")[2])
        context = ssl.create_default_context(cafile=str(edge.ca)) if edge.ca is not None else None
        return cls(*await asyncio.open_connection("127.0.0.1", port, ssl=context))

    async def upgrade(self, **changes: str | None) -> bytes:
        fields = {
            k: v for k, v in ({**GOOD, **{k.replace("_", "-"): v for k, v in changes.items()}}).items() if v
        }
        lines = ["GET /.guestpass/tunnel HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items()), "", ""]
        self.writer.write("\r\n".join(lines).encode())
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)

    def say(self, frames: bytes) -> None:
        self.writer.write(self.websocket.wrap(frames))

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        try:
            return await asyncio.wait_for(self.reader.read(), 10)
        except (ConnectionError, ssl.SSLError):
            return b""

    async def close(self) -> None:
        self.writer.transport.abort()
        await asyncio.sleep(0)


@pytest_asyncio.fixture
async def stranger(edge: TestEdge) -> AsyncIterator[Stranger]:
    made = await Stranger.call(edge)
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"Upgrade": None}, 426),
        ({"Connection": "close"}, 426),
        ({"Sec_WebSocket_Version": "8"}, 426),
        ({"Sec_WebSocket_Key": None}, 400),
        ({"Sec_WebSocket_Key": "c2hvcnQ="}, 400),
        ({"Sec_WebSocket_Key": "!"}, 400),
        ({"Sec_WebSocket_Protocol": "guestpass.v2"}, 400),
        ({"Content_Length": "5"}, 400),
    ],
)
async def test_handshakes_that_are_none(
    edge: TestEdge, stranger: Stranger, changes: dict[str, str | None], status: int
) -> None:
    head = await stranger.upgrade(**changes)
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert (b"Sec-WebSocket-Version: 13" in head) == (status == 426)
    assert await stranger.rest()
    assert not edge.tunnels._links


async def test_upgrade_is_answered_by_the_book(stranger: Stranger) -> None:
    head = await stranger.upgrade(
        Sec_WebSocket_Protocol="other, guestpass.v1", Connection="keep-alive, Upgrade"
    )
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in head  # RFC 6455 section 1.3
    assert b"\r\nSec-WebSocket-Protocol: guestpass.v1\r\n" in head


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 100,
        b"\xff" * 300,
        b"\x82\x05hello",  # not masked
        b"\x81\x85\0\0\0\0hello",  # text
    ],
)
async def test_garbage_after_the_upgrade(edge: TestEdge, stranger: Stranger, garbage: bytes) -> None:
    await stranger.upgrade()
    stranger.writer.write(garbage)
    await stranger.rest()
    await until(lambda: not edge.tunnels._links, "the tunnel has ended")


def frame(kind: int, payload: bytes, *, stream: int = 0) -> bytes:
    return len(payload).to_bytes(2, "big") + bytes((kind, 0)) + stream.to_bytes(4, "big") + payload


PING, GOAWAY, HELLO, AUTH, INFO = 7, 9, 10, 11, 12
GOOD_HELLO = handshake.Hello(role="gateway", epoch=7).encode()


@pytest.mark.parametrize(
    "frames",
    [
        frame(PING, b"\0" * 8),
        frame(AUTH, b"{}"),
        frame(HELLO, b"not JSON"),
        frame(HELLO, b"[]"),
        frame(HELLO, b"[" * 5000),
        frame(HELLO, b"{}"),
        frame(HELLO, handshake.Hello(role="edge", epoch=7, edge="x").encode()),
        frame(HELLO, GOOD_HELLO.replace(b'"version":1', b'"version":0')),
        frame(HELLO, GOOD_HELLO.replace(b'"7"', b"7")),
        frame(HELLO, GOOD_HELLO.replace(b'"7"', b'"99999999999999999999"')),
        frame(HELLO, GOOD_HELLO.replace(b'"floor":32768', b'"floor":1')),
        frame(HELLO, GOOD_HELLO) * 2,
        frame(HELLO, GOOD_HELLO) + frame(AUTH, b'{"step":"proof"}'),
        frame(HELLO, GOOD_HELLO)
        + frame(AUTH, b'{"step":"proof","site":1,"name":"","key":"","signature":""}'),
        frame(HELLO, GOOD_HELLO) + frame(AUTH, b'{"step":"x"}') * 9,
        frame(HELLO, GOOD_HELLO) + frame(2, b"\0\0", stream=1),
        frame(HELLO, GOOD_HELLO) + frame(0, b"x", stream=1),
    ],
)
async def test_handshakes_that_break_the_rules(edge: TestEdge, stranger: Stranger, frames: bytes) -> None:
    await stranger.upgrade()
    stranger.say(frames)
    said = WebSocket(client=True).feed(await stranger.rest())
    assert said[-14] == GOAWAY
    await until(lambda: not edge.tunnels._links, "the tunnel has ended")
    assert edge.events == []


async def test_streams_are_not_opened_before_the_verdict(edge: TestEdge, stranger: Stranger) -> None:
    await stranger.upgrade()
    stranger.say(frame(HELLO, GOOD_HELLO) + frame(INFO, b'{"services":{"dash":{"healthy":true}}}'))
    await until(lambda: any(made._peer_hello for made in edge.tunnels._links), "HELLO at the edge")
    assert edge.tunnels.candidates(SITE, SERVICE) == []
    with pytest.raises(NoGateway):
        edge.tunnels.open(SITE, NAME, SERVICE, HEAD, fin=True)


async def test_handshake_has_a_deadline(
    edge: TestEdge, stranger: Stranger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "HANDSHAKE_TIMEOUT", 0.05)
    await stranger.upgrade()
    await asyncio.wait_for(stranger.rest(), 5)
    await until(lambda: not edge.tunnels._links, "the tunnel has ended")


async def test_strangers_are_few(
    edge: TestEdge, gateway: TestGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnels_module, "MAX_UNPROVEN_PER_ADDRESS", 2)
    strangers = [await Stranger.call(edge) for _ in range(3)]
    heads = [await stranger.upgrade() for stranger in strangers]
    assert [head.split(b" ")[1] for head in heads] == [b"101", b"101", b"503"]
    assert b"\r\nRetry-After: " in heads[2]
    await strangers[0].close()
    await until(lambda: len(edge.tunnels._unproven) == 1, "one is gone")
    await gateway.join(edge)  # proven ones do not count
    second = await gateway.join(edge)
    assert second.ready
    for stranger in strangers:
        await stranger.close()


async def test_bytes_behind_the_upgrade_request_are_not_lost(edge: TestEdge, gateway: TestGateway) -> None:
    """A client that does not wait for the 101 (no proxy between) may send its HELLO in the same packet."""
    made = await Stranger.call(edge)
    lines = ["GET /.guestpass/tunnel HTTP/1.1", *(f"{k}: {v}" for k, v in GOOD.items()), "", ""]
    made.writer.write("\r\n".join(lines).encode() + made.websocket.wrap(frame(HELLO, GOOD_HELLO)))
    await until(lambda: any(known._peer_hello for known in edge.tunnels._links), "HELLO at the edge")
    await made.close()


async def test_gateway_gives_up_on_other_servers(tmp_path: Path) -> None:
    """What the gateway makes of answers that are no upgrade."""
    answers = [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", 404),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", 101),
        (b"SSH-2.0-OpenSSH\r\n", 0),
        (b"", 0),
    ]

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers[0][0])
        writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", 0)
    fake = TestEdge.__new__(TestEdge)
    fake.url, fake.ca = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None
    while answers:
        gateway = TestGateway()
        made: GatewayLink = await gateway.dial(fake)
        await until(lambda made=made: made.closed.done(), "the connection is closed")  # type: ignore[misc]
        assert made.end is not None
        assert made.end.status == answers[0][1], made.end
        answers.pop(0)
    server.close()
