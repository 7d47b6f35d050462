"""Does an edge, or a gateway, keep to mux/SPEC.md? Runs every rule that can be seen from outside; see README.md.

    python conformance.py --edge https://share.example.com --join-token-file token \
        [--share https://ID.share.example.com/ --bearer-file token] [--ca ca.pem]
    python conformance.py --gateway 'python gateway.py --edge {edge} --site {site} --name {name} --key {key}
        --service {service} --url {url}'

The first acts as a gateway, the second as an edge. Each prints a table and, with --json, writes the same as JSON; the
exit status is 1 when a rule failed. A check has a tunnel (or a gateway process) of its own: most rules end it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import ssl
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import websocket
import wire
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

# How long an answer may take before the rule counts as broken; liveness has 6 s of its own.
PATIENCE = 5.0
# The same for PING after 3 s of silence, and for the end after 6.
SILENCE = 15.0
# Nothing happening is seen by waiting for so long.
QUIET = 0.3
FLOOR = 65_536
SERVICE = "conformance"


class Failed(Exception):
    """A rule is not kept; what was seen instead."""


class Skipped(Exception):
    """The rule cannot be seen with what was given; why."""


def expect(condition: object, seen: str) -> None:
    if not condition:
        raise Failed(seen)


@dataclass
class Result:
    name: str
    chapter: str
    outcome: str
    detail: str = ""


Check = Callable[[Any], Awaitable[None]]
EDGE_CHECKS: list[tuple[str, str, Check]] = []
GATEWAY_CHECKS: list[tuple[str, str, Check]] = []


def of_edge(chapter: str, name: str) -> Callable[[Check], Check]:
    return lambda check: EDGE_CHECKS.append((chapter, name, check)) or check  # type: ignore[func-returns-value]


def of_gateway(chapter: str, name: str) -> Callable[[Check], Check]:
    return lambda check: GATEWAY_CHECKS.append((chapter, name, check)) or check  # type: ignore[func-returns-value]


class Peer:
    """The other end of one tunnel, frame by frame. PINGs are answered on the way, unless a check wants them."""

    def __init__(self, carrier: websocket.Carrier) -> None:
        self.carrier = carrier
        self.hello: dict[str, Any] = {}
        self.pongs = True
        self.last = 0

    def write(self, *frames: bytes) -> None:
        self.carrier.write(b"".join(frames))

    async def next(self, *kinds: int, seconds: float = PATIENCE) -> tuple[int, int, int, bytes]:
        """The next frame; of those kinds, if any are named: others are passed over, but for GOAWAY."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    kind, flags, number, payload = await wire.read_frame(self.carrier)
                    if kind == wire.PING and self.pongs and kind not in kinds:
                        self.write(wire.frame(wire.PONG, 0, payload))
                    elif not kinds or kind in kinds:
                        return kind, flags, number, payload
                    elif kind == wire.GOAWAY:
                        raise Failed(f"GOAWAY with code {int.from_bytes(payload[4:], 'big')}")
        except TimeoutError:
            raise Failed(f"no frame of type {kinds or 'any'} within {seconds:g} s") from None
        except (ConnectionError, EOFError) as exc:
            raise Failed(f"the connection ended: {exc}") from None

    async def ended(self, *codes: int, seconds: float = PATIENCE) -> None:
        """GOAWAY with one of the codes is the last frame, and then the connection is closed."""
        code = None
        try:
            async with asyncio.timeout(seconds):
                while True:
                    kind, _, _, payload = await wire.read_frame(self.carrier)
                    if kind == wire.GOAWAY:
                        code = int.from_bytes(payload[4:], "big")
        except TimeoutError:
            expect(code is None, f"GOAWAY with code {code}, and no end of the connection")
            raise Failed("the tunnel lives on") from None
        except (ConnectionError, EOFError):
            expect(code is not None, "the connection ended without GOAWAY")
        expect(code in codes, f"GOAWAY with code {code}, not {' or '.join(map(str, codes))}")

    async def alive(self) -> None:
        """A PING is answered, so all before it was taken."""
        token = os.urandom(8)
        self.write(wire.frame(wire.PING, 0, token))
        while (await self.next(wire.PONG))[3] != token:
            pass

    async def quiet(self, *kinds: int) -> None:
        """No frame of those kinds comes for a while."""
        try:
            found = await self.next(*kinds, seconds=QUIET)
        except Failed as exc:
            expect("no frame" in str(exc), str(exc))
        else:
            raise Failed(f"a frame of type {found[0]} came")

    async def expect_hello(self, role: str) -> None:
        kind, _, _, payload = await self.next()
        expect(kind == wire.HELLO, f"the first frame is of type {kind}")
        self.hello = json.loads(payload)
        expect(self.hello.get("role") == role, f"role {self.hello.get('role')!r}")
        expect(isinstance(self.hello.get("version"), int) and self.hello["version"] >= 1, "no version")
        expect(len(wire.unbase64url(self.hello["nonce"])) == 32, "the nonce is not 32 bytes")
        expect(str(int(self.hello["epoch"])) == self.hello["epoch"], "the epoch is not a number in a string")


def head(text: str) -> bytes:
    return (text.replace("\n", "\r\n") + "\r\n\r\n").encode()


def open_frame(
    number: int, request: bytes, *, service: str = SERVICE, body: bytes = b"", fin: bool = True
) -> bytes:
    name = service.encode()
    payload = bytes((len(name),)) + name + b"\1" + len(request).to_bytes(2, "big") + request + body
    return wire.frame(wire.OPEN, number, payload, wire.FIN if fin else 0)


def head_frame(number: int, response: bytes, *, body: bytes = b"", flags: int = 0) -> bytes:
    return wire.frame(wire.HEAD, number, len(response).to_bytes(2, "big") + response + body, flags)


# ── as a gateway, against an edge ────────────────────────────────────────────────────────────────────────────────


