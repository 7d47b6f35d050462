"""An application that is shared twice and counts what was done to it: `python neighbour_app.py PORT`.

What it counts, it counts for the share that it was asked through. GET /counts needs no share: the test asks directly.
"""

from __future__ import annotations

import json
import sys
from collections import Counter

from aiohttp import web

counts: Counter[str] = Counter()
DOMAIN = "share.localhost"

# Answers what the network does not: as a worker that outlives its share would.
WORKER = """
self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => event.respondWith(fetch(event.request)));
"""


def share(request: web.Request) -> str:
    return request.headers.get("X-Guestpass-Share", "nobody")


async def page(request: web.Request) -> web.Response:
    for what in ("page", request.headers.get("Sec-Fetch-Site", "unsaid")):
        counts[f"{share(request)} {what} {request.headers.get('X-Guestpass-Email')}"] += 1
    return web.Response(
        text="<!doctype html><title>application</title><p>secret</p>", content_type="text/html"
    )


async def act(request: web.Request) -> web.Response:
    await request.read()
    counts[f"{share(request)} act"] += 1
    return web.Response(text="done", headers={"Access-Control-Allow-Origin": "*"})


async def socket(request: web.Request) -> web.WebSocketResponse:
    counts[f"{share(request)} socket"] += 1
    made = web.WebSocketResponse()
    await made.prepare(request)
    await made.send_str("secret")
    await made.close()
    return made


async def cookies(request: web.Request) -> web.Response:
    return web.json_response(request.headers.getall("Cookie", []))


async def toss(request: web.Request) -> web.Response:
    response = web.Response(text="tossed")
    for value in (
        f"tossed-1=1; Domain={DOMAIN}; Path=/; Secure",
        f"tossed-2=1; Domain=.{DOMAIN}; Path=/",
        f"tossed-3=1; domain = {DOMAIN}",
        f"__Host-guestpass=evil; Domain={DOMAIN}; Path=/; Secure",
        f"=__Host-guestpass=evil; Domain={DOMAIN}; Path=/; Secure",
        "__Host-guestpass=evil; Path=/; Secure",
        "kept=1; Path=/",
    ):
        response.headers.add("Set-Cookie", value)
    return response


async def worker(request: web.Request) -> web.Response:
    return web.Response(text=WORKER, content_type="text/javascript", headers={"Service-Worker-Allowed": "/"})


async def tell(request: web.Request) -> web.Response:
    return web.Response(text=json.dumps(counts))


if __name__ == "__main__":
    app = web.Application()
    app.router.add_get("/", page)
    app.router.add_route("*", "/act", act)
    app.router.add_get("/socket", socket)
    app.router.add_get("/cookies", cookies)
    app.router.add_get("/toss", toss)
    app.router.add_get("/deep/worker.js", worker)
    app.router.add_get("/worker.js", worker)
    app.router.add_get("/counts", tell)
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        print=lambda _: print("ready", flush=True),
        access_log=None,
    )
