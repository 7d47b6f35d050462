"""The session by hand: what each call and each frame does. Flow between two ends: test_session_model.py."""

from __future__ import annotations

import contextlib
import gc
import importlib.resources
import re
import struct
import sys
import weakref
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speedups import model, pair
from speedups.model import (
    AUTH,
    CREDIT,
    DATA,
    FIN,
    GOAWAY,
    INFO,
    INTERIM,
    OPEN,
    PING,
    PONG,
    RESET,
    RESET_ACK,
    TRAILERS,
)
from speedups.pair import EXAMPLES, HEAD, OK, Owner, Pair, Recorder, pattern

from guestpass_speedups import session as module
from guestpass_speedups.session import (
    FLOOR,
    HIGH_WATER,
    LOW_WATER,
    MAX_STREAMS,
    MAX_WINDOW,
    START_WINDOW,
    Budget,
    ErrorCode,
    Session,
    Stream,
    StreamRefused,
    TunnelError,
)

SPEC = importlib.resources.files("guestpass").joinpath("mux/SPEC.md").read_text(encoding="utf-8")


def fill(session: Session, now: float = 0.0, limit: int = 1 << 17) -> list[model.Frame]:
    splitter = model.Splitter()
    frames = []
    while session.has_output:
        frames += splitter.feed(session.fill(limit, now))
    assert not splitter.rest
    return frames


def open_frame(
    number: int, flags: int = 0, body: bytes = b"", *, interactive: bool = True, head: bytes = HEAD
) -> bytes:
    return model.frame(OPEN, flags, number, model.open_payload("web", head, body, interactive=interactive))


def head_frame(number: int, flags: int = 0, body: bytes = b"", head: bytes = OK) -> bytes:
    return model.frame(model.HEAD, flags, number, model.head_payload(head, body))


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def fails(session: Session, data: bytes, code: ErrorCode, text: str = ".", now: float = 0.0) -> None:
    """`data` ends the tunnel with `code`, and GOAWAY says so."""
    with pytest.raises(TunnelError, match=text) as caught:
        session.receive(data, now)
    assert caught.value.code is code
    assert caught.value.reason
    assert session.has_output
    last = fill(session)[-1]
    assert last.kind == GOAWAY
    assert struct.unpack(">II", last.payload)[1] == code
    assert not session.has_output
    assert session.failure is not None
    with pytest.raises(TunnelError):
        session.receive(b"", now)


# -- the page and the code ---------------------------------------------------------------------------------------------


def test_state_table_is_the_one_of_the_spec_and_of_the_oracle() -> None:
    ours = {
        (
            state,
            event.replace("SEND_", "sent ")
            .replace("RECV_", "received ")
            .replace("_FIN", "+FIN")
            .replace("BODY", "body"),
        ): after
        for (state, event), after in module.TRANSITIONS.items()
    }
    assert ours == model.TABLE
    rows = re.findall(r"^\| ([A-Z_, ]+) \| ([^|]+) \| ([A-Z_]+) \|$", SPEC, re.MULTILINE)
    said = set()
    for states, events, after in rows:
        for state in states.split(", "):
            for verb in re.findall("send|receive", events):
                kind = (
                    "RESET_ACK"
                    if "RESET_ACK" in events
                    else re.findall("OPEN with FIN|OPEN|FIN|RESET", events)[0]
                )
                verb = "sent" if verb == "send" else "received"
                said.add((state, f"{verb} {kind.replace(' with ', '+')}", after))
                if "RESET that crossed" in events:
                    said.add((state, "received RESET", after))
    changes = {
        (*row, after) for row, after in model.TABLE.items() if "body" not in row[1] and "CREDIT" not in row[1]
    }
    assert said == changes


def test_error_codes_are_the_ones_of_the_spec() -> None:
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|[^|]*\|$", SPEC.split("## 11.")[1], re.MULTILINE)
    assert [(int(code), name) for code, name in rows] == [(code.value, code.name) for code in ErrorCode]


def test_constants() -> None:
    assert (FLOOR, MAX_WINDOW, MAX_STREAMS) == (32 * 1024, 16 * 1024 * 1024, 16_384)
    assert HIGH_WATER > LOW_WATER > 0
    assert Budget().limit == FLOOR * MAX_STREAMS


def test_an_idle_stream_is_small() -> None:
    session, _ = pair.edge()
    assert sys.getsizeof(session.open("web", HEAD, Recorder())) < 600


# -- handshake ---------------------------------------------------------------------------------------------------------


def test_nothing_leaves_before_hello() -> None:
    session = Session(True, Owner(), Budget(), now=0.0)
    session.send_auth(b"a")
    session.ping(0.0)
    assert not session.has_output
    assert session.fill(1000, 0.0) == b""
    session.send_hello(b"h")
    assert [frame.kind for frame in fill(session)] == [model.HELLO, AUTH, PING]
    with pytest.raises(RuntimeError, match="once"):
        session.send_hello(b"h")


@pytest.mark.parametrize(
    "first", [model.frame(PING, 0, 0, bytes(8)), open_frame(1), model.frame(77, 0, 0, b"")]
)
def test_hello_comes_first(first: bytes) -> None:
    fails(Session(False, Owner(), Budget(), now=0.0), first, ErrorCode.PROTOCOL_ERROR, "not HELLO")


def test_goaway_may_come_before_hello() -> None:
    owner = Owner()
    Session(False, owner, Budget(), now=0.0).receive(model.frame(GOAWAY, 0, 0, u32(0) + u32(11)), 0.0)
    assert owner.log == [("goaway", 0, 11)]


def test_hello_once() -> None:
    session, _ = pair.gateway()
    fails(session, pair.hello(), ErrorCode.PROTOCOL_ERROR, "second HELLO")


def test_no_stream_before_the_verdict() -> None:
    session = Session(False, Owner(), Budget(), now=0.0)
    session.receive(pair.hello(verdict=False), 0.0)
    fails(session, open_frame(1), ErrorCode.PROTOCOL_ERROR, "before the verdict")
    edge = Session(True, Owner(), Budget(), now=0.0)
    edge.send_hello(b"{}")
    with pytest.raises(StreamRefused) as caught:
        edge.open("web", HEAD, Recorder())
    assert caught.value.code is ErrorCode.AUTH_FAILED


def test_auth_frames_are_few() -> None:
    session, owner = pair.edge()
    auth = model.frame(AUTH, 0, 0, b"{}")
    session.receive(auth * 8, 0.0)
    assert len(owner.log) == 9
    fails(session, auth, ErrorCode.PROTOCOL_ERROR, "too many AUTH")


def test_limits_of_the_peer() -> None:
    for wrong in (
        {"floor": 1023, "max_streams": 5},
        {"floor": 1 << 31, "max_streams": 5},
        {"floor": 4096, "max_streams": 0},
    ):
        session, _ = pair.edge()
        with pytest.raises(TunnelError):
            session.set_peer_limits(**wrong)
        assert fill(session)[-1].kind == GOAWAY
    session, _ = pair.edge()
    session.set_peer_limits(floor=1024, max_streams=2)
    stream = session.open("web", HEAD, Recorder(), body=bytes(5000))
    assert sum(len(frame.body) for frame in fill(session)) == 1024
    assert stream.queued == 5000 - 1024
    session.open("web", HEAD, Recorder())
    with pytest.raises(StreamRefused) as caught:
        session.open("web", HEAD, Recorder())
    assert caught.value.code is ErrorCode.LIMIT_EXCEEDED


def test_tunnel_error_of_the_owner_is_the_sessions_own() -> None:
    session = Session(True, owner := Owner(), Budget(), now=0.0)

    def refuse(payload: bytes) -> None:
        raise TunnelError(ErrorCode.PROTOCOL_ERROR, "not JSON")

    owner.hello_received = refuse  # type: ignore[method-assign]
    fails(session, pair.hello(edge=False), ErrorCode.PROTOCOL_ERROR, "not JSON")


