"""An application for fault tests. Every answer names the instance that gave it.

    GET  /              200 bytes
    GET  /slow/SECONDS  after a while
    GET  /bytes/N       N bytes
    GET  /forever       one block after another
    POST /once/ID       remembers ID; GET /twice answers which came more than once
    POST /echo          sends the body back while it comes

python fault_app.py NAME [ADDRESS]      prints its URL
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

NAME = sys.argv[1] if len(sys.argv) > 1 else "app"
BLOCK = bytes(range(256)) * 256  # 64 KiB
PAGE = b"x" * 200

seen: Counter[str] = Counter()


def head(status: str, size: int) -> bytes:
    return f"HTTP/1.1 {status}\r\nX-Instance: {NAME}\r\nContent-Length: {size}\r\n\r\n".encode()


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, target, _ = lines[0].split(" ")
            fields = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
            await answer(reader, writer, method, target.split("/")[1:], int(fields.get("content-length", 0)))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: list[str], size: int
) -> None:
    what = path[0]
    if what == "echo" and method == "POST":
        writer.write(head("200 OK", size))
        while size:
            data = await reader.read(min(size, len(BLOCK)))
            if not data:
                raise ConnectionResetError
            size -= len(data)
            writer.write(data)
            await writer.drain()
        return
    await reader.readexactly(size)
    if what == "once":
        seen[path[1]] += 1
        writer.write(head("200 OK", len(PAGE)) + PAGE)
    elif what == "twice":
        twice = " ".join(key for key, count in seen.items() if count > 1).encode()
        writer.write(head("200 OK", len(twice)) + twice)
    elif what == "slow":
        await asyncio.sleep(float(path[1]))
        writer.write(head("200 OK", len(PAGE)) + PAGE)
    elif what in ("bytes", "forever"):
        left = int(path[1]) if what == "bytes" else 1 << 40
        writer.write(head("200 OK", left))
        while left:
            writer.write(BLOCK[:left])
            left -= min(left, len(BLOCK))
            await writer.drain()
    else:
        writer.write(head("200 OK", len(PAGE)) + PAGE)


async def main() -> None:
    address = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1"
    server = await asyncio.start_server(talk, address, 0, limit=1 << 20)
    print("http://{}:{}".format(*server.sockets[0].getsockname()[:2]), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
