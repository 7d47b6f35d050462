"""The client of websocket.py, a process of its own.

    python ws_client.py echo PORT --connections 64 --seconds 2 --size 100 --header 'Host: …'    one JSON line
    python ws_client.py hold PORT --connections 10000 --header 'Host: …'    opens them, holds them until SIGTERM

`echo`: each connection sends a message, waits for the same bytes, sends the next. picows, on uvloop: what a message
costs here is small beside what it costs on its way. `hold`: the handshake as bytes and a protocol that does nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from typing import Any, cast

import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

# Handshakes under way at a time: the accept queue of everything on the way is larger.
BATCH = 100

KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455's example; nothing depends on its being random


class Pinger(WSListener):
    """One connection."""

    def __init__(self, message: bytes, counts: Counts) -> None:
        super().__init__()
        self.message = message
        self.counts = counts
        self.sent = 0.0
        self.transport: WSTransport | None = None

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        counts = self.counts
        now = time.perf_counter()
        if frame.get_payload_as_bytes() != self.message:
            counts.wrong += 1
        elif counts.begin <= self.sent:
            counts.seconds.append(now - self.sent)
        if now < counts.end:
            self.send()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        if time.perf_counter() < self.counts.end:
            self.counts.lost += 1

    def send(self) -> None:
        assert self.transport is not None
        self.sent = time.perf_counter()
        self.transport.send(WSMsgType.BINARY, self.message)


class Counts:
    begin = end = float("inf")
    wrong = lost = 0

    def __init__(self) -> None:
        self.seconds: list[float] = []


async def echo(args: argparse.Namespace, headers: list[tuple[str, str]]) -> dict[str, Any]:
    counts = Counts()
    message = os.urandom(args.size)
    pingers = []
    for _ in range(args.connections):
        _, pinger = await ws_connect(
            lambda: Pinger(message, counts),
            f"ws://127.0.0.1:{args.port}/echo",
            extra_headers=headers,
            use_aiofastnet=False,
            websocket_handshake_timeout=30,
        )
        pingers.append(pinger)
    # The first half second warms up.
    counts.begin = time.perf_counter() + 0.5
    counts.end = counts.begin + args.seconds
    for pinger in pingers:
        pinger.send()
    await asyncio.sleep(0.5 + args.seconds + 0.2)
    seconds = sorted(counts.seconds)
    for pinger in pingers:
        pinger.transport.disconnect()
    times = os.times()
    return {
        "messages": len(seconds),
        "rate": len(seconds) / args.seconds,
        "p50": seconds[len(seconds) // 2] * 1e6 if seconds else 0,
        "p99": seconds[len(seconds) * 99 // 100] * 1e6 if seconds else 0,
        "wrong": counts.wrong,
        "lost": counts.lost,
        "cpu": times.user + times.system,
    }


class Holder(asyncio.Protocol):
    """Opens, and does nothing more."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.open: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self.request)

    def data_received(self, data: bytes) -> None:
        if self.open.done():
            return
        self.received += data
        if b"\r\n\r\n" in self.received:
            self.open.set_result(self.received.startswith(b"HTTP/1.1 101"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.open.done():
            self.open.set_result(False)


async def hold(args: argparse.Namespace, headers: list[tuple[str, str]]) -> None:
    lines = ["GET /echo HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    lines += ["Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Key: {KEY}"]
    lines += ["Sec-WebSocket-Version: 13", "", ""]
    request = "\r\n".join(lines).encode()
    loop = asyncio.get_running_loop()
    kept = []  # transports: one that nobody refers to would be closed
    opened = 0
    for start in range(0, args.connections, BATCH):
        number = min(BATCH, args.connections - start)
        pairs = await asyncio.gather(
            *(loop.create_connection(lambda: Holder(request), "127.0.0.1", args.port) for _ in range(number))
        )
        kept += pairs
        opened += sum(await asyncio.gather(*(holder.open for _, holder in pairs)))
    print(json.dumps({"open": opened}), flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("echo", "hold"))
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--header", action="append", default=[])
    args = parser.parse_args()
    headers = [(name, value) for name, _, value in (header.partition(": ") for header in args.header)]
    if args.what == "hold":
        uvloop.run(hold(args, headers))
    else:
        print(json.dumps(uvloop.run(echo(args, headers))))


if __name__ == "__main__":
    main()
