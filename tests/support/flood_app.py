"""An application for floods, which takes and gives without end and costs little itself.

    GET  /              200 bytes
    GET  /forever       one block after another
    GET  /never         no answer
    GET  … Upgrade      101, then it swallows what comes
    POST /              swallows the body: answers when `Content-Length` bytes have come, else never

python flood_app.py [NAME]      prints its URL
python flood_app.py sink        is what a flood is compared with: an edge that costs nothing. It also ends

    a head over 64 KiB          431
    a body over 2 MB            413
    a TLS handshake             an alert
"""

from __future__ import annotations

import asyncio
import resource
import socket
import sys
from typing import cast

import uvloop

BLOCK = bytes(64 * 1024)
PAGE = b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n" + bytes(200)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
ENDLESS = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n" % (
    1 << 50
)


SINK = sys.argv[1:] == ["sink"]
HEAD_BYTES = 64 * 1024
BODY_BYTES = 2_000_000
HANDSHAKE = b"\x16\x03"
ALERT = bytes((21, 3, 3, 0, 2, 2, 40))
TOO_LARGE = b"HTTP/1.1 %d Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Talk(asyncio.Protocol):
    def __init__(self) -> None:
        self.swallowed = 0
        self.transport: asyncio.Transport
        self.head = b""
        self.swallow = 0
        self.endless = False
        self.upgraded = False
        self.writable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it

    def data_received(self, data: bytes) -> None:
        if self.swallow:
            self.take(len(data))
            return
        self.head += data
        if SINK and self.head.startswith(HANDSHAKE):
            if len(self.head) > len(ALERT):
                self.close(ALERT)
            return
        head, found, rest = self.head.partition(b"\r\n\r\n")
        if not found:
            if SINK and len(self.head) > HEAD_BYTES:
                self.close(TOO_LARGE % 431)
            return
        self.head = b""
        lines = head.decode("latin-1").lower().split("\r\n")
        fields = dict(line.split(": ", 1) for line in lines[1:])
        if lines[0].startswith("post "):
            self.swallow = int(fields.get("content-length", 1 << 60))
            self.take(len(rest))
        elif "upgrade" in fields:
            self.swallow = 1 << 60
            self.upgraded = True
            self.transport.write(SWITCH)
        elif lines[0].startswith("get /forever "):
            self.endless = True
            self.transport.write(ENDLESS)
            self.give()
        elif not lines[0].startswith("get /never "):
            self.transport.write(PAGE)

    def close(self, answer: bytes) -> None:
        self.head = b""
        self.transport.write(answer)
        self.transport.close()

    def take(self, size: int) -> None:
        self.swallow -= size
        self.swallowed += size
        if SINK and self.swallowed > BODY_BYTES and not self.upgraded:
            self.close(TOO_LARGE % 413)
            return
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
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    # The kernel would take megabytes for each that does not read: of this process's time, which others wait for.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, len(BLOCK))
    server = await asyncio.get_running_loop().create_server(Talk, sock=sock, backlog=1024)
    print("http://{}:{}".format(*server.sockets[0].getsockname()[:2]), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(main())
