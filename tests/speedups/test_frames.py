"""The codec, and that SPEC.md, the codec and the oracle say the same."""

import importlib.resources
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from speedups import model

from guestpass_speedups import frames
from guestpass_speedups.frames import Flag, FrameType, decode_header, encode_frame, split_frames

SPEC = importlib.resources.files("guestpass").joinpath("mux/SPEC.md").read_text(encoding="utf-8")


def test_layout() -> None:
    assert (
        encode_frame(FrameType.DATA, Flag.FIN, 0x01020304, b"hello") == b"\0\x05\0\x01\x01\x02\x03\x04hello"
    )
    assert decode_header(b"\0\x05\0\x01\x01\x02\x03\x04hello") == (5, FrameType.DATA, Flag.FIN, 0x01020304)


@given(
    kind=st.integers(13, 255),
    flags=st.integers(0, 255),
    stream=st.integers(0, 2**31 - 1),
    payload=st.binary(max_size=100),
)
def test_round_trip_of_types_that_nobody_knows_yet(
    kind: int, flags: int, stream: int, payload: bytes
) -> None:
    data = encode_frame(kind, flags, stream, payload)
    assert data == model.frame(kind, flags, stream, payload)
    assert decode_header(data) == (len(payload), kind, flags, stream)
    assert split_frames(data + data[:-1] if payload else data) == (
        [(kind, flags, stream, payload)],
        data[:-1] if payload else b"",
    )


def test_encode_frame_refuses_what_the_length_field_cannot_hold() -> None:
    assert len(encode_frame(FrameType.INFO, 0, 0, bytes(65_535))) == 65_543
    with pytest.raises(ValueError, match="does not fit"):
        encode_frame(FrameType.INFO, 0, 0, bytes(65_536))


def spec_table() -> list[tuple[int, str, bool, int, int]]:
    """(type, name, tunnel, least, most) of section 2."""
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \| (> 0|0) \| ([\d,]+)(?:–([\d,]+))? \|", SPEC, re.MULTILINE)
    return [
        (int(kind), name, stream == "0", int(least.replace(",", "")), int((most or least).replace(",", "")))
        for kind, name, stream, least, most in rows
    ]


def test_spec_names_every_type() -> None:
    assert [(kind, name) for kind, name, *_ in spec_table()] == [
        (kind.value, kind.name) for kind in FrameType
    ]
    assert [name for _, name, *_ in spec_table()] == model.NAMES


@pytest.mark.parametrize("row", spec_table(), ids=lambda row: row[1])
def test_header_checks_are_the_table_of_the_spec(row: tuple[int, str, bool, int, int]) -> None:
    kind, _, tunnel, least, most = row
    stream = 0 if tunnel else 7
    for length in {0, least - 1, least, most, most + 1, 65_535} - {-1, 65_536}:
        header = model.frame(kind, 0, stream, b"")[2:]
        header = length.to_bytes(2, "big") + header
        if least <= length <= most:
            assert decode_header(header) == (length, kind, 0, stream)
        else:
            with pytest.raises(ValueError, match="too short" if length < least else "too long"):
                decode_header(header)
    with pytest.raises(ValueError, match="stream id"):
        decode_header(model.frame(kind, 0, 7 if tunnel else 0, bytes(least)))
    with pytest.raises(ValueError, match="bit 31"):
        decode_header(model.frame(kind, 0, stream | 1 << 31, bytes(least)))


def test_decode_header_needs_eight_bytes() -> None:
    with pytest.raises(ValueError, match="8 bytes"):
        decode_header(bytes(7))


def test_examples_of_the_spec() -> None:
    """Section 13, byte by byte."""
    block = SPEC.split("## 13. Examples")[1].split("```")[1]
    data = bytes.fromhex("".join(re.findall(r"^\s*((?:[0-9a-f]{2} {1,2})+)", block, re.MULTILINE)))
    parsed, rest = split_frames(data)
    head = b"GET / HTTP/1.1\r\nhost: a.b\r\n\r\n"
    assert rest == b""
    assert parsed == [
        (FrameType.PING, 0, 0, (1).to_bytes(8, "big")),
        (FrameType.OPEN, Flag.FIN, 1, model.open_payload("ww", head)),
        (FrameType.DATA, Flag.FIN, 1, b"hello"),
        (FrameType.CREDIT, 0, 1, (49_152).to_bytes(8, "big")),
        (FrameType.RESET, 0, 1, (5).to_bytes(4, "big")),
    ]


def test_numbers_of_the_oracle() -> None:
    assert (FrameType.DATA, FrameType.INFO) == (model.DATA, model.INFO)
    assert (Flag.FIN, Flag.INTERIM) == (model.FIN, model.INTERIM)
    assert frames.__doc__ is not None