def test_any_other_error_of_the_owner_ends_the_session_and_goes_up() -> None:
    session = Session(True, owner := Owner(), Budget(), now=0.0)
    owner.hello_received = None  # type: ignore[method-assign,assignment]
    with pytest.raises(TypeError):
        session.receive(pair.hello(edge=False), 0.0)
    assert session.failure is not None
    assert session.failure.code is ErrorCode.INTERNAL_ERROR
    assert [frame.kind for frame in fill(session)] == [GOAWAY]


# -- an exchange -------------------------------------------------------------------------------------------------------


def test_exchange() -> None:
    both = Pair()
    edge, handler, gateway, peer = both.exchange(body=b"question", fin=True)
    assert both.gateway.owner.opened[-1][1:5] == ("web", True, HEAD, False)
    assert bytes(peer.body) == b"question"
    assert peer.fin
    assert (edge.state, gateway.state) == ("HALF_LOCAL", "HALF_REMOTE")
    assert edge.session is both.edge.session
    assert not edge.acknowledged
    gateway.send_head(b"HTTP/1.1 103 Early Hints\r\n\r\n", interim=True)
    gateway.send_head(OK)
    gateway.send(b"ans")
    gateway.send(b"wer")
    frames = [(frame.kind, frame.flags, bytes(frame.body)) for frame in both.to_edge()]
    assert frames == [(model.HEAD, INTERIM, b""), (model.HEAD, 0, b"answer")]
    assert edge.acknowledged
    gateway.send_trailers(b"a: b\r\n\r\n")
    both.shuttle()
    assert handler.interims == [b"HTTP/1.1 103 Early Hints\r\n\r\n"]
    assert handler.heads == [OK]
    assert bytes(handler.body) == b"answer"
    assert handler.trailers == b"a: b\r\n\r\n"
    assert handler.closed == peer.closed == 1
    assert (edge.state, gateway.state) == ("CLOSED", "CLOSED")
    assert edge.handler is None
    assert (edge.bytes_sent, edge.bytes_received) == (8, 6)
    assert both.edge.session.streams == both.gateway.session.streams == 0
    assert both.edge_budget.promised == both.gateway_budget.promised == 0


def test_head_and_whole_body_and_fin_share_a_frame() -> None:
    both = Pair()
    both.open(body=b"x" * 100, fin=True)
    (frame,) = both.to_gateway()
    assert frame.flags == FIN
    assert len(frame.body) == 100
    gateway = both.gateway.owner.opened[-1][0]
    gateway.send_head(OK, fin=True)
    (frame,) = both.to_edge()
    assert (frame.kind, frame.flags, frame.body) == (model.HEAD, FIN, b"")


def test_fin_on_open_is_told_with_the_last_bytes() -> None:
    both = Pair()
    both.exchange(fin=True)
    assert both.gateway.owner.opened[-1][4] is True
    both.exchange(fin=True, body=b"x")
    assert both.gateway.owner.opened[-1][4] is False
    assert both.gateway.owner.opened[-1][5].fin


def test_ids_rise_by_one_in_the_order_of_open() -> None:
    both = Pair()
    streams = [both.open(interactive=number % 2 == 0)[0] for number in range(50)]
    assert [stream.id for stream in streams] == list(range(1, 51))
    assert [frame.stream for frame in both.to_gateway() if frame.kind == OPEN] == list(range(1, 51))
    assert both.gateway.session.last_stream == 50


def test_send_misused() -> None:
    both = Pair()
    edge, _, gateway, _ = both.exchange(fin=True)
    with pytest.raises(RuntimeError, match="ended"):
        edge.send(b"x")
    with pytest.raises(RuntimeError, match="ended"):
        edge.send_trailers(b"\r\n")
    with pytest.raises(RuntimeError, match="edge"):
        edge.send_head(OK)
    with pytest.raises(RuntimeError, match="head comes first"):
        gateway.send(b"x")
    with pytest.raises(RuntimeError, match="head comes first"):
        gateway.send_trailers(b"\r\n")
    with pytest.raises(RuntimeError, match="interim"):
        gateway.send_head(OK, interim=True, fin=True)
    with pytest.raises(ValueError, match="limit"):
        gateway.send_head(bytes(32_769))
    with pytest.raises(TypeError):
        gateway.send("text")  # type: ignore[arg-type]
    gateway.send_head(OK)
    with pytest.raises(RuntimeError, match="already"):
        gateway.send_head(OK)
    with pytest.raises(RuntimeError, match="only the edge"):
        both.gateway.session.open("web", HEAD, Recorder())
    with pytest.raises(ValueError, match="unconsumed"):
        gateway.consume(1)
    with pytest.raises(ValueError, match="negative"):
        gateway.consume(-1)
    assert both.edge.session.streams == 1


@pytest.mark.parametrize("service", ["", "x" * 256, "späti", "a\nb", "a\x7f"])
def test_bad_service_names(service: str) -> None:
    session, _ = pair.edge()
    with pytest.raises(ValueError, match="service name"):
        session.open(service, HEAD, Recorder())
    assert session.streams == 0
    assert session.budget.promised == 0


def test_service_names_with_commas_and_spaces() -> None:
    both = Pair()
    both.edge.session.open("Hall 3, north", HEAD, Recorder())
    both.shuttle()
    assert both.gateway.owner.opened[-1][1] == "Hall 3, north"


def test_heads_up_to_32_kib() -> None:
    both = Pair()
    head = HEAD[:-2] + b"x: " + b"y" * (32_768 - len(HEAD) - 5) + b"\r\n\r\n"
    assert len(head) == 32_768
    both.edge.session.open("web", head, Recorder(), body=b"b" * 40_000, fin=True)
    both.shuttle()
    assert both.gateway.owner.opened[-1][3] == head
    assert len(both.gateway.owner.opened[-1][5].body) == 40_000
    with pytest.raises(ValueError, match="limit"):
        both.edge.session.open("web", head + b"x", Recorder())
    session, _ = pair.gateway()
    fails(session, open_frame(1, head=head + b"x"), ErrorCode.LIMIT_EXCEEDED)
    session, _ = pair.edge()
    session.open("web", HEAD, Recorder())
    fill(session)
    fails(session, head_frame(1, head=head + b"x"), ErrorCode.LIMIT_EXCEEDED)


def test_refused_by_the_owner() -> None:
    both = Pair()
    both.gateway.owner.accept = lambda stream: None
    stream, handler = both.open(body=b"x" * 50_000)
    both.shuttle()
    assert handler.reset_code == ErrorCode.REFUSED
    assert not handler.closed
    stream.cancelled()
    both.shuttle()
    assert handler.closed == 1
    assert both.gateway.session.streams == 0


def test_high_and_low_water() -> None:
    both = Pair()
    edge, handler, _, peer = both.exchange()
    assert edge.send(bytes(HIGH_WATER))
    assert not edge.send(b"x")
    assert edge.queued == HIGH_WATER + 1
    assert handler.writable == 0
    both.shuttle()
    assert handler.writable == 1
    assert edge.queued == 0
    assert len(peer.body) == HIGH_WATER + 1
    assert edge.send(b"x")
    both.shuttle()
    assert handler.writable == 1


def test_many_small_pieces_are_too_much_as_well() -> None:
    both = Pair()
    edge, handler, _, peer = both.exchange()
    for number in range(2048):
        assert edge.send(b"ab"), number
    assert not edge.send(b"ab")
    both.shuttle()
    assert handler.writable == 1
    assert len(peer.body) == 2 * 2049


def test_fill_respects_its_limit() -> None:
    both = Pair()
    for _ in range(3):
        both.exchange()[0].send(bytes(30_000))
    for limit in (1, 100, 600, 5000, 20_000):
        data = both.edge.fill(limit, 0.0)
        assert 0 < len(data) <= max(limit, 8 + 512)
    both.exchange()
    assert both.edge.session.fill(0, 0.0) == b""


