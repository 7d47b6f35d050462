"""An application that writes whatever it is told to: `python raw_origin.py NAME PORT LOG`.

/raw/BASE64 is answered with exactly those bytes, /close/BASE64 too, and then the connection ends; /unasked/BASE64 with
an ordinary answer and, a moment later, with those bytes, which nobody asked for. Everything else is echoed like by the
other origins. "BASE64" is URL-safe.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
from pathlib import Path

UNASKED_AFTER = 0.05


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head[:-4].split("\r\n")
            method, target, _ = first.split(" ")
            fields = [line.split(": ", 1) for line in lines]
            known = {name.lower(): value for name, value in fields}
            body = b""
            if "transfer-encoding" in known:
                while size := int(await reader.readline(), 16):
                    body += (await reader.readexactly(size + 2))[:size]
                await reader.readline()
            elif "content-length" in known:
                body = await reader.readexactly(int(known["content-length"]))
            seen = {
                "method": method,
                "target": target,
                "length": len(body),
                "sha256": hashlib.sha256(body).hexdigest(),
                "connection": str(writer.get_extra_info("peername")[1]),
            }
            log.write(json.dumps(seen).encode() + b"\n")
            kind, _, encoded = target[1:].partition("/")
            data = base64.urlsafe_b64decode(encoded) if kind in ("raw", "close", "unasked") else b""
            if kind in ("raw", "close"):
                writer.write(data)
            else:
                text = json.dumps({"fields": fields, "cgi": False}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nX-Seen: %s\r\n" % json.dumps(seen).encode())
                writer.write(b"Content-Length: %d\r\n\r\n" % len(text))
                if method != "HEAD":
                    writer.write(text)
            await writer.drain()
            if kind == "unasked":
                await asyncio.sleep(UNASKED_AFTER)
                writer.write(data)
            if kind == "close":
                return
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main() -> None:
    async with await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[2]), limit=1 << 20) as server:
        print("ready", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    log = Path(sys.argv[3]).open("ab", buffering=0)  # noqa: SIM115 - as long as the program
    asyncio.run(main())
