"""RFC 6455 framing: what is accepted, what is refused, and that cuts make no difference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestpass_speedups.session import Budget, Session
from guestpass_speedups.websocket import (
    NORMAL,
    PROTOCOL_ERROR,
    UNSUPPORTED_DATA,
    WebSocket,
    WebSocketError,
)

KEY = b"\x37\xfa\x21\x3d"


def masked(data: bytes, key: bytes = KEY) -> bytes:
    return bytes(byte ^ key[i % 4] for i, byte in enumerate(data))


def frame(first: int, payload: bytes, *, mask: bool, form: int | None = None) -> bytes:
    """`form`: bytes of the extended length, if not the shortest."""
    size = len(payload)
    form = (0 if size < 126 else 2 if size < 65536 else 8) if form is None else form
    short = size if form == 0 else 126 if form == 2 else 127
    length = bytes([short | (0x80 if mask else 0)]) + (size.to_bytes(form, "big") if form else b"")
    return bytes([first]) + length + (KEY + masked(payload) if mask else payload)


def test_examples_of_the_rfc() -> None:
    """Section 5.7, with binary in place of text."""
    server, client = WebSocket(False), WebSocket(True)
    assert server.feed(bytes.fromhex("8285 37fa213d 7f9f4d5158")) == b"Hello"
    assert client.feed(bytes.fromhex("8205 48656c6c6f")) == b"Hello"
    assert client.feed(bytes.fromhex("0203 48656c")) + client.feed(bytes.fromhex("8002 6c6f")) == b"Hello"
    client.feed(bytes.fromhex("8905 48656c6c6f"))
    assert server.feed(client.take_replies()) == b"", "a masked pong"
    assert client.feed(bytes.fromhex("827E0100") + bytes(256)) == bytes(256)
    assert client.feed(bytes.fromhex("827F0000000000010000") + bytes(65536)) == bytes(65536)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 125, 126, 127, 128, 65535, 65536, 131072])
@pytest.mark.parametrize("client", [True, False])
def test_wrap_and_feed(size: int, client: bool) -> None:
    here, there = WebSocket(client), WebSocket(not client)
    payload = bytes(i % 253 for i in range(size))
    for given_as in (payload, bytearray(payload), memoryview(payload)):
        message = here.wrap(given_as)
        assert len(message) == size + (2 if size < 126 else 4 if size < 65536 else 10) + (4 if client else 0)
        assert there.feed(message) == payload


@pytest.mark.parametrize("client", [False, True])
def test_what_a_session_has_to_send_is_wrapped(client: bool) -> None:
    sessions = [Session(not client, None, Budget(), now=0.0) for _ in range(2)]
    here, there = WebSocket(client), WebSocket(not client)
    assert here.wrap_output(sessions[0], 1 << 17, 0.0) == b""
    for session in sessions:
        session.send_hello(b'{"version":1}')
        session.goaway(0)
    message = here.wrap_output(sessions[0], 1 << 17, 0.0)
    assert there.feed(message) == sessions[1].fill(1 << 17, 0.0)
    assert sessions[0].bytes_out == sessions[1].bytes_out > 0
    assert here.wrap_output(sessions[0], 1 << 17, 0.0) == b""


def test_masking_keys_are_fresh() -> None:
    client = WebSocket(True)
    messages = [client.wrap(b"\0" * 8) for _ in range(3000)]  # beyond one draw of random bytes
    assert len({message[2:6] for message in messages}) > 2990
    assert all(message[6:] == message[2:6] * 2 for message in messages)


@given(
    st.lists(
        st.tuples(st.sampled_from(["whole", "pieces", "ping", "pong"]), st.binary(max_size=300)),
        max_size=8,
    ),
    st.booleans(),
    st.lists(st.integers(1, 40), max_size=60),
    st.booleans(),
)
def test_cuts_make_no_difference(
    messages: list[tuple[str, bytes]], mask: bool, cuts: list[int], in_place: bool
) -> None:
    wire, expected = b"", b""
    for kind, payload in messages:
        if kind == "whole":
            wire += frame(0x82, payload, mask=mask)
            expected += payload
        elif kind == "pieces":
            third = len(payload) // 3
            wire += frame(0x02, payload[:third], mask=mask)
            wire += frame(0x89, b"between", mask=mask)
            wire += frame(0x00, payload[third : 2 * third], mask=mask)
            wire += frame(0x80, payload[2 * third :], mask=mask)
            expected += payload
        else:
            wire += frame(0x89 if kind == "ping" else 0x8A, payload[:125], mask=mask)
    end = WebSocket(not mask)
    buffer = memoryview(bytearray(4096))
    got, at = b"", 0
    for cut in [*cuts, *[1024] * (len(wire) // 1024 + 1)]:
        piece = wire[at : at + cut]
        at += cut
        if in_place:
            buffer[: len(piece)] = piece
            buffer[len(piece) :] = b"\xaa" * (len(buffer) - len(piece))
            view = end.feed_into(buffer, len(piece))
            got += bytes(view)
            view.release()
            assert buffer[len(piece) :] == b"\xaa" * (len(buffer) - len(piece)), (
                "not a byte beyond what was read"
            )
        else:
            kept = bytes(piece)
            got += end.feed(piece)
            assert piece == kept
    assert got == expected


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (frame(0xC2, b"x", mask=True), PROTOCOL_ERROR),  # RSV1: no extension was agreed on
        (frame(0xA2, b"x", mask=True), PROTOCOL_ERROR),
        (frame(0x92, b"x", mask=True), PROTOCOL_ERROR),
        (frame(0x83, b"x", mask=True), PROTOCOL_ERROR),  # reserved opcodes
        (frame(0x8B, b"x", mask=True), PROTOCOL_ERROR),
        (frame(0x81, b"x", mask=True), UNSUPPORTED_DATA),  # text
        (frame(0x82, b"x", mask=False), PROTOCOL_ERROR),  # a client must mask
        (frame(0x80, b"x", mask=True), PROTOCOL_ERROR),  # continues nothing
        (frame(0x02, b"x", mask=True) + frame(0x82, b"y", mask=True), PROTOCOL_ERROR),  # inside another
        (frame(0x09, b"x", mask=True), PROTOCOL_ERROR),  # fragmented control frame
        (frame(0x89, b"x" * 126, mask=True), PROTOCOL_ERROR),  # long control frame
        (frame(0x82, b"x", mask=True, form=2), PROTOCOL_ERROR),  # not the shortest form
        (frame(0x82, b"x" * 300, mask=True, form=8), PROTOCOL_ERROR),
        (b"\x82\xff\x80" + b"\0" * 7 + KEY, PROTOCOL_ERROR),  # length of 64 bits
        (frame(0x88, b"x", mask=True), PROTOCOL_ERROR),  # close with half a code
        (frame(0x88, (999).to_bytes(2, "big"), mask=True), PROTOCOL_ERROR),
        (frame(0x88, (1005).to_bytes(2, "big"), mask=True), PROTOCOL_ERROR),
        (frame(0x88, (1006).to_bytes(2, "big"), mask=True), PROTOCOL_ERROR),
        (frame(0x88, (2000).to_bytes(2, "big"), mask=True), PROTOCOL_ERROR),
        (frame(0x88, (5000).to_bytes(2, "big"), mask=True), PROTOCOL_ERROR),
    ],
)
def test_what_is_refused(wire: bytes, code: int) -> None:
    for size in (1, len(wire)):
        with pytest.raises(WebSocketError) as caught:
            feed_in_pieces(WebSocket(False), wire, size)
        assert caught.value.code == code


def feed_in_pieces(end: WebSocket, wire: bytes, size: int) -> None:
    for start in range(0, len(wire), size):
        end.feed(wire[start : start + size])


def test_masked_frames_from_a_server_are_refused() -> None:
    with pytest.raises(WebSocketError) as caught:
        WebSocket(True).feed(frame(0x82, b"x", mask=True))
    assert caught.value.code == PROTOCOL_ERROR


def test_a_flood_of_pings_draws_one_pong_per_read() -> None:
    client = WebSocket(True)
    client.feed(b"".join(frame(0x89, b"%d" % number, mask=False) for number in range(1000)))
    reply = client.take_replies()
    key, text = reply[2:6], reply[6:]
    assert reply[:2] == b"\x8a\x83"
    assert masked(text, key) == b"999"
    assert client.take_replies() == b""


def test_closing() -> None:
    server = WebSocket(False)
    assert (
        server.feed(frame(0x82, b"last", mask=True) + frame(0x88, b"\x03\xe9bye", mask=True) + b"garbage")
        == b"last"
    )
    assert server.close_code == 1001
    assert server.take_replies() == b"\x88\x02\x03\xe9"
    assert server.feed(b"more garbage") == b""
    assert server.close() == b"", "it was sent already"
    silent = WebSocket(False)
    silent.feed(frame(0x88, b"", mask=True))
    assert silent.close_code == 1005
    assert silent.take_replies() == b"\x88\x02\x03\xe8"
    first = WebSocket(False)
    assert first.close(NORMAL, b"r" * 200) == b"\x88\x7d\x03\xe8" + b"r" * 123
    first.feed(frame(0x88, b"\x03\xe8", mask=True))
    assert first.take_replies() == b"", "the answer to ours needs none"


def test_misuse() -> None:
    end = WebSocket(False)
    with pytest.raises(ValueError, match="beyond"):
        end.feed_into(memoryview(bytearray(4)), 5)
    with pytest.raises((BufferError, TypeError)):
        end.feed_into(memoryview(b"read-only"), 4)
    with pytest.raises(TypeError):
        end.wrap("text")  # type: ignore[arg-type]