def test_fill_into() -> None:
    both = Pair()
    both.exchange()[0].send(pattern(0, 30_000))
    buffer = bytearray(70_000)
    size = both.edge.session.fill_into(buffer, 0.0)
    assert 30_000 < size < 30_100
    both.gateway.session.receive(memoryview(buffer)[:size], 0.0)
    assert bytes(both.gateway.owner.opened[-1][5].body) == pattern(0, 30_000)
    with pytest.raises(ValueError, match="65543"):
        both.edge.session.fill_into(bytearray(65_542), 0.0)
    with pytest.raises(BufferError):
        both.edge.session.fill_into(bytes(70_000), 0.0)  # type: ignore[arg-type]


def test_fill_into_never_passes_the_buffer() -> None:
    both = Pair()
    streams = [both.exchange()[2] for _ in range(9)]
    for stream in streams:
        stream.send_head(OK + bytes(32_768 - len(OK)))
        stream.send(bytes(30_000), fin=True)
    buffer = bytearray(65_543)
    total = 0
    while both.gateway.session.has_output:
        size = both.gateway.session.fill_into(buffer, 0.0)
        assert 0 < size <= len(buffer)
        both.edge.session.receive(buffer[:size], 0.0)
        total += size
    assert total > 9 * 62_768


def test_receive_takes_any_buffer() -> None:
    for kind in (bytes, bytearray, memoryview):
        session, owner = pair.gateway()
        session.receive(kind(open_frame(1, FIN)), 0.0)
        assert len(owner.opened) == 1
    with pytest.raises(TypeError):
        session.receive("text", 0.0)  # type: ignore[arg-type]


def test_output_ready_comes_once_per_drought() -> None:
    both = Pair()
    before = both.edge.owner.wakes
    for _ in range(5):
        both.open()
    assert both.edge.owner.wakes == before + 1
    both.shuttle()
    both.open()
    assert both.edge.owner.wakes == before + 2


def test_calls_from_callbacks() -> None:
    """A relay answers from inside of stream_opened and stream_data; output is announced once, after the buffer."""
    both = Pair()
    seen: list[str] = []

    def accept(stream: Stream) -> Recorder:
        handler = Recorder()

        def react(name: str, stream: Stream) -> None:
            seen.append(name)
            if name == "data":
                stream.send(bytes(handler.body)[-4:], fin=handler.fin)
                with pytest.raises(RuntimeError, match="reentrant"):
                    both.gateway.session.receive(b"", 0.0)

        handler.react = react
        stream.send_head(OK)
        return handler

    both.gateway.owner.accept = accept
    _, handler = both.open(body=b"1234")
    both.shuttle()
    assert bytes(handler.body) == b"1234"
    assert seen == ["data"]


def test_fill_is_not_reentrant() -> None:
    both = Pair()
    _edge, _handler, gateway, _ = both.exchange(fin=True)
    gateway.send_head(OK)
    both.shuttle()
    gateway.send(b"", fin=True)
    caught = []

    def react(name: str, stream: Stream) -> None:
        with pytest.raises(RuntimeError, match="reentrant"):
            both.gateway.session.fill(100, 0.0)
        caught.append(name)

    both.gateway.owner.opened[-1][5].react = react
    both.shuttle()
    assert caught == ["closed"]
    assert not both.gateway.owner.failures


def test_two_sessions_may_fill_inside_each_other() -> None:
    """The scratch buffer is shared by all sessions: what one returned must not change when a callback fills another."""
    first, second = Pair(), Pair()
    _, _, gateway, peer = first.exchange(fin=True)
    gateway.send_head(OK)
    first.shuttle()
    second.exchange()[0].send(b"z" * 1000)
    peer.react = lambda name, stream: second.edge.session.fill(5000, 0.0)
    gateway.send(b"abc", fin=True)
    (frame,) = first.to_edge()
    assert frame.payload == b"abc"


# -- handlers that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["head", "data", "trailers"])
def test_a_handler_that_raises_loses_its_own_stream_only(where: str) -> None:
    both = Pair()
    _, broken, gateway, peer = both.exchange(fin=True)
    _, other, second, _ = both.exchange(fin=True)

    def react(name: str, stream: Stream) -> None:
        if name == where:
            raise ZeroDivisionError

    broken.react = react
    for stream in (gateway, second):
        stream.send_head(OK)
        stream.send(b"body")
        stream.send_trailers(b"\r\n")
    both.to_edge()
    assert [type(exc) for exc in both.edge.owner.failures] == [ZeroDivisionError]
    assert broken.calls == [
        *("head", "data", "trailers")[: ("head", "data", "trailers").index(where) + 1],
        "closed",
    ]
    both.shuttle()
    assert other.closed == peer.closed == 1
    assert bytes(other.body) == b"body"
    assert both.edge.session.streams == both.gateway.session.streams == 0


def test_a_handler_that_raises_in_stream_opened() -> None:
    both = Pair()

    def accept(stream: Stream) -> None:
        raise ZeroDivisionError

    both.gateway.owner.accept = accept
    stream, handler = both.open(body=b"abc", fin=True)
    both.shuttle()
    assert [type(exc) for exc in both.gateway.owner.failures] == [ZeroDivisionError]
    assert handler.reset_code == ErrorCode.INTERNAL_ERROR
    stream.cancelled()
    both.shuttle()
    assert both.gateway.session.streams == 0


def test_a_handler_that_raises_in_stream_reset_still_acknowledges() -> None:
    both = Pair()
    edge, handler, _, peer = both.exchange()

    def react(name: str, stream: Stream) -> None:
        raise ZeroDivisionError

    peer.react = react
    edge.reset(ErrorCode.CANCEL)
    both.shuttle()
    assert handler.closed == 1
    assert both.gateway.session.streams == 0


def test_a_handler_that_raises_in_writable_and_closed() -> None:
    both = Pair()
    edge, handler, _, _ = both.exchange()

    def react(name: str, stream: Stream) -> None:
        raise ZeroDivisionError

    handler.react = react
    edge.send(bytes(HIGH_WATER + 1))
    both.shuttle()
    assert len(both.edge.owner.failures) == 1
    both.gateway.owner.opened[-1][0].cancelled()
    both.shuttle()
    assert len(both.edge.owner.failures) == 2
    assert both.edge.session.streams == 0


def test_a_handler_failed_that_raises_ends_the_session() -> None:
    session, owner = pair.gateway()

    def raising(*args: object) -> None:
        raise ZeroDivisionError

    owner.accept = raising
    owner.handler_failed = raising  # type: ignore[method-assign,assignment]
    with pytest.raises(ZeroDivisionError):
        session.receive(open_frame(1), 0.0)
    assert session.failure is not None
    assert session.failure.code is ErrorCode.INTERNAL_ERROR


def test_keyboard_interrupt_goes_up() -> None:
    session, owner = pair.gateway()

    def accept(stream: Stream) -> None:
        raise KeyboardInterrupt

    owner.accept = accept
    with pytest.raises(KeyboardInterrupt):
        session.receive(open_frame(1), 0.0)
    assert session.failure is not None


# -- RESET -------------------------------------------------------------------------------------------------------------


def test_a_reset_is_acknowledged_when_the_work_has_ended() -> None:
    both = Pair()
    edge, handler, gateway, peer = both.exchange(body=bytes(100))
    edge.reset(ErrorCode.CANCEL)
    edge.reset(ErrorCode.REVOKED)
    assert edge.state == "RESETTING"
    both.shuttle()
    assert peer.reset_code == ErrorCode.CANCEL
    assert gateway.state == "CANCELLING"
    assert both.edge.session.streams == both.gateway.session.streams == 1
    assert handler.closed == peer.closed == 0
    assert both.edge_budget.promised == both.gateway_budget.promised == 0
    assert gateway.send(b"late") is False
    gateway.send_head(OK)
    gateway.cancelled()
    gateway.cancelled()
    both.shuttle()
    assert handler.closed == peer.closed == 1
    assert both.edge.session.streams == both.gateway.session.streams == 0
    assert handler.reset_code is None


def test_reset_after_the_peers_reset_means_cancelled() -> None:
    both = Pair()
    edge, handler, gateway, _ = both.exchange()
    edge.reset(ErrorCode.CANCEL)
    both.shuttle()
    gateway.reset(ErrorCode.INTERNAL_ERROR)
    both.shuttle()
    assert handler.closed == 1


