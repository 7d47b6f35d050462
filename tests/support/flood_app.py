"""An application for floods, which takes and gives without end and costs little itself.

    GET  /              200 bytes
    GET  /forever       one block after another
    GET  /never         no answer
    GET  … Upgrade      101, then it swallows what comes
    POST /              swallows the body: answers when `Content-Length` bytes have come, else never

python flood_app.py         prints its URL
"""

from __future__ import annotations

import asyncio
from typing import cast

import uvloop

BLOCK = bytes(64 * 1024)
PAGE = b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n" + bytes(200)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
ENDLESS = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n" % (
    1 << 50
)


class Talk(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.head = b""
        self.swallow = 0
        self.endless = False
        self.writable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it

    def data_received(self, data: bytes) -> None:
        if self.swallow:
            self.take(len(data))
            return
        self.head += data
        head, found, rest = self.head.partition(b"\r\n\r\n")
        if not found:
            return
        self.head = b""
        lines = head.decode("latin-1").lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines[1:])
        if lines[0].startswith("post "):
            self.swallow = int(fields.get("content-length", 1 << 60))
            self.take(len(rest))
        elif "upgrade" in fields:
            self.swallow = 1 << 60
            self.transport.write(SWITCH)
        elif lines[0].startswith("get /forever "):
            self.endless = True
            self.transport.write(ENDLESS)
            self.give()
        elif not lines[0].startswith("get /never "):
            self.transport.write(PAGE)

    def take(self, size: int) -> None:
        self.swallow -= size
        if not self.swallow:
            self.transport.write(PAGE)

    def give(self) -> None:
        while self.endless and self.writable and not self.transport.is_closing():
            self.transport.write(BLOCK)

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        self.give()

    def connection_lost(self, exc: Exception | None) -> None:
        self.endless = False


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Talk, "127.0.0.1", 0, backlog=1024)
    print("http://{}:{}".format(*server.sockets[0].getsockname()[:2]), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