class Visit:
    """A visitor's request to the share, whose stream this gateway then gets."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, bytes]:
        """(status, everything after the head) of a response that ends with the connection."""
        try:
            async with asyncio.timeout(PATIENCE):
                start = await self.reader.readuntil(b"\r\n\r\n")
                return int(start.split(b" ")[1]), await self.reader.read()
        except TimeoutError:
            raise Failed("the visitor waits for an answer") from None
        except (EOFError, OSError) as exc:
            raise Failed(f"the visitor got no answer: {exc}") from None


class AsGateway:
    """What checks of an edge need: tunnels to it, and visitors."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.key = Ed25519PrivateKey.generate()
        self.site, self.name = options.site or "", options.name
        self.epoch = time.time_ns()
        self.share = ""
        self.bearer = ""
        self.service = SERVICE
        self.visits: list[Visit] = []
        self.peers: list[Peer] = []

    async def enrol(self) -> None:
        if self.options.key:
            key = load_pem_private_key(Path(self.options.key).read_bytes(), None)  # noqa: ASYNC240
            assert isinstance(key, Ed25519PrivateKey)
            self.key = key
        else:
            token = Path(self.options.join_token_file).read_text("utf-8").strip()  # noqa: ASYNC240
            body = {"join_token": token, "name": self.name, "public_key": self.public}
            status, answer = await self._post("/api/v1/gateways/enroll", body)
            if status != 200 and status != 201:
                sys.exit(f"enrolment: {status} {answer.decode('utf-8', 'replace')}")
            self.site = json.loads(answer)["site"]
        if self.options.share:
            self.share = self.options.share
            self.bearer = Path(self.options.bearer_file).read_text("utf-8").strip()  # noqa: ASYNC240
        self.service = self.options.service

    @property
    def public(self) -> str:
        return wire.base64url(self.key.public_key().public_bytes_raw())

    async def _open(self, url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(url)
        context = ssl.create_default_context(cafile=self.options.ca) if parts.scheme == "https" else None
        host = parts.hostname or ""
        where = "127.0.0.1" if host.endswith(".localhost") else host
        port = parts.port or (443 if context else 80)
        return await asyncio.open_connection(
            where, port, ssl=context, server_hostname=host if context else None
        )

    async def _post(self, path: str, fields: dict[str, Any]) -> tuple[int, bytes]:
        url = self.options.api or self.options.edge
        reader, writer = await self._open(url)
        body = json.dumps(fields).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        answer = await reader.read()
        writer.close()
        return int(answer.split(b" ")[1]), answer.partition(b"\r\n\r\n")[2]

    def hello(self, **changes: Any) -> tuple[dict[str, Any], bytes]:
        nonce = os.urandom(32)
        return {**wire.hello("gateway", nonce, str(self.epoch), FLOOR, 1024), **changes}, nonce

    async def dial(self) -> Peer:
        """Connected; nothing was said."""
        peer = Peer(await websocket.connect(self.options.edge, wire.PATH, wire.SUBPROTOCOL, self.options.ca))
        self.peers.append(peer)
        return peer

    async def greet(self, **changes: Any) -> tuple[Peer, bytes]:
        """After both HELLOs; and this end's nonce."""
        peer = await self.dial()
        fields, nonce = self.hello(**changes)
        peer.write(wire.document(wire.HELLO, fields))
        await peer.expect_hello("edge")
        return peer, nonce

    def proof(self, peer: Peer, nonce: bytes, **changes: Any) -> dict[str, Any]:
        settings = {
            "key": self.key,
            "hello": peer.hello,
            "nonce": nonce,
            "site": self.site,
            "name": self.name,
        }
        settings |= {"epoch": str(self.epoch), "der": peer.carrier.certificate, **changes}
        return wire.proof(**settings)

    async def verdict(self, peer: Peer, proof: dict[str, Any]) -> dict[str, Any]:
        peer.write(wire.document(wire.AUTH, proof))
        fields: dict[str, Any] = {}
        while fields.get("step") != "verdict":
            fields = json.loads((await peer.next(wire.AUTH))[3])
        return fields

    async def join(self, **changes: Any) -> Peer:
        """Let in, with the service announced."""
        peer, nonce = await self.greet(**changes)
        fields = await self.verdict(peer, self.proof(peer, nonce))
        expect(fields["ok"] is True, f"refused: {fields.get('message')}")
        peer.write(wire.document(wire.INFO, {"services": {self.service: {"healthy": True}}, "weight": 1}))
        await peer.alive()
        return peer

    async def visit(self, text: str = "GET {path} HTTP/1.1\nHost: {host}", body: bytes = b"") -> Visit:
        if not self.share:
            raise Skipped("needs --share and --bearer-file")
        parts = urlsplit(self.share)
        request = text.format(path=parts.path or "/", host=parts.netloc)
        reader, writer = await self._open(self.share)
        writer.write(head(f"{request}\nAuthorization: Bearer {self.bearer}\nConnection: close") + body)
        visit = Visit(reader, writer)
        self.visits.append(visit)  # a connection that nobody holds is closed
        return visit

    def forget(self) -> None:
        """What the last check has left."""
        for visit in self.visits:
            visit.writer.close()
        for peer in self.peers:
            peer.carrier.abort("the check is over")
        self.visits.clear()
        self.peers.clear()

    async def stream(self, **visit: Any) -> tuple[Peer, Visit, int, bytes]:
        """A visitor's request as it arrives here: (tunnel, visitor, stream id, OPEN's payload)."""
        if not self.share:
            raise Skipped("needs --share and --bearer-file")
        peer = await self.join()
        visitor = await self.visit(**visit)
        _, _, number, payload = await peer.next(wire.OPEN)
        return peer, visitor, number, payload


def leave(peer: Peer) -> None:
    """The check is over."""
    peer.carrier.close()


OK = head("HTTP/1.1 200 OK\ncontent-type: text/plain")


@of_edge("7", "HELLO comes first, with role, version, nonce and epoch; the proof is accepted")
async def edge_handshake(gateway: AsGateway) -> None:
    leave(await gateway.join())


@of_edge("1", "another subprotocol, path or version is refused with an HTTP status")
async def edge_upgrade(gateway: AsGateway) -> None:
    for path, subprotocol in ((wire.PATH, "guestpass.v0"), (wire.PATH + "x", wire.SUBPROTOCOL)):
        try:
            carrier = await websocket.connect(gateway.options.edge, path, subprotocol, gateway.options.ca)
        except websocket.Refused:
            continue
        carrier.close()
        raise Failed(f"{subprotocol} at {path} was accepted")


@of_edge("7", "fields of HELLO, AUTH and INFO that it does not know are ignored")
async def edge_unknown_fields(gateway: AsGateway) -> None:
    peer, nonce = await gateway.greet(later={"a": [1]}, floor=FLOOR)
    fields = await gateway.verdict(peer, {**gateway.proof(peer, nonce), "later": True})
    expect(fields["ok"] is True, f"refused: {fields}")
    peer.write(
        wire.document(
            wire.INFO, {"services": {gateway.service: {"healthy": True, "later": 1}}, "later": None}
        )
    )
    await peer.alive()
    leave(peer)


@of_edge("7", "fields that are absent have defaults; a higher version is spoken down to")
async def edge_defaults(gateway: AsGateway) -> None:
    peer = await gateway.dial()
    fields, nonce = gateway.hello(version=7)
    for name in ("software", "floor", "max_streams"):
        del fields[name]
    peer.write(wire.document(wire.HELLO, fields))
    await peer.expect_hello("edge")
    verdict = await gateway.verdict(peer, gateway.proof(peer, nonce))
    expect(verdict["ok"] is True, f"refused: {verdict}")
    leave(peer)


@of_edge("7", "base64url is accepted with padding")
async def edge_padding(gateway: AsGateway) -> None:
    peer, nonce = await gateway.greet()
    proof = gateway.proof(peer, nonce)
    for name in ("key", "signature", "certificate"):
        proof[name] += "=" * (-len(proof[name]) % 4)
    verdict = await gateway.verdict(peer, proof)
    expect(verdict["ok"] is True, f"refused: {verdict}")
    leave(peer)


async def refused(gateway: AsGateway, code: str, **changes: Any) -> None:
    peer, nonce = await gateway.greet()
    changes = {key: value(peer) if callable(value) else value for key, value in changes.items()}
    verdict = await gateway.verdict(peer, gateway.proof(peer, changes.pop("old_nonce", nonce), **changes))
    expect(verdict["ok"] is False and verdict.get("code") == code, f"the verdict is {verdict}")
    await peer.ended(wire.AUTH_FAILED)


@of_edge("7", "a proof over other nonces is bad_signature, then GOAWAY(AUTH_FAILED)")
async def edge_replay(gateway: AsGateway) -> None:
    peer, nonce = await gateway.greet()
    hello = peer.hello
    leave(peer)
    await refused(gateway, "bad_signature", hello=hello, old_nonce=nonce)


@of_edge("7", "a key that is not enrolled is unknown_key")
async def edge_unknown_key(gateway: AsGateway) -> None:
    await refused(gateway, "unknown_key", key=Ed25519PrivateKey.generate())


@of_edge("7", "the key under another name is unknown_key")
async def edge_other_name(gateway: AsGateway) -> None:
    await refused(gateway, "unknown_key", name=gateway.name + "-other")


@of_edge("7", "another certificate's hash is wrong_certificate")
async def edge_certificate(gateway: AsGateway) -> None:
    if urlsplit(gateway.options.edge).scheme != "https":
        raise Skipped("needs https")
    await refused(gateway, "wrong_certificate", der=b"another certificate")


@of_edge("7", "frames before HELLO are PROTOCOL_ERROR")
async def edge_before_hello(gateway: AsGateway) -> None:
    for first in (wire.u64(wire.PING, 1), wire.document(wire.AUTH, {}), wire.frame(200, 0, b"x")):
        peer = await gateway.dial()
        peer.write(first)
        await peer.ended(wire.PROTOCOL_ERROR)


@of_edge("7", "a second HELLO is PROTOCOL_ERROR")
async def edge_second_hello(gateway: AsGateway) -> None:
    peer, _ = await gateway.greet()
    peer.write(wire.document(wire.HELLO, gateway.hello()[0]))
    await peer.ended(wire.PROTOCOL_ERROR)


@of_edge("7", "a HELLO with a wrong role, type, nonce or JSON is PROTOCOL_ERROR")
async def edge_wrong_hello(gateway: AsGateway) -> None:
    good = gateway.hello()[0]
    changes: tuple[dict[str, Any], ...] = (
        {"role": "edge"},
        {"version": "1"},
        {"nonce": "AA"},
        {"floor": 1},
        {"epoch": 5},
    )
    payloads = [json.dumps({**good, **change}).encode() for change in changes]
    payloads += [json.dumps([good]).encode(), b"{", b"\xff"]
    for payload in payloads:
        peer = await gateway.dial()
        peer.write(wire.frame(wire.HELLO, 0, payload))
        await peer.ended(wire.PROTOCOL_ERROR)


@of_edge("7", "an AUTH with an unknown step is ignored; the ninth is PROTOCOL_ERROR")
async def edge_auths(gateway: AsGateway) -> None:
    peer, _ = await gateway.greet()
    peer.write(*[wire.document(wire.AUTH, {"step": "later"})] * 8)
    await peer.alive()
    peer.write(wire.document(wire.AUTH, {"step": "later"}))
    await peer.ended(wire.PROTOCOL_ERROR)


@of_edge("7", "a newer epoch evicts the older (REPLACED), an older one is stale_epoch")
async def edge_fencing(gateway: AsGateway) -> None:
    first = await gateway.join()
    older, gateway.epoch = gateway.epoch, gateway.epoch + 1
    second = await gateway.join()
    await first.ended(wire.REPLACED)
    newer, gateway.epoch = gateway.epoch, older
    await refused(gateway, "stale_epoch")
    gateway.epoch = newer
    together = await gateway.join()
    await second.alive()
    leave(second)
    leave(together)


@of_edge("2", "unknown frame types are skipped, whatever their flags, id and length")
async def edge_unknown_types(gateway: AsGateway) -> None:
    peer = await gateway.join()
    for kind in (13, 14, 100, 255):
        peer.write(wire.frame(kind, 0, b""), wire.frame(kind, 2**31 - 1, os.urandom(65_535), 255))
    await peer.alive()
    leave(peer)


@of_edge("2", "bit 31 of a stream id is PROTOCOL_ERROR, on unknown types as well")
async def edge_bit_31(gateway: AsGateway) -> None:
    for kind in (wire.CREDIT, 200):
        peer = await gateway.join()
        peer.write(wire.frame(kind, 2**31 + 1, bytes(8)))
        await peer.ended(wire.PROTOCOL_ERROR)


@of_edge("2", "a length outside of the table is PROTOCOL_ERROR before the payload has come")
async def edge_lengths(gateway: AsGateway) -> None:
    for kind, (least, most) in enumerate(wire.SIZES):
        for length in {least - 1, most + 1} - {-1, 65_536}:
            peer = await gateway.join()
            peer.write(length.to_bytes(2, "big") + wire.frame(kind, 0 if kind >= wire.PING else 1)[2:])
            await peer.ended(wire.PROTOCOL_ERROR)


@of_edge("2", "a stream's frame without an id, or a tunnel's with one, is PROTOCOL_ERROR")
async def edge_ids(gateway: AsGateway) -> None:
    for kind in (wire.CREDIT, wire.RESET_ACK, wire.PING, wire.GOAWAY, wire.INFO):
        peer = await gateway.join()
        peer.write(wire.frame(kind, 0 if kind < wire.PING else 1, bytes(wire.SIZES[kind][0])))
        await peer.ended(wire.PROTOCOL_ERROR)


@of_edge("1", "frames may be cut anywhere, across messages and fragments, with WebSocket pings between")
async def edge_cuts(gateway: AsGateway) -> None:
    peer = await gateway.join()
    wanted = wire.u64(wire.PING, 2**63 + 5)
    for byte in wanted[:6]:
        peer.write(bytes((byte,)))
    frame = peer.carrier.frame
    peer.carrier.raw(frame(websocket.BINARY, wanted[6:9]) + frame(0x80 | websocket.PING, b"between"))
    peer.carrier.raw(frame(websocket.CONTINUATION, b"") + frame(0x80, wanted[9:]))
    _, _, _, payload = await peer.next(wire.PONG)
    expect(payload == wanted[8:], "another PONG")
    leave(peer)


@of_edge("1", "text messages, reserved bits and unmasked frames end the connection")
async def edge_websocket(gateway: AsGateway) -> None:
    for name in ("text", "reserved bit", "unmasked"):
        peer = await gateway.join()
        frame = peer.carrier.frame
        raw = {"text": frame(0x81, b"x"), "reserved bit": frame(0xC2, b"x"), "unmasked": b"\x82\x01x"}[name]
        peer.carrier.raw(raw)
        await peer.ended(wire.PROTOCOL_ERROR)
        wanted = (1003,) if name == "text" else (1002,)
        expect(peer.carrier.close_code in wanted, f"{name}: close code {peer.carrier.close_code}")


@of_edge("9", "a silent gateway is sent a PING after 3 s and GOAWAY(TIMEOUT) after 6")
async def edge_liveness(gateway: AsGateway) -> None:
    peer = await gateway.join()
    peer.pongs = False
    began = time.monotonic()
    await peer.alive()
    await peer.next(wire.PING, seconds=SILENCE)
    expect(time.monotonic() - began > 2.9, "the PING came at once")
    await peer.ended(wire.TIMEOUT, seconds=SILENCE)
    expect(time.monotonic() - began > 5.9, "the end came too early")


@of_edge("6", "too many PINGs or INFOs are LIMIT_EXCEEDED, 20 at once are not")
async def edge_floods(gateway: AsGateway) -> None:
    for flood in (wire.u64(wire.PING, 9), wire.document(wire.INFO, {"services": {}})):
        peer = await gateway.join()
        peer.write(*[flood] * 15)
        await peer.quiet(wire.GOAWAY)
        peer.write(*[flood] * 40)
        await peer.ended(wire.LIMIT_EXCEEDED)


@of_edge("6", "glitches are tolerated, thousands of them are LIMIT_EXCEEDED")
async def edge_glitches(gateway: AsGateway) -> None:
    peer = await gateway.join()
    peer.write(*[wire.u64(wire.PONG, 2**64 - 1)] * 500)
    await peer.alive()
    peer.write(*[wire.u64(wire.PONG, 2**64 - 1)] * 4000)
    await peer.ended(wire.LIMIT_EXCEEDED)


@of_edge("2.1", "OPEN from a gateway, and frames for streams that were never opened, are PROTOCOL_ERROR")
async def edge_never_opened(gateway: AsGateway) -> None:
    frames = [
        open_frame(1, head("GET / HTTP/1.1\nhost: a")),
        head_frame(1, OK),
        wire.frame(wire.DATA, 9, b"x"),
    ]
    frames += (wire.reset(1, 5), wire.frame(wire.RESET_ACK, 1), wire.u64(wire.CREDIT, 9, 1))
    for frame in frames:
        peer = await gateway.join()
        peer.write(frame)
        await peer.ended(wire.PROTOCOL_ERROR)


@of_edge("10", "a later GOAWAY may lower its last id, and must not raise it")
async def edge_goaway(gateway: AsGateway) -> None:
    peer = await gateway.join()
    peer.write(wire.goaway(wire.LAST_ID, wire.DRAINING), wire.goaway(5, wire.DRAINING))
    await peer.alive()
    peer.write(wire.goaway(6, wire.DRAINING))
    await peer.ended(wire.PROTOCOL_ERROR)


@of_edge("2.1", "a request opens stream 1, the next one 2, with a head of HTTP/1.1 and no hop-by-hop fields")
async def edge_open(gateway: AsGateway) -> None:
    peer, visitor, number, payload = await gateway.stream()
    service, request, body = wire.read_open(payload)
    expect(number == 1 and service == gateway.service and not body, f"stream {number}, service {service!r}")
    lines = wire.read_head(request)
    expect(len(lines) == len(request.split(b"\r\n")) - 1, "hop-by-hop fields are in the head, or no Host")
    expect(lines[0].endswith(b" HTTP/1.1"), f"{lines[0]!r}")
    peer.write(head_frame(number, OK, body=b"he"), wire.frame(wire.DATA, number, b"llo", wire.FIN))
    status, text = await visitor.answer()
    expect(status == 200 and b"hello" in text, f"the visitor got {status} {text!r}")
    await gateway.visit()
    expect((await peer.next(wire.OPEN))[2] == 2, "the next stream is not 2")
    leave(peer)


@of_edge("2.2", "interim heads precede the final one; more than 32 reset the stream (BAD_UPSTREAM)")
async def edge_interim(gateway: AsGateway) -> None:
    peer, visitor, number, _ = await gateway.stream()
    early = head("HTTP/1.1 103 Early Hints\nlink: </x>")
    peer.write(head_frame(number, early, flags=wire.INTERIM), head_frame(number, OK, flags=wire.FIN))
    expect((await visitor.answer())[0] in (103, 200), "no answer")
    await gateway.visit()
    number = (await peer.next(wire.OPEN))[2]
    peer.write(*[head_frame(number, early, flags=wire.INTERIM)] * 40)
    code = int.from_bytes((await peer.next(wire.RESET))[3], "big")
    expect(code == wire.BAD_UPSTREAM, f"RESET with code {code}")
    peer.write(wire.frame(wire.RESET_ACK, number))
    await peer.alive()
    leave(peer)


@of_edge("2.2", "DATA before HEAD, a second HEAD, and an interim HEAD with FIN are PROTOCOL_ERROR")
async def edge_head_order(gateway: AsGateway) -> None:
    wrong: tuple[Callable[[int], tuple[bytes, ...]], ...] = (
        lambda n: (wire.frame(wire.DATA, n, b"x"),),
        lambda n: (wire.frame(wire.TRAILERS, n, b"\r\n"),),
        lambda n: (head_frame(n, OK), head_frame(n, OK)),
        lambda n: (head_frame(n, head("HTTP/1.1 103 x"), flags=wire.INTERIM | wire.FIN),),
        lambda n: (wire.frame(wire.HEAD, n, b"\x00\x40short"),),
        lambda n: (head_frame(n, OK), wire.frame(wire.RESET_ACK, n)),
    )
    for frames in wrong:
        peer, _, number, _ = await gateway.stream()
        peer.write(*frames(number))
        await peer.ended(wire.PROTOCOL_ERROR)


@of_edge("6", "a head over 32,768 bytes is LIMIT_EXCEEDED")
async def edge_long_head(gateway: AsGateway) -> None:
    peer, _, number, _ = await gateway.stream()
    peer.write(head_frame(number, bytes(32_769)))
    await peer.ended(wire.LIMIT_EXCEEDED)


@of_edge("2.3", "a malformed response head costs its stream, not the tunnel; the visitor gets 502")
async def edge_malformed_head(gateway: AsGateway) -> None:
    for response in (
        b"HTTP/1.1 200 OK\nx: y\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbad name: x\r\n\r\n",
    ):
        peer, visitor, number, _ = await gateway.stream()
        peer.write(head_frame(number, response, flags=wire.FIN))
        expect((await visitor.answer())[0] == 502, "the visitor did not get 502")
        await peer.alive()
        leave(peer)


@of_edge("4", "a burst beyond the credit is FLOW_CONTROL_ERROR")
async def edge_credit_exceeded(gateway: AsGateway) -> None:
    peer, _, number, _ = await gateway.stream()
    peer.write(head_frame(number, OK), *[wire.frame(wire.DATA, number, bytes(16_368))] * 2000)
    await peer.ended(wire.FLOW_CONTROL_ERROR)


@of_edge("4", "credit is given as the visitor reads, and a large response arrives whole")
async def edge_credit_given(gateway: AsGateway) -> None:
    peer, visitor, number, _ = await gateway.stream()
    left, limit, sent = 3_000_000, peer.hello.get("floor", wire.FLOOR), 0
    answer = asyncio.create_task(visitor.answer())
    peer.write(head_frame(number, head(f"HTTP/1.1 200 OK\ncontent-length: {left}")))
    while left:
        if sent == limit:
            offset = int.from_bytes((await peer.next(wire.CREDIT))[3], "big")
            expect(offset > limit, f"credit went from {limit} to {offset}")
            limit = offset
        size = min(16_368, left, limit - sent)
        sent, left = sent + size, left - size
        peer.write(wire.frame(wire.DATA, number, bytes(size), 0 if left else wire.FIN))
    status, body = await answer
    expect(status == 200 and len(body) == 3_000_000, f"{status}, {len(body)} bytes")
    leave(peer)


@of_edge("4", "an upload stops at the credit, and goes on exactly to where it was raised")
async def edge_honours_credit(gateway: AsGateway) -> None:
    text = "POST {path} HTTP/1.1\nHost: {host}\nContent-Length: 1000000"
    peer, _, number, payload = await gateway.stream(text=text, body=bytes(1_000_000))
    received = len(wire.read_open(payload)[2])
    for limit in (FLOOR, FLOOR + 9000, FLOOR + 200_000):
        if limit > FLOOR:
            peer.write(wire.u64(wire.CREDIT, limit, number))
        while received < limit:
            _, flags, _, data = await peer.next(wire.DATA)
            received += len(data)
        expect(received == limit, f"{received} bytes with credit for {limit}")
        await peer.quiet(wire.DATA)
    peer.write(wire.u64(wire.CREDIT, 2**64 - 1, number))
    flags = 0
    while not flags & wire.FIN:
        _, flags, _, data = await peer.next(wire.DATA)
        received += len(data)
    expect(received == 1_000_000, f"{received} bytes")
    leave(peer)


@of_edge("4", "CREDIT that does not grow is FLOW_CONTROL_ERROR")
async def edge_credit_same(gateway: AsGateway) -> None:
    for offset in (FLOOR, 0):
        text = "POST {path} HTTP/1.1\nHost: {host}\nContent-Length: 1000000"
        peer, _, number, _ = await gateway.stream(text=text)
        peer.write(wire.u64(wire.CREDIT, offset, number))
        await peer.ended(wire.FLOW_CONTROL_ERROR)


@of_edge("3", "RESET is answered with RESET_ACK, and the visitor with 502 (REFUSED: 403)")
async def edge_reset(gateway: AsGateway) -> None:
    for code, wanted in ((wire.UNREACHABLE, 502), (wire.REFUSED, 403), (9999, 502)):
        peer, visitor, number, _ = await gateway.stream()
        peer.write(wire.reset(number, code))
        expect((await peer.next(wire.RESET_ACK))[2] == number, "RESET_ACK of another stream")
        status, _ = await visitor.answer()
        expect(status == wanted, f"the visitor got {status} for code {code}")
        await peer.alive()
        leave(peer)


@of_edge("3", "a visitor who goes away resets the stream; frames that cross are taken, RESET_ACK closes it")
async def edge_visitor_left(gateway: AsGateway) -> None:
    peer, visitor, number, _ = await gateway.stream()
    visitor.writer.transport.abort()
    _, _, reset, _ = await peer.next(wire.RESET)
    expect(reset == number, "RESET of another stream")
    peer.write(head_frame(number, OK), wire.frame(wire.DATA, number, b"crossing"))
    await peer.alive()
    peer.write(wire.frame(wire.RESET_ACK, number), wire.u64(wire.CREDIT, 2**40, number))
    await peer.alive()
    leave(peer)


@of_edge("3", "frames for streams that are closed are dropped without a reply")
async def edge_closed(gateway: AsGateway) -> None:
    peer, visitor, number, _ = await gateway.stream()
    peer.write(head_frame(number, OK, flags=wire.FIN))
    await visitor.answer()
    peer.write(wire.frame(wire.DATA, number, b"x"), wire.u64(wire.CREDIT, 1, number), wire.reset(number, 5))
    await peer.alive()
    leave(peer)


@of_edge("10", "after GOAWAY a live stream goes on, and no other one is opened")
async def edge_drain(gateway: AsGateway) -> None:
    peer, visitor, number, _ = await gateway.stream()
    peer.write(wire.goaway(wire.LAST_ID, wire.DRAINING))
    await peer.alive()
    other = await gateway.visit()
    status, _ = await other.answer()
    expect(status == 503, f"another request got {status}")
    peer.write(wire.goaway(number, wire.DRAINING), head_frame(number, OK, body=b"late", flags=wire.FIN))
    status, body = await visitor.answer()
    expect(status == 200 and b"late" in body, f"{status} {body!r}")
    leave(peer)


# ── as an edge, against a gateway ────────────────────────────────────────────────────────────────────────────────


class Service:
    """What the gateway is to serve: /hello, /big (4 MB), /count (bytes of the body), /wait (never answers)."""

    def __init__(self) -> None:
        self.waiting = 0
        self.url = ""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            path = request.split(b" ")[1]
            body = b"hello"
            if path == b"/wait":
                self.waiting += 1
                try:
                    await reader.read()
                finally:
                    self.waiting -= 1
                return
            if path == b"/big":
                body = bytes(4_000_000)
            elif path == b"/count":
                size = int(websocket.field(request, b"content-length"))
                body = str(len(await reader.readexactly(size))).encode()
            writer.write(head(f"HTTP/1.1 200 OK\ncontent-length: {len(body)}\nconnection: close") + body)
            await writer.drain()
        except (OSError, EOFError):
            pass
        finally:
            writer.close()


class AsEdge:
    """What checks of a gateway need: the process, its tunnels as they come, and a service."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.key = Ed25519PrivateKey.generate()
        folder.mkdir()
        self.key_file = folder / "gateway.key"
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.key_file.write_bytes(pem)
        self.key_file.chmod(0o600)
        self.service = Service()
        self.url = ""
        self.names = {"site": "conformance", "name": "gateway-1", "service": SERVICE}
        self.certificate = b""
        self.heads: list[bytes] = []
        self._dialled: asyncio.Queue[Peer] = asyncio.Queue()
        self._process: asyncio.subprocess.Process | None = None
        self._peers: list[Peer] = []
        self.folder = folder

    async def start(self) -> None:
        context = None
        if self.options.tls:
            cert, key = self.options.tls
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(cert, key)
            self.certificate = ssl.PEM_cert_to_DER_cert(Path(cert).read_text("ascii"))  # noqa: ASYNC240
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        self.url = f"https://localhost:{port}" if context else f"http://127.0.0.1:{port}"
        app = await asyncio.start_server(self.service, "127.0.0.1", 0)
        self.service.url = f"http://127.0.0.1:{app.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request, carrier = await websocket.accepted(reader, writer)
        except (OSError, EOFError):
            writer.close()
            return
        self.heads.append(request)
        peer = Peer(carrier)
        self._peers.append(peer)
        self._dialled.put_nowait(peer)

    async def fresh(self) -> None:
        """A gateway process that knows of no tunnel yet."""
        await self.stop()
        names = {**self.names, "edge": self.url, "url": self.service.url, "key": str(self.key_file)}
        names |= {"ca": str(self.options.ca or ""), "folder": str(self.folder)}
        command = [part.format(**names) for part in self.options.gateway.split()]
        with (self.folder / "gateway.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(5):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        for peer in self._peers:
            peer.carrier.abort("the check is over")
        self._peers.clear()
        while not self._dialled.empty():
            self._dialled.get_nowait()

    async def dialled(self, seconds: float = 15.0) -> Peer:
        """The gateway's next tunnel; nothing was said."""
        try:
            async with asyncio.timeout(seconds):
                return await self._dialled.get()
        except TimeoutError:
            raise Failed(f"the gateway did not dial within {seconds:g} s") from None

    def hello(self, **changes: Any) -> tuple[dict[str, Any], bytes]:
        nonce = os.urandom(32)
        fields = wire.hello("edge", nonce, str(time.time_ns()), FLOOR, 1024)
        return {**fields, "edge": "conformance edge", **changes}, nonce

    async def greet(self, **changes: Any) -> Peer:
        """After its proof, which is checked."""
        peer = await self.dialled()
        fields, nonce = self.hello(**changes)
        peer.write(wire.document(wire.HELLO, fields))
        await peer.expect_hello("gateway")
        _, _, _, payload = await peer.next(wire.AUTH)
        self.check_proof(json.loads(payload), fields, nonce, peer.hello)
        return peer

    def check_proof(
        self, proof: dict[str, Any], edge: dict[str, Any], nonce: bytes, gateway: dict[str, Any]
    ) -> None:
        expect(proof.get("step") == "proof", f"AUTH with step {proof.get('step')!r}")
        public = wire.unbase64url(proof["key"])
        expect(public == self.key.public_key().public_bytes_raw(), "another key")
        hashed = wire.certificate_hash(self.certificate)
        expect(wire.unbase64url(proof.get("certificate", "")) == hashed, "another certificate's hash")
        parts = [edge["edge"].encode(), nonce, wire.unbase64url(gateway["nonce"]), proof["site"].encode()]
        parts += [proof["name"].encode(), public, gateway["epoch"].encode(), hashed]
        signed = b"guestpass tunnel v1\0" + b"".join(len(part).to_bytes(2, "big") + part for part in parts)
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(wire.unbase64url(proof["signature"]), signed)
        except InvalidSignature:
            raise Failed("the signature does not fit") from None

    async def join(self, **changes: Any) -> Peer:
        """Let in, its INFO read."""
        peer = await self.greet(**changes)
        peer.write(wire.document(wire.AUTH, {"step": "verdict", "ok": True, "later": 1}))
        info = json.loads((await peer.next(wire.INFO))[3])
        expect(SERVICE in info.get("services", {}), f"INFO without the service: {info}")
        return peer

    async def response(self, peer: Peer, number: int, *, credit: bool = True) -> tuple[int, bytes]:
        """(status, body) of a stream, read to its end."""
        kind, flags, which, payload = await peer.next(wire.HEAD, wire.RESET)
        expect(
            kind == wire.HEAD and which == number,
            f"frame of type {kind} of stream {which}, not HEAD of {number}",
        )
        size = int.from_bytes(payload[:2], "big")
        start, body = payload[2 : 2 + size], payload[2 + size :]
        expect(start.startswith(b"HTTP/1.1 ") and start.endswith(b"\r\n\r\n"), f"a head of {start!r}")
        expect(not websocket.field(start, b"transfer-encoding"), "Transfer-Encoding in a response's head")
        limit = FLOOR
        while not flags & wire.FIN and kind != wire.TRAILERS:
            kind, flags, which, payload = await peer.next(wire.DATA, wire.TRAILERS, wire.RESET)
            expect(kind != wire.RESET and which == number, f"frame of type {kind} of stream {which}")
            body += payload if kind == wire.DATA else b""
            expect(len(body) <= limit, f"{len(body)} bytes with credit for {limit}")
            if credit and limit - len(body) < FLOOR // 2:
                limit = len(body) + FLOOR
                peer.write(wire.u64(wire.CREDIT, limit, number))
        return int(start.split(b" ")[1]), body


def get(path: str) -> bytes:
    return head(f"GET {path} HTTP/1.1\nHost: share.example")


@of_gateway("1", "the upgrade request is what chapter 1 says")
async def gateway_upgrade(edge: AsEdge) -> None:
    await edge.dialled()
    request = edge.heads[-1]
    lines = request.split(b"\r\n")
    expect(lines[0] == b"GET /.guestpass/tunnel HTTP/1.1", f"{lines[0]!r}")
    wanted = {
        b"upgrade": b"websocket",
        b"sec-websocket-version": b"13",
        b"sec-websocket-protocol": b"guestpass.v1",
    }
    for name, value in wanted.items():
        expect(
            websocket.field(request, name).lower() == value,
            f"{name.decode()}: {websocket.field(request, name)!r}",
        )
    expect(websocket.field(request, b"host") == urlsplit(edge.url).netloc.encode(), "another Host")
    expect(
        len(websocket.field(request, b"sec-websocket-key")) == 24, "a Sec-WebSocket-Key that is not 16 bytes"
    )


@of_gateway("7", "HELLO is sent without waiting for the edge's; the proof holds; INFO names the service")
async def gateway_handshake(edge: AsEdge) -> None:
    peer = await edge.dialled()
    await peer.expect_hello("gateway")
    await peer.quiet(wire.AUTH, wire.INFO)
    fields, nonce = edge.hello()
    peer.write(wire.document(wire.HELLO, fields))
    edge.check_proof(json.loads((await peer.next(wire.AUTH))[3]), fields, nonce, peer.hello)
    peer.write(wire.document(wire.AUTH, {"step": "verdict", "ok": True}))
    info = json.loads((await peer.next(wire.INFO))[3])
    expect(SERVICE in info.get("services", {}), f"INFO without the service: {info}")


@of_gateway(
    "12",
    "unknown fields and steps are ignored, absent ones have defaults, a higher version is spoken down to",
)
async def gateway_versions(edge: AsEdge) -> None:
    peer = await edge.dialled()
    fields, _ = edge.hello(version=9, later=[1])
    for name in ("software", "floor", "max_streams"):
        del fields[name]
    peer.write(wire.document(wire.HELLO, fields), wire.document(wire.AUTH, {"step": "later", "ok": 5}))
    await peer.next(wire.AUTH)
    peer.write(wire.document(wire.AUTH, {"step": "verdict", "ok": True, "later": {}}))
    peer.write(wire.document(wire.INFO, {"edges": [], "drain": False, "later": 1}))
    peer.write(open_frame(1, get("/big")))
    received = 0
    while received < wire.FLOOR:  # the default, and not a byte more
        kind, _, _, payload = await peer.next(wire.DATA, wire.HEAD)
        received += (
            len(payload) if kind == wire.DATA else len(payload) - 2 - int.from_bytes(payload[:2], "big")
        )
    expect(received == wire.FLOOR, f"{received} bytes with the default credit")
    await peer.quiet(wire.DATA)


@of_gateway("2", "unknown frame types are skipped, whatever their flags, id and length")
async def gateway_unknown_types(edge: AsEdge) -> None:
    peer = await edge.join()
    for kind in (13, 14, 100, 255):
        peer.write(wire.frame(kind, 0, b""), wire.frame(kind, 2**31 - 1, os.urandom(65_535), 255))
    await peer.alive()


@of_gateway("1", "frames may be cut anywhere, across messages and fragments, with WebSocket pings between")
async def gateway_cuts(edge: AsEdge) -> None:
    peer = await edge.join()
    wanted = wire.u64(wire.PING, 2**63 + 5)
    for byte in wanted[:6]:
        peer.write(bytes((byte,)))
    frame = peer.carrier.frame
    peer.carrier.raw(frame(0x80, wanted[6:7])[:0] + frame(0x80 | websocket.PING, b"between"))
    peer.carrier.raw(
        frame(websocket.BINARY, wanted[6:9]) + frame(websocket.CONTINUATION, b"") + frame(0x80, wanted[9:])
    )
    expect((await peer.next(wire.PONG))[3] == wanted[8:], "another PONG")


@of_gateway("2.2", "a GET is answered with HEAD, DATA and FIN; streams live side by side")
async def gateway_get(edge: AsEdge) -> None:
    peer = await edge.join()
    peer.write(open_frame(1, get("/wait")), open_frame(2, get("/hello")))
    status, body = await edge.response(peer, 2)
    expect((status, body) == (200, b"hello"), f"{status} {body!r}")


@of_gateway("4", "a response stops at the credit, and goes on exactly to where it was raised")
async def gateway_honours_credit(edge: AsEdge) -> None:
    peer = await edge.join()
    peer.write(open_frame(1, get("/big")))
    payload = (await peer.next(wire.HEAD))[3]
    received = len(payload) - 2 - int.from_bytes(payload[:2], "big")
    for limit in (FLOOR, FLOOR + 9000, FLOOR + 300_000):
        if limit > FLOOR:
            peer.write(wire.u64(wire.CREDIT, limit, 1))
        while received < limit:
            received += len((await peer.next(wire.DATA))[3])
        expect(received == limit, f"{received} bytes with credit for {limit}")
        await peer.quiet(wire.DATA)
    peer.write(open_frame(2, get("/hello")))
    expect((await edge.response(peer, 2))[1] == b"hello", "another stream is held up")
    peer.write(wire.u64(wire.CREDIT, 2**64 - 1, 1))
    flags = 0
    while not flags & wire.FIN:
        _, flags, _, payload = await peer.next(wire.DATA)
        received += len(payload)
    expect(received == 4_000_000, f"{received} bytes")


@of_gateway("4", "credit is given as the service reads, and an upload arrives whole")
async def gateway_upload(edge: AsEdge) -> None:
    peer = await edge.join()
    request = head("POST /count HTTP/1.1\nHost: share.example\nContent-Length: 2000000")
    peer.write(open_frame(1, request, body=bytes(5000), fin=False))
    sent, limit = 5000, peer.hello.get("floor", wire.FLOOR)
    while sent < 2_000_000:
        if sent == limit:
            offset = int.from_bytes((await peer.next(wire.CREDIT))[3], "big")
            expect(offset > limit, f"credit went from {limit} to {offset}")
            limit = offset
        size = min(16_368, limit - sent, 2_000_000 - sent)
        sent += size
        peer.write(wire.frame(wire.DATA, 1, bytes(size)))
    peer.write(wire.frame(wire.DATA, 1, b"", wire.FIN))
    status, body = await edge.response(peer, 1)
    expect((status, body) == (200, b"2000000"), f"{status} {body!r}")


@of_gateway("3", "RESET ends the work at the service; RESET_ACK comes when that has really ended")
async def gateway_reset(edge: AsEdge) -> None:
    peer = await edge.join()
    peer.write(open_frame(1, get("/wait")))
    async with asyncio.timeout(PATIENCE):
        while not edge.service.waiting:
            await asyncio.sleep(0.01)
    peer.write(wire.reset(1, wire.CANCEL))
    expect((await peer.next(wire.RESET_ACK))[2] == 1, "RESET_ACK of another stream")
    async with asyncio.timeout(PATIENCE):
        while edge.service.waiting:
            await asyncio.sleep(0.01)
    peer.write(wire.u64(wire.CREDIT, 2**40, 1), wire.reset(1, 5), open_frame(2, get("/hello")))
    expect((await edge.response(peer, 2))[0] == 200, "no answer")


@of_gateway("2.1", "RESET of the next id in place of OPEN uses it up")
async def gateway_burned(edge: AsEdge) -> None:
    peer = await edge.join()
    peer.write(wire.reset(1, wire.CANCEL), wire.reset(2, wire.CANCEL), open_frame(3, get("/hello")))
    expect((await edge.response(peer, 3))[0] == 200, "no answer")


@of_gateway("2.1", "a service that it does not offer is reset with REFUSED")
async def gateway_refuses(edge: AsEdge) -> None:
    peer = await edge.join()
    peer.write(open_frame(1, get("/hello"), service="other"))
    _, _, number, payload = await peer.next(wire.RESET)
    expect(number == 1 and int.from_bytes(payload, "big") == wire.REFUSED, f"RESET with {payload.hex()}")
    peer.write(wire.frame(wire.RESET_ACK, 1), open_frame(2, get("/hello")))
    expect((await edge.response(peer, 2))[0] == 200, "no answer")


@of_gateway("2.3", "a malformed request head costs its stream, not the tunnel")
async def gateway_malformed_head(edge: AsEdge) -> None:
    peer = await edge.join()
    heads = (
        b"GET / HTTP/1.1\r\nhost: a\nx: y\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad name: x\r\n\r\n",
    )
    for number, request in enumerate(heads, 1):
        peer.write(open_frame(number, request))
        _, _, which, _ = await peer.next(wire.RESET)
        expect(which == number, f"RESET of {which}")
        peer.write(wire.frame(wire.RESET_ACK, number))
    await peer.alive()


@of_gateway("3", "frames for streams that are closed are dropped without a reply")
async def gateway_closed(edge: AsEdge) -> None:
    peer = await edge.join()
    peer.write(open_frame(1, get("/hello")))
    await edge.response(peer, 1)
    peer.write(wire.frame(wire.DATA, 1, b"x"), wire.u64(wire.CREDIT, 1, 1), wire.reset(1, 5))
    await peer.alive()


def breaks(chapter: str, name: str, code: int, *frames: bytes, verdict: bool = True) -> None:
    """A check that those frames, each sequence in a tunnel of its own, end it with that code."""

    @of_gateway(chapter, name)
    async def check(edge: AsEdge) -> None:
        for number, frame in enumerate(frames):
            if number:
                await edge.fresh()
            peer = await (edge.join() if verdict else edge.greet())
            peer.write(frame)
            await peer.ended(code)


HELLO_AGAIN = wire.document(
    wire.HELLO, {"version": 1, "role": "edge", "nonce": "A" * 43, "epoch": "1", "edge": "x"}
)
UPLOAD = open_frame(1, head("POST /count HTTP/1.1\nHost: share.example\nContent-Length: 9000000"), fin=False)
WAITING = open_frame(1, get("/wait"), fin=False)

breaks(
    "2", "bit 31 is PROTOCOL_ERROR", wire.PROTOCOL_ERROR, wire.frame(wire.DATA, 2**31), wire.frame(200, 2**31)
)
breaks(
    "2",
    "a length outside of the table is PROTOCOL_ERROR before the payload has come",
    wire.PROTOCOL_ERROR,
    *(
        length.to_bytes(2, "big") + wire.frame(kind, 0 if kind >= wire.PING else 1)[2:]
        for kind, length in ((wire.DATA, 16_369), (wire.CREDIT, 7), (wire.RESET_ACK, 1), (wire.AUTH, 16_385))
    ),
)
breaks(
    "2",
    "a stream's frame without an id, or a tunnel's with one, is PROTOCOL_ERROR",
    wire.PROTOCOL_ERROR,
    wire.u64(wire.CREDIT, 9),
    wire.u64(wire.PING, 9, 1),
)
breaks("7", "a second HELLO is PROTOCOL_ERROR", wire.PROTOCOL_ERROR, HELLO_AGAIN)
breaks(
    "7",
    "OPEN before the verdict is PROTOCOL_ERROR",
    wire.PROTOCOL_ERROR,
    open_frame(1, get("/")),
    verdict=False,
)
breaks(
    "2.1",
    "ids that do not rise by one, and frames for ids never opened, are PROTOCOL_ERROR",
    wire.PROTOCOL_ERROR,
    open_frame(2, get("/")),
    WAITING * 2,
    wire.frame(wire.DATA, 1, b"x"),
    wire.reset(2, 5),
)
breaks("2.2", "HEAD from an edge is PROTOCOL_ERROR", wire.PROTOCOL_ERROR, WAITING + head_frame(1, OK))
breaks(
    "2.1",
    "an OPEN whose name or head does not fit is PROTOCOL_ERROR",
    wire.PROTOCOL_ERROR,
    wire.frame(wire.OPEN, 1, b"\0\1\0\0"),
    wire.frame(wire.OPEN, 1, b"\2a\n\1\0\0"),
    wire.frame(wire.OPEN, 1, b"\1a\1\0\5GET"),
)
breaks("6", "a head over 32,768 bytes is LIMIT_EXCEEDED", wire.LIMIT_EXCEEDED, open_frame(1, bytes(32_769)))
breaks(
    "4",
    "a burst beyond the credit is FLOW_CONTROL_ERROR",
    wire.FLOW_CONTROL_ERROR,
    UPLOAD + wire.frame(wire.DATA, 1, bytes(16_368)) * 500,
)
breaks(
    "4",
    "CREDIT that does not grow is FLOW_CONTROL_ERROR",
    wire.FLOW_CONTROL_ERROR,
    WAITING + wire.u64(wire.CREDIT, FLOOR, 1),
    WAITING + wire.u64(wire.CREDIT, 2**64 - 1, 1) * 2,
)
breaks(
    "3",
    "body after FIN, RESET_ACK without RESET, and RESET twice are PROTOCOL_ERROR",
    wire.PROTOCOL_ERROR,
    open_frame(1, get("/wait")) + wire.frame(wire.DATA, 1, b"x"),
    WAITING + wire.frame(wire.RESET_ACK, 1),
)


@of_gateway("7", "frames before HELLO, and JSON that is none, are PROTOCOL_ERROR")
async def gateway_before_hello(edge: AsEdge) -> None:
    for first in (
        wire.u64(wire.PING, 1),
        wire.frame(200, 0, b"x"),
        wire.frame(wire.HELLO, 0, b"{"),
        HELLO_AGAIN[:8] + b"[]",
    ):
        peer = await edge.dialled()
        peer.write(first[:8] if first.endswith(b"[]") else first)
        if first.endswith(b"[]"):
            peer.write(b"[]" + b" " * (int.from_bytes(first[:2], "big") - 2))
        await peer.ended(wire.PROTOCOL_ERROR)
        await edge.fresh()


@of_gateway("9", "a silent edge is sent a PING after 3 s, and left after 6")
async def gateway_liveness(edge: AsEdge) -> None:
    peer = await edge.join()
    peer.pongs = False
    began = time.monotonic()
    await peer.alive()
    await peer.next(wire.PING, seconds=SILENCE)
    try:
        async with asyncio.timeout(SILENCE):
            while True:
                await wire.read_frame(peer.carrier)
    except TimeoutError:
        raise Failed("it waits for ever") from None
    except (ConnectionError, EOFError):
        expect(time.monotonic() - began > 5.9, f"the end came after {time.monotonic() - began:.1f} s")


@of_gateway("10", "asked to leave, it brings up another tunnel while a live stream goes on")
async def gateway_replaces(edge: AsEdge) -> None:
    for asked in (
        wire.document(wire.INFO, {"drain": True, "edges": []}),
        wire.goaway(wire.LAST_ID, wire.DRAINING),
    ):
        first = await edge.join()
        first.write(open_frame(1, get("/big")), asked)
        second = await edge.join()
        second.write(open_frame(1, get("/hello")))
        expect((await edge.response(second, 1))[0] == 200, "the other tunnel does not serve")
        kind = -1
        while kind != wire.HEAD:
            kind = (await first.next(wire.HEAD, wire.GOAWAY))[0]
        first.write(wire.u64(wire.CREDIT, 2**40, 1))
        flags, received = 0, 0
        while not flags & wire.FIN:
            kind, flags, _, payload = await first.next(wire.DATA, wire.GOAWAY)
            flags, received = (flags, received + len(payload)) if kind == wire.DATA else (0, received)
        expect(received >= 3_900_000, f"{received} bytes of the first one's response")
        await edge.fresh()


@of_gateway("10", "a tunnel that is lost is dialled again")
async def gateway_returns(edge: AsEdge) -> None:
    peer = await edge.join()
    peer.carrier.abort("cut")
    await edge.join()


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def run_check(check: Check, subject: Any, chapter: str, name: str) -> Result:
    try:
        async with asyncio.timeout(120):
            await check(subject)
    except Failed as exc:
        return Result(name, chapter, "FAIL", str(exc))
    except Skipped as exc:
        return Result(name, chapter, "skipped", str(exc))
    except wire.Wrong as exc:
        return Result(name, chapter, "FAIL", f"the peer broke the protocol: {exc}")
    except (OSError, EOFError, TimeoutError, ValueError, KeyError, TypeError) as exc:
        return Result(name, chapter, "FAIL", f"{type(exc).__name__}: {exc}")
    return Result(name, chapter, "pass")


async def run(options: argparse.Namespace) -> list[Result]:
    results = []

    def note(result: Result) -> None:
        results.append(result)
        print(f"{result.outcome:8} {result.chapter:5} {result.name}", flush=True)
        if result.detail:
            print(f"{'':14} {result.detail}", flush=True)

    wanted = options.only or ""
    if options.edge:
        gateway = AsGateway(options)
        await gateway.enrol()
        for chapter, name, check in EDGE_CHECKS:
            if wanted in name:
                note(await run_check(check, gateway, chapter, name))
                gateway.forget()
        return results
    waiting = [(chapter, name, check) for chapter, name, check in GATEWAY_CHECKS if wanted in name]

    async def lane(number: int, folder: Path) -> None:
        """Check after check, each with a gateway process of its own."""
        edge = AsEdge(options, folder / str(number))
        await edge.start()
        try:
            while waiting:
                chapter, name, check = waiting.pop(0)
                await edge.fresh()
                note(await run_check(check, edge, chapter, name))
        finally:
            await edge.stop()

    with tempfile.TemporaryDirectory() as folder:
        await asyncio.gather(*(lane(number, Path(folder)) for number in range(options.jobs)))
        if options.log:
            for number in range(options.jobs):
                print((Path(folder) / str(number) / "gateway.log").read_text("utf-8", "replace"))
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--edge", help="URL of the edge to be checked")
    which.add_argument("--gateway", help="command of the gateway to be checked, with {edge}, {key} and so on")
    parser.add_argument("--ca", help="trust this CA only (PEM)")
    parser.add_argument("--join-token-file", help="edge: file with a join token, to enrol a key for this run")
    parser.add_argument("--api", help="edge: URL of its API, if that is another one")
    parser.add_argument("--key", help="edge: an enrolled key instead of a token (PEM); needs --site")
    parser.add_argument("--site", help="edge: the site of --key")
    parser.add_argument("--name", default="conformance", help="edge: the gateway's name")
    parser.add_argument("--service", default=SERVICE, help="edge: name of the service that --share is of")
    parser.add_argument("--share", help="edge: URL of a share; without it, what needs a visitor is skipped")
    parser.add_argument("--bearer-file", help="edge: file with a bearer token for the share")
    parser.add_argument(
        "--tls", nargs=2, metavar=("CERT", "KEY"), help="gateway: speak https with this certificate"
    )
    parser.add_argument("--jobs", type=int, default=4, help="gateway: checks at the same time (default 4)")
    parser.add_argument("--log", action="store_true", help="gateway: print what it logged")
    parser.add_argument("--only", metavar="TEXT", help="only rules with this in their name")
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    if options.edge and not options.join_token_file and not (options.key and options.site):
        parser.error("--edge needs --join-token-file, or --key and --site")
    if options.share and not options.bearer_file:
        parser.error("--share needs --bearer-file")
    return options


def main() -> int:
    options = arguments()
    results = asyncio.run(run(options))
    count = {outcome: sum(r.outcome == outcome for r in results) for outcome in ("pass", "FAIL", "skipped")}
    print(", ".join(f"{number} {outcome}" for outcome, number in count.items()))
    if options.json:
        subject = {"edge": options.edge} if options.edge else {"gateway": options.gateway}
        document = {**subject, **count, "rules": [vars(result) for result in results]}
        Path(options.json).write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    return 1 if count["FAIL"] or not results else 0


if __name__ == "__main__":
    sys.exit(main())