def test_crossed_resets() -> None:
    both = Pair()
    edge, handler, gateway, peer = both.exchange()
    edge.reset(ErrorCode.CANCEL)
    gateway.reset(ErrorCode.BAD_UPSTREAM)
    one, other = both.edge.fill(100, 0.0), both.gateway.fill(100, 0.0)
    both.gateway.session.receive(one, 0.0)
    both.edge.session.receive(other, 0.0)
    assert handler.closed == peer.closed == 1
    assert not both.edge.session.has_output
    assert not both.gateway.session.has_output


def test_the_peers_reset_displaces_one_that_was_not_written_yet() -> None:
    both = Pair()
    edge, handler, gateway, peer = both.exchange()
    gateway.reset(ErrorCode.BAD_UPSTREAM)
    edge.reset(ErrorCode.CANCEL)
    both.to_gateway()
    (frame,) = both.to_edge()
    assert frame.kind == RESET_ACK
    assert handler.closed == peer.closed == 1


def test_reset_that_meets_a_closed_peer_ends_with_its_fin() -> None:
    """RESETTING_FIN: both FINs were sent, so no RESET_ACK will ever come."""
    both = Pair()
    edge, handler, gateway, peer = both.exchange(fin=True)
    gateway.send_head(OK, fin=True)
    answer = both.gateway.fill(1000, 0.0)
    assert peer.closed == 1
    edge.reset(ErrorCode.CANCEL)
    both.to_gateway()
    assert edge.state == "RESETTING_FIN"
    assert not both.gateway.session.has_output
    both.edge.session.receive(answer, 0.0)
    assert handler.closed == 1
    assert both.edge.session.streams == 0
    assert both.gateway.session.stats()["crossed"] == 1
    assert both.gateway.session.stats()["glitches"] == 0


def test_an_id_whose_open_was_not_sent_is_burned() -> None:
    both = Pair()
    first, gone = both.open()
    both.open()
    first.reset(ErrorCode.CANCEL)
    assert not gone.closed
    assert [(frame.kind, frame.stream) for frame in both.to_gateway()] == [(RESET, 1), (OPEN, 2)]
    assert gone.closed == 1
    both.shuttle()
    assert [entry[0].id for entry in both.gateway.owner.opened] == [2]
    assert both.edge.session.streams == both.gateway.session.streams == 1


def test_data_for_a_resetting_stream_is_counted_and_dropped() -> None:
    session, owner = pair.gateway()
    session.receive(open_frame(1), 0.0)
    stream, *_, handler = owner.opened[-1]
    stream.reset(ErrorCode.CANCEL)
    fill(session)
    session.receive(model.frame(DATA, 0, 1, bytes(16_368)), 0.0)
    assert not handler.body
    assert session.stats()["discarded_bytes"] == 16_368
    fails(
        session,
        model.frame(DATA, 0, 1, bytes(16_368)) + model.frame(DATA, 0, 1, bytes(100)),
        ErrorCode.FLOW_CONTROL_ERROR,
    )


# -- what the table forbids --------------------------------------------------------------------------------------------

BAD_AT_GATEWAY = {
    "DATA for a stream never opened": model.frame(DATA, 0, 1, b"x"),
    "CREDIT for a stream never opened": model.frame(CREDIT, 0, 9, u64(99_999)),
    "RESET for a stream never opened": model.frame(RESET, 0, 2, u32(5)),
    "RESET_ACK for a stream never opened": model.frame(RESET_ACK, 0, 1),
    "a gap in the ids": open_frame(2),
    "an id again": open_frame(1) + open_frame(1),
    "HEAD from the edge": open_frame(1) + head_frame(1),
    "DATA after FIN": open_frame(1, FIN) + model.frame(DATA, 0, 1, b"x"),
    "FIN after FIN": open_frame(1, FIN) + model.frame(DATA, FIN, 1),
    "TRAILERS after FIN": open_frame(1, FIN) + model.frame(TRAILERS, 0, 1, b"\r\n"),
    "RESET_ACK without RESET": open_frame(1) + model.frame(RESET_ACK, 0, 1),
    "RESET after RESET": open_frame(1) + model.frame(RESET, 0, 1, u32(5)) * 2,
    "DATA after RESET": open_frame(1) + model.frame(RESET, 0, 1, u32(5)) + model.frame(DATA, 0, 1, b"x"),
    "CREDIT after RESET": open_frame(1)
    + model.frame(RESET, 0, 1, u32(5))
    + model.frame(CREDIT, 0, 1, u64(99_999)),
    "OPEN without a name": model.frame(OPEN, 0, 1, b"\0\1\0\0"),
    "OPEN with a name beyond the payload": model.frame(OPEN, 0, 1, b"\xffabc"),
    "OPEN with a name that fills the payload": model.frame(OPEN, 0, 1, b"\x03abc"),
    "OPEN with a head beyond the payload": model.frame(OPEN, 0, 1, b"\x01a\x01\x00\x05abcd"),
    "OPEN with a name in Latin-1": model.frame(OPEN, 0, 1, b"\x01\xe4\x01\x00\x00"),
    "PING with an id": model.frame(PING, 0, 1, bytes(8)),
    "DATA without an id": model.frame(DATA, 0, 0, b"x"),
    "bit 31": model.frame(99, 0, 1 << 31, b"x"),
    "a long DATA": struct.pack(">HBBI", 16_369, DATA, 0, 1),
    "a short CREDIT": model.frame(CREDIT, 0, 1, bytes(7)),
    "a long HELLO": struct.pack(">HBBI", 16_385, model.HELLO, 0, 0),
}


@pytest.mark.parametrize("what", BAD_AT_GATEWAY)
def test_breaking_a_rule_ends_the_tunnel(what: str) -> None:
    session, _ = pair.gateway()
    fails(session, BAD_AT_GATEWAY[what], ErrorCode.PROTOCOL_ERROR)


BAD_AT_EDGE = {
    "OPEN from the gateway": open_frame(3),
    "DATA before HEAD": model.frame(DATA, 0, 1, b"x"),
    "TRAILERS before HEAD": model.frame(TRAILERS, 0, 1, b"\r\n"),
    "HEAD after HEAD": head_frame(1) + head_frame(1),
    "an interim HEAD after HEAD": head_frame(1) + head_frame(1, INTERIM),
    "an interim HEAD with FIN": head_frame(1, INTERIM | FIN),
    "an interim HEAD with a body": head_frame(1, INTERIM, b"x"),
    "HEAD with a head beyond the payload": model.frame(model.HEAD, 0, 1, b"\0\x05abcd"),
    "RESET of an id whose OPEN is still queued": model.frame(RESET, 0, 2, u32(5)),
    "DATA for an id whose OPEN is still queued": model.frame(DATA, 0, 2, b"x"),
    "CREDIT for an id whose OPEN is still queued": model.frame(CREDIT, 0, 2, u64(99_999)),
    "RESET of the next id": model.frame(RESET, 0, 3, u32(5)),
}


@pytest.mark.parametrize("what", BAD_AT_EDGE)
def test_breaking_a_rule_at_the_edge(what: str) -> None:
    session, _ = pair.edge()
    session.open("web", HEAD, Recorder())
    fill(session)
    session.open("web", HEAD, Recorder())  # id 2 is queued
    fails(session, BAD_AT_EDGE[what], ErrorCode.PROTOCOL_ERROR)


def test_credit_must_grow() -> None:
    session, _ = pair.gateway()
    fails(
        session,
        open_frame(1) + model.frame(CREDIT, 0, 1, u64(FLOOR)),
        ErrorCode.FLOW_CONTROL_ERROR,
        "does not grow",
    )


def test_more_than_credit() -> None:
    session, _ = pair.gateway()
    session.receive(open_frame(1) + model.frame(DATA, 0, 1, bytes(16_368)) * 2, 0.0)
    session, owner = pair.gateway()
    owner.accept = lambda stream: Recorder(auto=False)
    fails(
        session,
        open_frame(1) + model.frame(DATA, 0, 1, bytes(16_368)) * 2 + model.frame(DATA, 0, 1, bytes(33)),
        ErrorCode.FLOW_CONTROL_ERROR,
    )
    session, _ = pair.gateway()
    fails(session, open_frame(1, 0, bytes(FLOOR + 1)), ErrorCode.FLOW_CONTROL_ERROR)


