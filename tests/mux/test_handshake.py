"""HELLO and AUTH byte by byte; recorded ones of each version must stay readable."""

from __future__ import annotations

import dataclasses
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from guestpass.mux import handshake
from guestpass.mux.handshake import HandshakeError, Hello, Proof, Verdict
from guestpass_speedups.session import FLOOR, MAX_STREAMS, ErrorCode

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
EDGE = Hello(role="edge", epoch=5, nonce=b"\1" * 32, edge="share.example.com")
GATEWAY = Hello(role="gateway", epoch=18446744073709551615, nonce=b"\2" * 32)

# As guestpass 0.1 says it. Never change these: they are other people's software.
HELLO_0_1 = (
    b'{"version":1,"role":"gateway","software":"guestpass/0.1","max_streams":16384,"floor":32768,'
    b'"epoch":"18446744073709551615","nonce":"AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI"}'
)
PROOF_0_1 = (
    b'{"step":"proof","site":"plant-a","name":"plant-a-1","key":"A6EHv_POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg",'
    b'"certificate":"AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM","signature":"SIGNATURE"}'
)


def test_hello_there_and_back() -> None:
    for hello in (EDGE, GATEWAY):
        assert Hello.decode(hello.encode(), role=hello.role) == hello
    assert Hello.decode(HELLO_0_1, role="gateway") == dataclasses.replace(GATEWAY, software="guestpass/0.1")


def test_fields_that_are_absent_or_unknown() -> None:
    least = {"version": 7, "role": "gateway", "epoch": "0", "nonce": "AgIC" * 10 + "AgI=", "later": [1, 2]}
    hello = Hello.decode(json.dumps(least).encode(), role="gateway")
    assert (hello.version, hello.max_streams, hello.floor, hello.software) == (7, MAX_STREAMS, FLOOR, "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 0),
        ("version", "1"),
        ("version", True),
        ("role", "edge"),
        ("role", None),
        ("epoch", 5),
        ("epoch", "-1"),
        ("epoch", "05"),
        ("epoch", "١"),
        ("epoch", str(2**64)),
        ("nonce", "AgIC"),
        ("nonce", "!" * 43),
        ("floor", 1023),
        ("floor", 2**40),
        ("max_streams", 0),
        ("max_streams", 1.5),
        ("software", "x" * 300),
    ],
)
def test_wrong_fields(name: str, value: object) -> None:
    fields = {**json.loads(HELLO_0_1), name: value}
    with pytest.raises(HandshakeError) as caught:
        Hello.decode(json.dumps(fields).encode(), role="gateway")
    assert caught.value.code is ErrorCode.PROTOCOL_ERROR


def sign() -> Proof:
    return Proof.sign(
        KEY, site="plant-a", name="plant-a-1", certificate=b"\3" * 32, edge=EDGE, gateway=GATEWAY
    )


def test_what_is_signed() -> None:
    """SPEC.md chapter 7, written out."""
    parts = (
        b"share.example.com",
        b"\1" * 32,
        b"\2" * 32,
        b"plant-a",
        b"plant-a-1",
        KEY.public_key().public_bytes_raw(),
        b"18446744073709551615",
        b"\3" * 32,
    )
    text = b"guestpass tunnel v1\0" + b"".join(len(part).to_bytes(2, "big") + part for part in parts)
    KEY.public_key().verify(sign().signature, text)


def test_proof_there_and_back() -> None:
    proof = sign()
    recorded = PROOF_0_1.replace(b"SIGNATURE", handshake.encode_bytes(proof.signature).encode())
    assert proof.encode() == recorded
    assert Proof.decode(handshake.decode_object(recorded, "AUTH")) == proof
    assert proof.holds(EDGE, GATEWAY)


def test_proof_of_another_handshake() -> None:
    proof = sign()
    assert not proof.holds(dataclasses.replace(EDGE, nonce=b"\7" * 32), GATEWAY)
    assert not proof.holds(dataclasses.replace(EDGE, edge="other.example.com"), GATEWAY)
    assert not proof.holds(EDGE, dataclasses.replace(GATEWAY, nonce=b"\7" * 32))
    assert not proof.holds(EDGE, dataclasses.replace(GATEWAY, epoch=1))
    for change in ({"site": "plant-b"}, {"name": "plant-a-2"}, {"certificate": b""}, {"key": b"\0" * 32}):
        assert not dataclasses.replace(proof, **change).holds(EDGE, GATEWAY)
    # Where one part ends and the next begins is part of it.
    assert not dataclasses.replace(proof, site="plant-ap", name="lant-a-1").holds(EDGE, GATEWAY)


def test_verdicts() -> None:
    assert Verdict(True).encode() == b'{"step":"verdict","ok":true}'
    assert Verdict.decode({"ok": True, "later": 1}) == Verdict(True)
    no = Verdict(False, "unknown_key", "Not enrolled.")
    assert Verdict.decode(handshake.decode_object(no.encode(), "AUTH")) == no
    assert Verdict.decode({"ok": False}).code == "refused"
    for wrong in ({}, {"ok": 1}, {"ok": False, "code": 1}, {"ok": False, "message": []}):
        with pytest.raises(HandshakeError):
            Verdict.decode(wrong)
