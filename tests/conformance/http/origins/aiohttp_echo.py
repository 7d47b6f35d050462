"""aiohttp's server, saying what it was given: `python aiohttp_echo.py NAME PORT LOG`."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from aiohttp import web

BODYLESS = {"/status/204": 204, "/status/304": 304}


async def echo(request: web.Request) -> web.Response:
    body = await request.read()
    peer = request.get_extra_info("peername")
    seen = {
        "method": request.method,
        "target": request.raw_path,
        "length": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
        "connection": str(peer[1]),
    }
    log.write(json.dumps(seen).encode() + b"\n")
    headers = {"X-Seen": json.dumps(seen)}
    status = BODYLESS.get(request.path, 200)
    if status != 200:
        return web.Response(status=status, headers=headers)
    fields = [[k.decode("latin-1"), v.decode("latin-1")] for k, v in request.raw_headers]
    return web.json_response({"fields": fields, "cgi": False}, headers=headers)


if __name__ == "__main__":
    log = Path(sys.argv[3]).open("ab", buffering=0)  # noqa: SIM115 - as long as the program
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{tail:(?s:.*)}", echo)
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[2]),
        print=lambda _: print("ready", flush=True),
        access_log=None,
    )