def test_unknown_types_are_skipped() -> None:
    session, owner = pair.gateway()
    unknown = model.frame(200, 255, 12_345, bytes(60_000)) + model.frame(13, 0, 0)
    session.receive(unknown + open_frame(1, 0xFC) + unknown, 0.0)
    assert [entry[0].id for entry in owner.opened] == [1]
    assert session.stats()["frames_in_unknown"] == 4
    assert session.stats()["glitches"] == 0


def test_too_many_interim_heads_reset_the_stream() -> None:
    session, _owner = pair.edge()
    handler = Recorder()
    session.open("web", HEAD, handler)
    fill(session)
    session.receive(head_frame(1, INTERIM) * 40 + head_frame(1, FIN), 0.0)
    assert len(handler.interims) == 32
    assert [(frame.kind, frame.payload) for frame in fill(session)] == [(RESET, u32(ErrorCode.BAD_UPSTREAM))]
    session.receive(model.frame(RESET_ACK, 0, 1), 0.0)
    assert handler.closed == 1
    assert session.failure is None


# -- credit and memory -------------------------------------------------------------------------------------------------


def test_credit_goes_out_for_what_was_consumed() -> None:
    session, owner = pair.gateway()
    owner.accept = lambda stream: Recorder(auto=False)
    session.receive(open_frame(1) + model.frame(DATA, 0, 1, bytes(16_368)), 0.0)
    stream = owner.opened[0][0]
    assert not session.has_output
    stream.consume(FLOOR // 4 - 1)
    assert not session.has_output
    stream.consume(1)
    assert [(frame.kind, frame.payload) for frame in fill(session)] == [(CREDIT, u64(FLOOR + FLOOR // 4))]
    stream.consume(16_368 - FLOOR // 4)
    assert not session.has_output


def test_credit_that_waits_is_dropped_when_fin_comes() -> None:
    session, _owner = pair.gateway()
    session.receive(open_frame(1) + model.frame(DATA, 0, 1, bytes(16_368)), 0.0)
    assert session.has_output
    session.receive(model.frame(DATA, FIN, 1), 0.0)
    assert not session.has_output
    assert session.fill(1000, 0.0) == b""


def test_no_credit_after_fin() -> None:
    session, owner = pair.gateway()
    owner.accept = lambda stream: Recorder(auto=False)
    session.receive(open_frame(1) + model.frame(DATA, FIN, 1, bytes(16_368)), 0.0)
    owner.opened[0][0].consume(16_368)
    assert not session.has_output


class Link:
    """A gateway that has always more to send, an edge that consumes at once, and half a round trip between them."""

    def __init__(self, rtt: float) -> None:
        self.both = Pair()
        self.rtt = rtt
        self.now = 100.0
        self.stream, self.handler, self.gateway, _ = self.both.exchange(fin=True)
        self.gateway.send_head(OK)
        for _ in range(60):
            self.now += 1.0
            self.both.edge.session.ping(self.now)
            self.turn()
        assert self.both.edge.session.rtt == pytest.approx(rtt, rel=0.01)

    def turn(self, consume_after: float = 0.0) -> int:
        """One round trip. How much body came."""
        edge, gateway = self.both.edge.session, self.both.gateway.session
        before = self.stream.bytes_received
        gateway.receive(edge.fill(1 << 17, self.now), self.now + self.rtt / 2)
        self.now += self.rtt
        while gateway.has_output:
            edge.receive(gateway.fill(1 << 17, self.now - self.rtt / 2), self.now)
        self.now += consume_after
        if self.handler.unconsumed:
            self.stream.consume(self.handler.unconsumed)
            self.handler.unconsumed = 0
        return self.stream.bytes_received - before


def test_windows_double_while_they_limit_the_stream() -> None:
    link = Link(0.1)
    while link.gateway.queued < 120 << 20:
        link.gateway.send(bytes(1 << 20))
    rates = [link.turn() for _ in range(14)]
    assert rates[:3] == [FLOOR, FLOOR * 2, FLOOR * 4]
    assert rates[9:] == [MAX_WINDOW] * 5
    assert link.stream.window == MAX_WINDOW
    assert link.both.edge_budget.promised == MAX_WINDOW


@pytest.mark.parametrize(
    ("size", "window"),
    [
        (FLOOR, FLOOR),
        (FLOOR + 1, 2 * FLOOR),  # growth by a byte would be a glitch
        (100_000, 4 * FLOOR),
        (START_WINDOW + 1, START_WINDOW),
        (2**63 - 1, START_WINDOW),
    ],
)
def test_a_body_of_known_size_has_its_window_at_once(size: int, window: int) -> None:
    link = Link(0.1)
    link.handler.auto = False
    while link.gateway.queued < 2 << 20:
        link.gateway.send(bytes(1 << 20))
    assert link.turn(consume_after=1.0) == FLOOR  # too slow for its window to double
    link.stream.expect(size)
    assert link.stream.window == link.both.edge_budget.promised == window
    assert link.turn() == window
    assert link.both.gateway.session.stats()["glitches"] == 0


@pytest.mark.parametrize(("known", "round_trips"), [(False, 6), (True, 2)])
def test_a_download_of_known_size_takes_fewer_round_trips(known: bool, round_trips: int) -> None:
    """1 MiB: 32 KiB and its doubles, or 32 KiB (with the head) and a window that doubles from 512 KiB."""
    link = Link(0.1)
    link.gateway.send(bytes(1 << 20), fin=True)
    turns = 0
    while link.stream.bytes_received < 1 << 20:
        link.turn()
        turns += 1
        if known and turns == 1:
            link.stream.expect(1 << 20)
    assert turns == round_trips


def test_windows_for_known_sizes_leave_most_of_the_budget() -> None:
    link = Link(0.1)
    link.both.edge_budget.limit = 4 * (FLOOR + 4 * FLOOR)
    link.stream.expect(5 * FLOOR)
    assert link.stream.window == 5 * FLOOR
    another, _ = link.both.open()
    another.expect(2 * FLOOR)
    assert another.window == FLOOR


def test_the_window_for_a_known_size_is_given_back() -> None:
    link = Link(0.1)
    link.stream.expect(START_WINDOW)
    link.gateway.send(b"less than promised", fin=True)
    link.turn()
    assert link.both.edge_budget.promised == 0
    another, _ = link.both.open()
    another.expect(START_WINDOW)
    another.reset(ErrorCode.CANCEL)
    another.expect(2 * START_WINDOW)
    assert link.both.edge_budget.promised == 0
    with pytest.raises(ValueError, match="negative"):
        another.expect(-1)


def test_windows_do_not_grow_for_a_slow_reader() -> None:
    link = Link(0.01)
    link.handler.auto = False
    while link.gateway.queued < 2 << 20:
        link.gateway.send(bytes(1 << 20))
    for _ in range(30):
        assert link.turn(consume_after=1.0) == FLOOR
    assert link.stream.window == FLOOR


def test_windows_do_not_grow_by_the_queue_that_they_fill() -> None:
    link = Link(0.01)
    session = link.both.edge.session

    def measure(times: int) -> None:
        for _ in range(times):
            link.now += 1.0
            session.ping(link.now)
            link.turn()

    link.rtt = 0.1  # 90 ms of it are a queue, as far as this end can know
    measure(7)
    assert session.rtt > 0.05
    while link.gateway.queued < 2 << 20:
        link.gateway.send(bytes(1 << 20))
    link.turn()  # a first epoch begins with its first byte, and all came at once
    for _ in range(10):
        link.turn()
    assert link.stream.window == 2 * FLOOR
    measure(1)  # the last 8 say the same: the way has become longer
    link.turn()
    assert link.stream.window > 2 * FLOOR


def test_windows_do_not_grow_into_the_last_quarter_of_the_budget() -> None:
    link = Link(0.1)
    link.both.edge_budget.limit = 16 * FLOOR
    while link.gateway.queued < 10 << 20:
        link.gateway.send(bytes(1 << 20))
    for _ in range(20):
        link.turn()
    assert link.stream.window == 8 * FLOOR
    assert len([link.both.open() for _ in range(8)]) == 8
    with pytest.raises(StreamRefused):
        link.both.open()


def test_windows_do_not_grow_while_what_was_consumed_waits() -> None:
    """A socket takes the first bytes at once, whether anybody reads them or not."""
    link = Link(0.1)
    waits = [1 << 20]
    link.stream.waiting = lambda: waits[0]
    while link.gateway.queued < 10 << 20:
        link.gateway.send(bytes(1 << 20))
    for _ in range(5):
        assert link.turn() == FLOOR
    assert link.stream.window == FLOOR
    waits[0] = 0
    link.turn()
    assert link.stream.window == 2 * FLOOR


def test_windows_grow_out_of_an_allowance_too() -> None:
    link = Link(0.1)
    allowance = Budget(3 * FLOOR)
    link.stream.set_allowance(allowance)
    with pytest.raises(RuntimeError):
        link.stream.set_allowance(allowance)
    while link.gateway.queued < 10 << 20:
        link.gateway.send(bytes(1 << 20))
    for _ in range(20):
        link.turn()
    assert link.stream.window == 4 * FLOOR
    assert allowance.promised == 3 * FLOOR
    link.both.edge_budget.limit = 0  # the budget of all has no more: nothing is taken of the allowance either
    allowance.limit = MAX_WINDOW
    link.turn()
    assert allowance.promised == 3 * FLOOR
    link.stream.reset(ErrorCode.CANCEL)
    assert allowance.promised == 0


def test_budget_is_kept_until_the_last_byte_is_consumed() -> None:
    both = Pair()
    edge, handler, gateway, _ = both.exchange(fin=True)
    assert both.gateway_budget.promised == 0  # its FIN is here: nothing can come
    assert both.edge_budget.promised == FLOOR
    handler.auto = False
    gateway.send_head(OK)
    gateway.send(bytes(5000), fin=True)
    both.shuttle()
    assert handler.closed == 1
    assert both.edge_budget.promised == 5000
    edge.consume(2000)
    assert both.edge_budget.promised == 3000
    del edge
    gc.collect()
    assert both.edge_budget.promised == 0


def test_no_budget_at_the_edge() -> None:
    both = Pair(budget=3 * FLOOR)
    for _ in range(3):
        both.open()
    with pytest.raises(StreamRefused) as caught:
        both.open()
    assert caught.value.code is ErrorCode.OVERLOADED
    assert both.edge.session.streams == 3
    assert "OVERLOADED" in str(caught.value)


def test_no_budget_at_the_gateway() -> None:
    session, owner = pair.gateway(budget=Budget(FLOOR))
    session.receive(open_frame(1) + open_frame(2, 0, b"body") + open_frame(3, FIN), 0.0)
    assert [entry[0].id for entry in owner.opened] == [1, 3]  # 3 has no body and needs no window
    assert [(frame.kind, frame.stream, frame.payload) for frame in fill(session)] == [
        (RESET, 2, u32(ErrorCode.OVERLOADED))
    ]
    session.receive(model.frame(DATA, 0, 2, b"more") + model.frame(RESET_ACK, 0, 2), 0.0)
    assert session.streams == 2


# -- scheduling --------------------------------------------------------------------------------------------------------


def turns(session: Session, limit: int = 1 << 17) -> list[int]:
    """Stream ids in the order of their turns."""
    order: list[int] = []
    for frame in fill(session, limit=limit):
        if frame.kind == DATA and (not order or order[-1] != frame.stream):
            order.append(frame.stream)
    return order


@settings(max_examples=50 * EXAMPLES, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 60_000), min_size=1, max_size=4), min_size=2, max_size=8),
    interactive=st.booleans(),
    limit=st.sampled_from((1000, 16_384, 100_000)),
)
def test_no_ready_stream_is_skipped_for_a_round(
    sizes: list[list[int]], interactive: bool, limit: int
) -> None:
    session, _ = pair.edge()
    session.set_peer_limits(floor=1 << 20, max_streams=100)
    streams = [session.open("web", HEAD, Recorder(), interactive=interactive) for _ in sizes]
    fill(session)
    left = {}
    for stream, chunks in zip(streams, sizes, strict=True):
        for chunk in chunks:
            stream.send(bytes(chunk))
        left[stream.id] = sum(chunks)
    waiting: dict[int, set[int]] = {}
    for frame in fill(session, limit=limit):
        # Within one class: between two turns of one stream every other that has something had its own.
        assert not waiting.get(frame.stream, set()) & {number for number, size in left.items() if size}
        left[frame.stream] -= len(frame.payload)
        for number in waiting:
            waiting[number].discard(frame.stream)
        if not interactive:
            waiting[frame.stream] = {
                number for number, size in left.items() if size and number != frame.stream
            }
    assert not any(left.values())


def test_interactive_goes_first_and_bulk_does_not_starve() -> None:
    session, _ = pair.edge()
    session.set_peer_limits(floor=1 << 24, max_streams=100)
    bulk = session.open("web", HEAD, Recorder(), interactive=False)
    small = [session.open("web", HEAD, Recorder()) for _ in range(40)]
    fill(session)
    bulk.send(bytes(100 * 16_368))
    for stream in small:
        stream.send(bytes(4 * 16_368 - 1000))
    order = turns(session)
    ahead = order.index(bulk.id)
    assert 8 <= ahead <= 9
    runs = "".join("b" if number == bulk.id else "i" for number in order)
    assert "i" * 10 not in runs[:100]


def test_an_interactive_stream_becomes_bulk_and_recovers() -> None:
    session, _ = pair.edge()
    session.set_peer_limits(floor=1 << 24, max_streams=100)
    chart = session.open("web", HEAD, Recorder())
    bulk = session.open("web", HEAD, Recorder(), interactive=False)
    fill(session)
    chart.send(bytes(70_000))
    fill(session)
    bulk.send(bytes(50_000))
    chart.send(b"tick")
    assert turns(session)[0] == bulk.id
    session.tick(2.0)
    bulk.send(bytes(50_000))
    chart.send(b"tick")
    assert turns(session)[0] == chart.id


def test_control_goes_before_bodies() -> None:
    both = Pair()
    edge, _, gateway, _ = both.exchange()
    _, _, other, _ = both.exchange()
    gateway.send_head(OK)
    gateway.send(bytes(30_000))
    other.reset(ErrorCode.BAD_UPSTREAM)
    both.gateway.session.ping(0.0)
    edge.send(bytes(9000))
    both.to_gateway()
    assert [frame.kind for frame in both.to_edge()] == [PING, RESET, CREDIT, model.HEAD, DATA]


def test_pieces_are_merged_into_full_frames() -> None:
    both = Pair()
    edge, *_ = both.exchange()
    for _ in range(400):
        edge.send(b"0123456789")
    (frame,) = both.to_gateway()
    assert frame.payload == b"0123456789" * 400


# -- INFO, PING, tick --------------------------------------------------------------------------------------------------


def test_info_is_paced_and_the_newest_counts() -> None:
    both = Pair()
    for number in range(50):
        both.gateway.session.send_info(b"%d" % number)
        both.shuttle()
    infos = [entry[1] for entry in both.edge.owner.log if entry[0] == "info"]
    assert infos == [b"%d" % number for number in range(10)]
    assert not both.gateway.session.has_output
    both.now = 1.0
    wakes = both.gateway.owner.wakes
    both.gateway.session.tick(1.0)
    assert both.gateway.owner.wakes == wakes + 1
    both.shuttle()
    assert both.edge.owner.log[-1] == ("info", b"49")


def test_ping_measures_from_the_write_and_smooths() -> None:
    both = Pair()
    session = both.edge.session
    session.ping(1.0)
    ping = session.fill(1000, 2.0)
    both.gateway.session.receive(ping, 2.5)
    session.receive(both.gateway.session.fill(1000, 2.5), 3.0)
    assert both.edge.owner.rtts[-1] == pytest.approx(1.0)
    assert session.rtt is not None
    assert session.rtt == pytest.approx(1e-6 + 0.125, abs=1e-4)


def test_pings_are_paced() -> None:
    both = Pair()
    for _ in range(100):
        both.edge.session.ping(0.0)
        both.shuttle()
    assert both.gateway.session.stats()["frames_in_ping"] == 10


def test_only_the_newest_ping_is_answered() -> None:
    session, _ = pair.gateway()
    session.receive(model.frame(PING, 0, 0, u64(1)) + model.frame(PING, 0, 0, u64(2)), 0.0)
    assert [(frame.kind, frame.payload) for frame in fill(session)] == [(PONG, u64(2))]


def test_a_pong_that_nobody_asked_for_is_a_glitch() -> None:
    session, _ = pair.gateway()
    session.receive(model.frame(PONG, 0, 0, u64(99)), 0.0)
    assert session.stats()["glitches"] == 1


def test_liveness() -> None:
    both = Pair()
    session = both.edge.session
    for now in (1.0, 2.0):
        session.tick(now)
        assert not session.has_output
    session.tick(3.0)
    assert [frame.kind for frame in fill(session, 3.0)] == [PING]
    for now in (4.0, 5.0):
        session.tick(now)
        assert not session.has_output
    with pytest.raises(TunnelError) as caught:
        session.tick(6.0)
    assert caught.value.code is ErrorCode.TIMEOUT
    assert [frame.kind for frame in fill(session, 6.0)] == [GOAWAY]
    session.tick(7.0)


def test_a_process_that_slept_does_not_blame_the_peer() -> None:
    session = Pair().edge.session
    session.tick(1.0)
    session.tick(500.0)
    assert [frame.kind for frame in fill(session, 500.0)] == [PING]
    for now in range(501, 506):
        session.tick(float(now))
    with pytest.raises(TunnelError):
        session.tick(506.0)


def test_rtt_is_measured_while_streams_are_live() -> None:
    both = Pair()
    both.exchange()
    pings = both.edge.session.stats()["frames_out_ping"]
    for now in range(1, 31):
        both.now = float(now)
        both.edge.session.receive(model.frame(99, 0, 0), both.now)  # never idle
        both.edge.session.tick(both.now)
        both.to_gateway()
        both.to_edge()
    assert both.edge.session.stats()["frames_out_ping"] - pings == 10


# -- drain and end -----------------------------------------------------------------------------------------------------


def test_drain() -> None:
    both = Pair()
    _edge, handler, gateway, _ = both.exchange(fin=True)
    _late, orphan = both.open()
    both.gateway.session.goaway(ErrorCode.DRAINING, 2**30 - 1)
    both.to_edge()
    assert both.edge.owner.log[-1] == ("goaway", 2**30 - 1, ErrorCode.DRAINING)
    assert both.edge.session.draining
    with pytest.raises(StreamRefused) as caught:
        both.open()
    assert caught.value.code is ErrorCode.DRAINING
    both.to_gateway()
    assert len(both.gateway.owner.opened) == 2  # OPEN was under way
    both.gateway.session.goaway(ErrorCode.DRAINING)
    both.shuttle()
    assert both.edge.owner.log[-1] == ("goaway", 2, ErrorCode.DRAINING)
    assert not orphan.closed
    gateway.send_head(OK, fin=True)
    both.shuttle()
    assert handler.closed == 1


def test_streams_above_the_last_one_are_ended_at_once() -> None:
    both = Pair()
    both.exchange()
    second, orphan = both.open(body=bytes(5000))
    third, queued = both.open()
    both.gateway.session.goaway(ErrorCode.DRAINING)
    data = both.edge.fill(1000, 0.0)
    both.to_edge()
    for handler in (orphan, queued):
        assert handler.reset_code == ErrorCode.DRAINING
        assert handler.closed == 1
    assert not second.acknowledged
    assert (second.state, third.state) == ("CLOSED", "CLOSED")
    both.gateway.session.receive(data, 0.0)
    both.shuttle()
    assert len(both.gateway.owner.opened) == 1
    assert both.gateway.session.stats()["glitches"] == 0
    assert both.edge.session.streams == 1


def test_goaway_may_not_rise() -> None:
    session, _ = pair.edge()
    session.receive(model.frame(GOAWAY, 0, 0, u32(5) + u32(13)), 0.0)
    fails(session, model.frame(GOAWAY, 0, 0, u32(6) + u32(13)), ErrorCode.PROTOCOL_ERROR, "raises")


def test_abort() -> None:
    both = Pair()
    plain, cancelling, resetting = (both.exchange() for _ in range(3))
    cancelling[2].reset(ErrorCode.BAD_UPSTREAM)
    both.shuttle()
    resetting[0].reset(ErrorCode.CANCEL)
    both.edge.session.abort(ErrorCode.UNREACHABLE)
    both.edge.session.abort(ErrorCode.UNREACHABLE)
    assert plain[1].calls == ["reset", "closed"]
    assert plain[1].reset_code == ErrorCode.UNREACHABLE
    assert cancelling[1].calls == ["reset", "closed"]
    assert cancelling[1].reset_code == ErrorCode.BAD_UPSTREAM
    assert resetting[1].calls == ["closed"]
    assert both.edge.session.streams == 0
    assert both.edge_budget.promised == 0
    assert not both.edge.session.has_output
    assert both.edge.session.fill(1000, 0.0) == b""
    both.edge.session.receive(b"anything", 0.0)
    assert plain[0].send(b"x") is False
    plain[0].cancelled()
    plain[0].reset(0)
    with pytest.raises(StreamRefused):
        both.open()


def test_abort_from_a_callback() -> None:
    both = Pair()
    _, handler, gateway, _ = both.exchange()
    _, other, second, _ = both.exchange()
    handler.react = lambda name, stream: (
        both.edge.session.abort(ErrorCode.UNREACHABLE) if name == "data" else None
    )
    for stream in (gateway, second):
        stream.send_head(OK)
        stream.send(b"x", fin=True)
    both.to_edge()
    assert handler.closed == other.closed == 1
    assert not other.body


def test_stream_ids_run_out() -> None:
    both = Pair()
    assert not both.edge.session.retiring
    for end in (both.edge, both.gateway):
        end.session._start_ids_at(2**30 - 3)
    assert both.edge.session.retiring
    for _ in range(2):
        _, handler, gateway, _ = both.exchange(fin=True)
        gateway.send_head(OK, fin=True)
        both.shuttle()
        assert handler.closed == 1
    assert both.gateway.session.last_stream == 2**30 - 1
    with pytest.raises(StreamRefused) as caught:
        both.open()
    assert caught.value.code is ErrorCode.DRAINING
    fails(both.gateway.session, open_frame(2**30), ErrorCode.PROTOCOL_ERROR)


# -- memory of the process ---------------------------------------------------------------------------------------------


def test_a_dropped_session_does_not_leak() -> None:
    both = Pair()
    edge, handler, gateway, peer = both.exchange(body=bytes(100_000))
    watched = [weakref.ref(thing) for thing in (handler, peer, both.edge.owner, both.gateway.owner)]
    handler.keep = edge
    edge.context = handler
    budget = both.edge_budget
    assert budget.promised
    del both, edge, handler, gateway, peer
    gc.collect()
    assert [ref() for ref in watched] == [None] * 4
    assert budget.promised == 0


def test_a_closed_stream_and_its_handler_are_freed_without_gc() -> None:
    gc.disable()
    try:
        both = Pair()
        edge, handler, gateway, _ = both.exchange(fin=True)
        handler.keep = edge
        gateway.send_head(OK, fin=True)
        both.shuttle()
        watched = weakref.ref(handler)
        both.gateway.owner.opened.clear()
        del edge, handler, gateway, _
        assert watched() is None
    finally:
        gc.enable()


def test_aborting_unlinks_without_gc() -> None:
    gc.disable()
    try:
        both = Pair()
        edge, handler, _, _ = both.exchange()
        both.edge.owner.session = both.edge.session  # type: ignore[attr-defined]
        watched = [weakref.ref(handler), weakref.ref(both.edge.owner)]
        both.edge.session.abort(0)
        both.gateway.owner.opened.clear()
        del both, edge, handler, _
        assert [ref() for ref in watched] == [None, None]
    finally:
        gc.enable()


def test_many_streams_do_not_grow_memory() -> None:
    import tracemalloc

    both = Pair()

    def round_trips(count: int) -> None:
        for _ in range(count):
            _, _, gateway, _ = both.exchange(body=b"x" * 200, fin=True)
            gateway.send_head(OK)
            gateway.send(b"y" * 200, fin=True)
            both.shuttle()
            both.gateway.owner.opened.clear()

    round_trips(200)
    tracemalloc.start()
    try:
        round_trips(50)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        round_trips(500)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 20_000


def test_the_table_of_streams_survives_long_lived_ones() -> None:
    """Ids wrap around the table many times while some stay: deletion must not lose those behind a hole."""
    session, owner = pair.gateway()
    keep: dict[int, Any] = {}
    for number in range(1, 3000):
        session.receive(open_frame(number, FIN), 0.0)
        stream = owner.opened.pop()[0]
        if number % 37 == 0:
            keep[number] = stream
        else:
            stream.send_head(OK, fin=True)
            session.fill(1 << 17, 0.0)
    assert session.streams == len(keep)
    for number, stream in keep.items():
        session.receive(model.frame(RESET, 0, number, u32(5)), 0.0)
        assert stream.state == "CANCELLING"
        stream.cancelled()
    fill(session)
    assert session.streams == 0


def test_streams_are_found_whatever_shares_their_place_in_the_table() -> None:
    """Few live streams, ids far apart: they collide in the small table; a removal may leave a hole before others."""
    session, owner = pair.gateway()
    random = Random(7)
    live: dict[int, Stream] = {}
    credit: dict[int, int] = {}
    for number in range(1, 4000):
        session.receive(open_frame(number, FIN), 0.0)
        stream = owner.opened.pop()[0]
        if number % 64 in (1, 2, 3, 63) and len(live) < 28:
            live[number], credit[number] = stream, FLOOR
        else:
            stream.send_head(OK, fin=True)
        while len(live) > random.randrange(30):
            live.pop(random.choice(list(live))).send_head(OK, fin=True)
        fill(session)
        assert session.streams == len(live)
        for other in live:
            credit[other] += FLOOR
            session.receive(model.frame(CREDIT, 0, other, u64(credit[other])), 0.0)
        assert session.stats()["crossed"] == 0
    assert all(stream.credit == credit[number] for number, stream in live.items())


# -- garbage -----------------------------------------------------------------------------------------------------------


def script() -> bytes:
    """Frames of every type that a gateway may get, in an order that is allowed."""
    return b"".join(
        (
            pair.hello(),
            model.frame(INFO, 0, 0, b"{}"),
            model.frame(PING, 0, 0, u64(7)),
            open_frame(1, 0, b"abc"),
            open_frame(2, FIN),
            model.frame(DATA, 0, 1, bytes(300)),
            model.frame(250, 0, 3, bytes(20)),
            model.frame(CREDIT, 0, 2, u64(100_000)),
            model.frame(RESET, 0, 2, u32(5)),
            model.frame(TRAILERS, 0, 1, b"a: b\r\n\r\n"),
            model.frame(RESET, 0, 3, u32(5)),
            model.frame(GOAWAY, 0, 0, u32(3) + u32(13)),
        )
    )


def observe(pieces: list[bytes]) -> list[Any]:
    owner = Owner()
    session = Session(False, owner, Budget(), now=0.0)
    session.send_hello(b"{}")
    for piece in pieces:
        session.receive(piece, 0.0)
    handlers = [
        (entry[0].id, entry[1:5], bytes(entry[5].body), entry[5].reset_code) for entry in owner.opened
    ]
    return [owner.log, handlers, session.stats()["glitches"], session.fill(1 << 17, 0.0)]


def test_every_split_point_gives_the_same() -> None:
    data = script()
    expected = observe([data])
    assert expected[1][0][2] == b"abc" + bytes(300)
    for at in range(len(data) + 1):
        assert observe([data[:at], data[at:]]) == expected
    assert observe([data[at : at + 1] for at in range(len(data))]) == expected


@settings(max_examples=300 * EXAMPLES, deadline=None)
@given(data=st.data())
def test_garbage_ends_in_tunnel_error_or_in_nothing(data: st.DataObject) -> None:
    """Mutated scripts, cut anywhere: no other exception, and no state that `fill` or `abort` stumbles over."""
    stream = bytearray(script())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(stream) - 1))
        action = data.draw(st.sampled_from(("set", "cut", "double", "insert")))
        if action == "set":
            stream[at] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del stream[at : at + data.draw(st.integers(1, 20))]
        elif action == "double":
            stream[at:at] = stream[at : at + 40]
        else:
            stream[at:at] = data.draw(st.binary(max_size=30))
        if not stream:
            break
    owner = Owner()
    session = Session(False, owner, Budget(), now=0.0)
    session.send_hello(b"{}")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=3)))
    try:
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            session.receive(bytes(stream[start:end]), 0.0)
    except TunnelError:
        assert fill(session)[-1].kind == GOAWAY
        assert session.failure is not None
        assert session.failure.reason
    assert not owner.failures
    fill(session)
    session.abort(ErrorCode.UNREACHABLE)
    assert session.streams == 0
    assert session.budget.promised == 0


