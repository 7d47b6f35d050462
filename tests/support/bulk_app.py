"""An application for large bodies: `GET /N` answers N bytes, `POST /` answers how many came and their checksum.

python bulk_app.py        prints its URL
"""

from __future__ import annotations

import asyncio
import zlib

BLOCK = bytes(range(256)) * 1024  # 256 KiB


async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            method, target, _ = head.split("\r\n", 1)[0].split(" ")
            fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            if method == "POST":
                answer = await receive(reader, int(fields["content-length"]))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(answer), answer))
            else:
                size = int(target.strip("/").partition("?")[0] or 0)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
                while size:
                    writer.write(BLOCK[:size])
                    size -= min(size, len(BLOCK))
                    await writer.drain()
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def receive(reader: asyncio.StreamReader, size: int) -> bytes:
    left, checksum = size, 1
    while left:
        data = await reader.read(min(left, 1 << 20))
        if not data:
            break
        checksum = zlib.adler32(data, checksum)
        left -= len(data)
    return b"%d %d" % (size - left, checksum)


async def main() -> None:
    server = await asyncio.start_server(talk, "127.0.0.1", 0, limit=1 << 20)
    print("http://{}:{}".format(*server.sockets[0].getsockname()[:2]), flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
