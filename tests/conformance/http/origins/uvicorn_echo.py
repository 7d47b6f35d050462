"""uvicorn with h11, saying what it was given: `python uvicorn_echo.py NAME PORT LOG`."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import uvicorn

BODYLESS = {"/status/204": 204, "/status/304": 304}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.startup":
                print("ready", flush=True)
            else:
                return
    digest = hashlib.sha256()
    length = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return  # the visitor went away: half a request is none
        digest.update(message.get("body", b""))
        length += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    seen = {
        "method": scope["method"],
        "target": target.decode("latin-1"),
        "length": length,
        "sha256": digest.hexdigest(),
        "connection": str(scope["client"][1]),
    }
    log.write(json.dumps(seen).encode() + b"\n")
    status = BODYLESS.get(scope["path"], 200)
    fields = [[k.decode("latin-1"), v.decode("latin-1")] for k, v in scope["headers"]]
    body = b"" if status != 200 else json.dumps({"fields": fields, "cgi": False}).encode()
    headers = [(b"x-seen", json.dumps(seen).encode())]
    if status == 200:
        headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


if __name__ == "__main__":
    log = Path(sys.argv[3]).open("ab", buffering=0)  # noqa: SIM115 - as long as the program
    uvicorn.run(
        echo,
        host="127.0.0.1",
        port=int(sys.argv[2]),
        http="h11",
        ws="none",
        log_level="warning",
        access_log=False,
    )
