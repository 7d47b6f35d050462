"""A FastCGI application that says what it was given: `python fastcgi_echo.py NAME PORT LOG`. nginx and Apache ask it.

What HTTP servers make of a request reaches programs as CGI variables (RFC 3875), and here they are all told, so it is
seen what `X_Forwarded_For` and `X-Forwarded-For` become to a program. FastCGI streams bodies, so that chunked ones
come through as well. One request per connection, as both servers do it by default.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
import sys
from pathlib import Path

BEGIN, ABORT, END, PARAMS, STDIN, STDOUT = 1, 2, 3, 4, 5, 6
HEADER = struct.Struct("!BBHHBB")
BODYLESS = {"/status/204": 204, "/status/304": 304}


def pairs(data: bytes) -> list[tuple[str, str]]:
    """Names and values of a PARAMS stream."""
    found = []
    at = 0
    while at < len(data):
        sizes = []
        for _ in range(2):
            if data[at] & 0x80:
                sizes.append(int.from_bytes(data[at : at + 4], "big") & 0x7FFFFFFF)
                at += 4
            else:
                sizes.append(data[at])
                at += 1
        name, value = data[at : at + sizes[0]], data[at + sizes[0] : at + sum(sizes)]
        at += sum(sizes)
        found.append((name.decode("latin-1"), value.decode("latin-1")))
    return found


def record(kind: int, number: int, data: bytes) -> bytes:
    return b"".join(
        HEADER.pack(1, kind, number, len(part), 0, 0) + part
        for part in ([data[at : at + 65535] for at in range(0, len(data), 65535)] or [b""])
    )


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    params = b""
    digest = hashlib.sha256()
    length = 0
    try:
        while True:
            _, kind, number, size, padding, _ = HEADER.unpack(await reader.readexactly(HEADER.size))
            data = (await reader.readexactly(size + padding))[:size]
            if kind == PARAMS:
                params += data
            elif kind == STDIN and data:
                digest.update(data)
                length += len(data)
            elif kind == STDIN:
                break
            elif kind == ABORT:
                return
        variables = pairs(params)
        known = dict(variables)
        if known.get("CONTENT_LENGTH") and int(known["CONTENT_LENGTH"]) != length:
            return  # the visitor went away: half a request is none
        target = known["REQUEST_URI"]
        seen = {
            "method": known["REQUEST_METHOD"],
            "target": target,
            "length": length,
            "sha256": digest.hexdigest(),
            "connection": known["REMOTE_PORT"],
        }
        note(seen)
        status = BODYLESS.get(target.partition("?")[0], 200)
        body = b"" if status != 200 else json.dumps({"fields": variables, "cgi": True}).encode()
        head = f"Status: {status}\r\nContent-Type: application/json\r\nX-Seen: {json.dumps(seen)}\r\n"
        writer.write(record(STDOUT, number, head.encode("latin-1") + b"\r\n" + body))
        writer.write(record(STDOUT, number, b"") + record(END, number, bytes(8)))
        await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def note(seen: dict[str, object]) -> None:
    log.write(json.dumps(seen).encode() + b"\n")


async def main() -> None:
    async with await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[2])) as server:
        print("ready", flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    log = Path(sys.argv[3]).open("ab", buffering=0)  # noqa: SIM115 - as long as the program
    asyncio.run(main())
