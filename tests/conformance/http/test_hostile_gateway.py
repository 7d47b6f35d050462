"""A gateway that holds its key and lies: what it sends as answers cannot reach a visitor as anything but an answer.

It speaks the tunnel's protocol by the book (what breaks that is in tests/edge/test_tunnels.py), so it is a site's own
gateway gone bad. The edge trusts it neither with heads nor with framing; the visitors of others share only the process.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conformance.http.world import ERROR_ID, cut
from support.scoreboard import row
from support.stack import SITE, Stack, running
from support.tunnel import TestEdge, TestGateway

from guestpass.model import Gateway
from guestpass.mux.stream import StreamReset, TunnelStream
from guestpass.shares.store import gateways as gateway_rows

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"

Act = Callable[[TunnelStream], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Lie:
    name: str
    act: Act
    status: int | None
    """None: the answer breaks off. Else this is what the visitor gets."""
    body: bytes | None = None
    fields: tuple[tuple[str, tuple[str, ...]], ...] = ()
    method: str = "GET"


def says(head: bytes, *pieces: bytes, interim: bool = False) -> Act:
    """These bytes as the head, then as body, then the end."""

    async def act(stream: TunnelStream) -> None:
        stream.send_head(head, interim=interim)
        for piece in pieces:
            await stream.write(piece)
        stream.finish()

    return act


def more(*lines: bytes) -> bytes:
    return b"\r\n".join((b"HTTP/1.1 200 OK", b"Content-Length: 2", *lines, b"", b""))


LIES = (
    Lie("bare LF in the head", says(more(b"A: b\nSet-Cookie: evil=1"), b"ok"), 502),
    Lie("bare CR in the head", says(more(b"A: b\rSet-Cookie: evil=1"), b"ok"), 502),
    Lie("NUL in the head", says(more(b"A: b\0c"), b"ok"), 502),
    Lie("a folded field", says(more(b"A: b", b" c"), b"ok"), 502),
    Lie("a blank before the colon", says(more(b"A : b"), b"ok"), 502),
    Lie("no head at all", says(b"evil", b"ok"), 502),
    Lie("a head without an end", says(b"HTTP/1.1 200 OK\r\nA: b\r\n", b"ok"), 502),
    Lie("a head that goes on", says(OK + EVIL, b"ok"), 502),
    Lie("two heads", says(OK + b"\r\n", b"ok"), 502),
    Lie("two lengths", says(more(b"Content-Length: 4"), b"evil"), 502),
    Lie("a length of letters", says(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"ok"), 502),
    Lie("HTTP/1.0", says(b"HTTP/1.0 200 OK\r\n\r\n", b"ok"), 502),
    Lie("status 999", says(b"HTTP/1.1 999 X\r\n\r\n", b"ok"), 502),
    Lie(
        "101 unasked", says(b"HTTP/1.1 101 X\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", EVIL), 502
    ),
    Lie("an interim status as the final one", says(b"HTTP/1.1 103 Early Hints\r\n\r\n"), 502),
    Lie("a final status as an interim one", says(OK, interim=True), 502),
    Lie("more bytes than the head said", says(OK, b"ok" + EVIL), None),
    Lie("more bytes than the head said, later", says(OK, b"o", b"k", EVIL), None),
    Lie("fewer bytes than the head said", says(OK, b"o"), None),
    Lie("a body for HEAD", says(OK, EVIL), None, method="HEAD"),
    Lie("a body behind 204", says(b"HTTP/1.1 204 No Content\r\n\r\n", EVIL), None),
    Lie("a body behind 304", says(b"HTTP/1.1 304 Not Modified\r\n\r\n", EVIL), None),
    Lie(
        "chunks of its own",
        says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n"),
        200,
        b"0\r\n\r\n",  # the edge frames, so they are content
    ),
    Lie(
        "fields that the edge alone says",
        says(
            more(
                b"Connection: close, X-Hop",
                b"X-Hop: 1",
                b"Keep-Alive: timeout=5",
                b"X-Guestpass-Email: eve@evil.example",
                b'Clear-Site-Data: "*"',
                b'Alt-Svc: h3=":443"',
                b"Set-Cookie: __Host-guestpass=evil; Path=/; Secure",
                b"Set-Cookie: a=1; Domain=localhost",
                b"Cache-Control: public",
            ),
            b"ok",
        ),
        200,
        b"ok",
        (
            ("X-Hop", ()),
            ("Keep-Alive", ()),
            ("X-Guestpass-Email", ()),
            ("Clear-Site-Data", ()),
            ("Alt-Svc", ()),
            ("Set-Cookie", ("a=1",)),
            ("Cache-Control", ("private",)),
        ),
    ),
)

KEPT: list[str] = []


@pytest.fixture(params=["fast", "aiohttp"])
async def stack(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stack]:
    """An edge whose only gateway is a liar: it does what the path says, by number."""

    async def serve(stream: TunnelStream, service: str, head: bytes) -> None:
        kind, _, number = head.split(b" ")[1].partition(b"/")[2].partition(b"/")
        try:
            if kind == b"lie":
                await LIES[int(number)].act(stream)
            else:
                stream.send_head(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(number))
                await stream.write(number)
                stream.finish()
            await stream.wait_closed()
        except StreamReset:
            pass

    async with running(
        tmp_path, "http://127.0.0.1:1", gateways=0, edge={"fast_lane": request.param == "fast"}
    ) as made:
        gateway = TestGateway(serve=serve)
        enrolled = Gateway(SITE, gateway.name, gateway.key.public_key().public_bytes_raw(), time.time())
        await made.edge.service._store.write(lambda db: gateway_rows.insert(db, enrolled))
        edge: Any = TestEdge.__new__(TestEdge)
        edge.url, edge.ca, edge.tunnels = made.tunnel_url, made.ca, made.edge.tunnels
        await gateway.join(edge)
        if made.edge.lane.fast:
            await made.warm(made.share_id, made.token)
        yield made
        await gateway.close()


async def test_lies(stack: Stack) -> None:
    for number, lie in enumerate(LIES):
        data = stack.head(lie.method, f"/lie/{number}") + stack.head("GET", "/true/7", "Connection: close")
        received = await stack.raw(data)
        where = (lie.name, received)
        assert b"evil" not in received, where
        answers = cut(received, [lie.method, "GET"])
        if lie.status is None:
            # Its head may have gone out by then, or not.
            assert not answers or not answers[-1].whole or b"/true" not in received, where
            assert len(answers) <= 1, where
        else:
            first = answers[0]
            assert first.status == lie.status, where
            assert first.whole, where
            if lie.status == 502:
                assert ERROR_ID.search(first.body), where
            if lie.body is not None:
                assert first.body == lie.body, where
            for name, expected in lie.fields:
                assert tuple(first.all(name)) == expected, (name, where)
        # Whoever asks next gets an answer of their own.
        received = await stack.raw(stack.head("GET", f"/true/{number}", "Connection: close"))
        (answer,) = cut(received, ["GET"])
        assert (answer.status, answer.body) == (200, b"%d" % number), where
    await stack.until(lambda: stack.edge.grants.all_streams == 0, "no stream is left")
    KEPT.append("fast" if stack.edge.lane.fast else "aiohttp")
    if len(KEPT) == 2:
        row(
            "lies of a gateway",
            f"{len(LIES)} answers that are none, both lanes",
            "0 reached a visitor, 0 touched the next request",
            "0",
            ok=True,
        )
