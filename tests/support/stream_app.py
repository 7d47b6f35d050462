"""An application whose answers never end, for tests with very many of them at once. A little is sent on each every few
seconds, in turn, so that ten thousand cost next to nothing and each is seen to live.

    GET  /download   bytes of a file that has no end
    GET  /sse        server-sent events
    GET  /socket     a WebSocket that sends messages, and reads past what it gets
    POST /upload     takes a body that has no end

python stream_app.py NAME      prints its URL
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import resource
import sys
from collections import deque
from typing import ClassVar, cast

import uvloop

NAME = sys.argv[1] if len(sys.argv) > 1 else "app"
# Everybody gets something once in so many seconds.
ROUND_SECONDS = 5.0
SLICES = 100
WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 §1.3

HEAD = f"HTTP/1.1 200 OK\r\nX-Instance: {NAME}\r\n".encode()
EVENT = b"data: alive\n\n"
PIECES = {
    b"/download": bytes(1000),
    b"/sse": b"%x\r\n%b\r\n" % (len(EVENT), EVENT),
    b"/socket": b"\x81\x05alive",
}


class Endless(asyncio.Protocol):
    talking: ClassVar[deque[Endless]] = deque()
    piece = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from it
        self.buffer = b""
        self.begun = False

    def data_received(self, data: bytes) -> None:
        if self.begun:
            return
        self.buffer += data
        head, end, _ = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return
        self.begun, self.buffer = True, b""
        path = head.split(b" ", 2)[1]
        if path == b"/upload":
            return
        self.piece = PIECES[path]
        if path == b"/download":
            answer = HEAD + b"Content-Length: %d\r\n\r\n" % (1 << 40)
        elif path == b"/sse":
            answer = HEAD + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        else:
            key = next(
                line.split(b":", 1)[1].strip()
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"sec-websocket-key:")
            )
            accept = base64.b64encode(hashlib.sha1(key + WEBSOCKET_GUID, usedforsecurity=False).digest())
            answer = (
                f"HTTP/1.1 101 Switching Protocols\r\nX-Instance: {NAME}\r\n".encode()
                + b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %b\r\n\r\n" % accept
            )
        self.transport.write(answer + self.piece)
        self.talking.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.piece:
            with contextlib.suppress(ValueError):
                self.talking.remove(self)

    @classmethod
    async def talk(cls) -> None:
        while True:
            for _ in range(-(-len(cls.talking) // SLICES)):
                one = cls.talking[0]
                cls.talking.rotate(-1)
                one.transport.write(one.piece)
            await asyncio.sleep(ROUND_SECONDS / SLICES)


async def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    server = await asyncio.get_running_loop().create_server(Endless, "127.0.0.1", 0, backlog=1000)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await Endless.talk()


if __name__ == "__main__":
    uvloop.run(main())
