"""Visitors with very many live streams, in a process of their own: what they see must not wait for the test.

Reads a JSON object per line and answers each with one:

    {"open": [[id, kind, host, token], …]}   opens streams; answers when each has begun: {"instance": {id: name}}
    {"ended": true}                          which ended since, and when: {"ended": {id: seconds}, "bytes": {id: n}}

Kinds are those of stream_app.py. Times are of the monotonic clock, which all processes of a machine share.

python stream_client.py PORT
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections import deque
from typing import Any, cast

import uvloop

PORT = int(sys.argv[1])
# Connections that are being opened at once.
OPENING = 100
OPEN_SECONDS = 60.0
ROUND_SECONDS = 5.0
SLICES = 100

REQUESTS = {
    "download": "GET /download HTTP/1.1\r\n",
    "sse": "GET /sse HTTP/1.1\r\nAccept: text/event-stream\r\n",
    "socket": "GET /socket HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    "upload": "POST /upload HTTP/1.1\r\nTransfer-Encoding: chunked\r\n",
}
PIECE = b"3e8\r\n" + bytes(1000) + b"\r\n"

ended: dict[str, float] = {}
streams: dict[str, Visitor] = {}
uploading: deque[Visitor] = deque()


class Visitor(asyncio.Protocol):
    def __init__(self, name: str, kind: str, host: str, token: str) -> None:
        self.name, self.kind = name, kind
        self.request = f"{REQUESTS[kind]}Host: {host}\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        self.begun: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.received = 0
        self.head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from it
        self.transport.write(self.request + (PIECE if self.kind == "upload" else b""))
        if self.kind == "upload":
            uploading.append(self)
            self.begun.set_result("")  # there is no answer before the end of the body

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self.begun.done():
            return
        self.head += data
        head, end, body = self.head.partition(b"\r\n\r\n")
        if end and body:
            status = head.split(b" ", 2)[1]
            if status not in (b"200", b"101"):
                self.begun.set_exception(RuntimeError(f"{self.kind}: {head[:200]!r}"))
                return
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
            self.begun.set_result(fields[b"x-instance"].decode())

    def connection_lost(self, exc: Exception | None) -> None:
        ended[self.name] = time.monotonic()
        streams.pop(self.name, None)
        if self.kind == "upload":
            uploading.remove(self)
        if not self.begun.done():
            self.begun.set_exception(ConnectionResetError(f"{self.kind}: {self.head[:200]!r}"))


async def open_all(wanted: list[list[str]]) -> dict[str, str]:
    room = asyncio.Semaphore(OPENING)
    instances: dict[str, str] = {}

    async def one(name: str, kind: str, host: str, token: str) -> None:
        async with room, asyncio.timeout(OPEN_SECONDS):
            _, visitor = await asyncio.get_running_loop().create_connection(
                lambda: Visitor(name, kind, host, token), "127.0.0.1", PORT
            )
            streams[name] = visitor
            try:
                instances[name] = await visitor.begun
            except asyncio.CancelledError:
                print(f"{kind} has not begun: {visitor.head[:300]!r}", file=sys.stderr)
                raise

    async with asyncio.TaskGroup() as group:
        for line in wanted:
            group.create_task(one(*line))
    return instances


async def upload() -> None:
    """Send a little on every upload, in turn."""
    while True:
        for _ in range(-(-len(uploading) // SLICES)):
            visitor = uploading[0]
            uploading.rotate(-1)
            if not visitor.transport.is_closing():
                visitor.transport.write(PIECE)
        await asyncio.sleep(ROUND_SECONDS / SLICES)


async def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    task = asyncio.create_task(upload())
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command: dict[str, Any] = json.loads(line)
        if "open" in command:
            answer: dict[str, Any] = {"instance": await open_all(command["open"])}
        else:
            answer = {"ended": dict(ended), "bytes": {name: v.received for name, v in streams.items()}}
            ended.clear()
        print(json.dumps(answer), flush=True)
    task.cancel()


if __name__ == "__main__":
    uvloop.run(main())