@settings(max_examples=200 * EXAMPLES, deadline=None)
@given(garbage=st.binary(max_size=300), edge=st.booleans())
def test_pure_noise(garbage: bytes, edge: bool) -> None:
    session, _ = pair.edge() if edge else pair.gateway()
    with contextlib.suppress(TunnelError):
        session.receive(garbage, 0.0)
    session.fill(1 << 17, 0.0)


def test_a_header_alone_costs_no_memory() -> None:
    """64 KiB are promised by the header; what is held grows with what came."""
    import tracemalloc

    sessions = [pair.gateway()[0] for _ in range(50)]
    header = struct.pack(">HBBI", 65_535, INFO, 0, 0)
    tracemalloc.start()
    try:
        for session in sessions:
            session.receive(header + bytes(10), 0.0)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 50 * 200


def test_a_handler_that_aborts_the_session_and_then_raises() -> None:
    both = Pair()
    _, handler, gateway, _ = both.exchange()

    def react(name: str, stream: Stream) -> None:
        if name == "data":
            both.edge.session.abort(ErrorCode.UNREACHABLE)
            both.edge.session.abort(ErrorCode.UNREACHABLE)
            raise ZeroDivisionError

    handler.react = react
    gateway.send_head(OK)
    gateway.send(b"x")
    both.to_edge()
    assert handler.closed == 1


def test_a_session_that_is_aborted_in_stream_opened() -> None:
    both = Pair()
    handler = Recorder()

    def accept(stream: Stream) -> Recorder:
        both.gateway.session.abort(ErrorCode.UNREACHABLE)
        return handler

    both.gateway.owner.accept = accept
    both.open(body=b"x")
    both.to_gateway()
    assert handler.calls == ["closed"]
    assert both.gateway_budget.promised == 0


def test_streams_made_by_hand_are_harmless() -> None:
    stream = Stream()
    assert stream.send(b"x") is False
    stream.consume(0)
    stream.cancelled()
    stream.reset(0)
    assert stream.state == "IDLE"


def test_the_table_of_streams_shrinks_again() -> None:
    session, owner = pair.gateway()
    session.receive(b"".join(open_frame(number, FIN) for number in range(1, 5001)), 0.0)
    for stream, *_ in owner.opened:
        stream.send_head(OK, fin=True)
    fill(session)
    assert session.streams == 0
    session.receive(open_frame(5001, FIN), 0.0)
    assert session.streams == 1
