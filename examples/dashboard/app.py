"""Sample dashboard: what `make demo` shares.

An ordinary aiohttp application that knows nothing of Guestpass, apart from one header that it shows. It has
what real dashboards have and what proxies tend to break: a live chart over a WebSocket, a log over
server-sent events, a form, an upload, and a download of any size. Every URL in it is relative, and nothing
comes from elsewhere.

    python examples/dashboard/app.py --port 0

prints one line, its URL, when it is ready, and runs until Ctrl-C.

The station is made up: a measurement and a log entry are functions of the time, so there is nothing to store,
every viewer sees the same, and a viewer who comes late or comes back gets the past as well.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import html
import json
import math
import random
import signal
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import WSMsgType, web

STATIC = Path(__file__).parent / "static"

SAMPLES_PER_SECOND = 5
HISTORY_SECONDS = 60  # what the chart shows
LOG_INTERVAL = 3  # seconds from one log entry to the next
LOG_BACKLOG = 12  # entries that a viewer gets at once
MAX_NOTES = 20  # the oldest leaves; nothing here grows without bound
MAX_NOTE_LENGTH = 500
BLOCK = 65536  # bytes of a download that are made, and of an upload that are read, at a time
MAX_DOWNLOAD_MB = 10_240
SHUTDOWN_SECONDS = 1.0  # for streams that would otherwise never end

LOG_LINES = (
    ("info", "Pump {n} took over as lead pump"),
    ("info", "Inlet screen cleaned, {n}0 mm head loss removed"),
    ("ok", "Self-test of level sensor {n} passed"),
    ("info", "Valve {n} moved to {p} %"),
    ("warn", "Bearing {n} runs {p} % above its usual vibration"),
    ("ok", "Vibration of bearing {n} back to normal"),
    ("info", "Set point of flow changed to 1{p} m³/h"),
    ("warn", "Wet well {n} at {p} % of its high level"),
)

VIEWERS: web.AppKey[set[web.WebSocketResponse]] = web.AppKey("viewers")
NOTES: web.AppKey[deque[dict[str, Any]]] = web.AppKey("notes")


# ── The station ─────────────────────────────────────────────────────────────────────────────────────────


def sample(tick: int) -> dict[str, float]:
    """The measurements at `tick` (there are SAMPLES_PER_SECOND of them in a second)."""
    at = tick / SAMPLES_PER_SECOND
    noise = random.Random(tick)
    flow = 124 + 17 * math.sin(at / 11) + 6 * math.sin(at / 2.7) + noise.uniform(-1.6, 1.6)
    pressure = 4.2 + 0.5 * math.sin(at / 11 + 0.9) + 0.16 * math.sin(at / 3.1) + noise.uniform(-0.04, 0.04)
    motor = 61 + 4 * math.sin(at / 47) + noise.uniform(-0.15, 0.15)
    return {"at": at, "flow": round(flow, 1), "pressure": round(pressure, 2), "motor": round(motor, 1)}


def log_entry(number: int) -> dict[str, Any]:
    """The log entry with this number; number × LOG_INTERVAL is its time."""
    pick = random.Random(number)
    level, text = pick.choice(LOG_LINES)
    return {
        "at": number * LOG_INTERVAL,
        "level": level,
        "text": text.format(n=pick.randint(1, 4), p=pick.randint(10, 48)),
    }


def download_block(index: int, body: bytes) -> bytes:
    """Block `index` of a download: its number, then the same bytes again and again.

    A receiver can tell a block that is missing, doubled, moved or damaged without keeping any of it.
    """
    return index.to_bytes(8, "big") + body[8:]


def block_body() -> bytes:
    return hashlib.shake_256(b"guestpass sample dashboard").digest(BLOCK)


def download_blocks(size: int) -> Iterator[bytes]:
    """The bytes of a download of `size` bytes, block by block. Tests verify with it what arrived."""
    body = block_body()
    for index in range(-(-size // BLOCK)):
        yield download_block(index, body)[: size - index * BLOCK]


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────────────


def signed_in(request: web.Request) -> str | None:
    """Who opened the share: the address that Guestpass has proven.

    This header is to be believed where only a gateway can reach the application; one that others reach too
    verifies X-Guestpass-Assertion instead.
    """
    return request.headers.get("X-Guestpass-Email")


async def index(request: web.Request) -> web.Response:
    page = (STATIC / "index.html").read_text("utf-8")
    who = signed_in(request)
    badge = f"Signed in as {html.escape(who)}" if who else "Opened directly, not through Guestpass"
    return web.Response(text=page.replace("{{who}}", badge), content_type="text/html")


async def live(request: web.Request) -> web.WebSocketResponse:
    """The chart: the last minute at once, then each measurement when it is made."""
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        raise web.HTTPForbidden(text="This WebSocket is for pages of this application.")
    socket = web.WebSocketResponse(heartbeat=20)
    await socket.prepare(request)
    viewers = request.app[VIEWERS]
    viewers.add(socket)
    pump = asyncio.create_task(_send_samples(socket, viewers))
    try:
        async for message in socket:
            if message.type is WSMsgType.TEXT and message.data == "ping":
                await socket.send_str("pong")
    finally:
        viewers.discard(socket)
        pump.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await pump
    return socket


async def _send_samples(socket: web.WebSocketResponse, viewers: set[web.WebSocketResponse]) -> None:
    tick = int(time.time() * SAMPLES_PER_SECOND)
    past = [sample(t) for t in range(tick - HISTORY_SECONDS * SAMPLES_PER_SECOND, tick)]
    await socket.send_str(json.dumps({"history": past}))
    while not socket.closed:
        await socket.send_str(json.dumps({"sample": sample(tick), "viewers": len(viewers)}))
        tick += 1
        await asyncio.sleep(max(0.0, tick / SAMPLES_PER_SECOND - time.time()))


async def log(request: web.Request) -> web.StreamResponse:
    """The log as server-sent events. A browser that reconnects says what it saw last and misses nothing."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(request)
    now = int(time.time() // LOG_INTERVAL)
    number = now - LOG_BACKLOG
    with contextlib.suppress(ValueError):
        number = max(number, int(request.headers.get("Last-Event-ID", "")) + 1)
    with contextlib.suppress(ConnectionError):
        while True:
            for due in range(number, now + 1):
                await response.write(f"id: {due}\ndata: {json.dumps(log_entry(due))}\n\n".encode())
            number = now + 1
            await asyncio.sleep(max(0.0, number * LOG_INTERVAL - time.time()))
            now = int(time.time() // LOG_INTERVAL)
    return response


async def notes(request: web.Request) -> web.Response:
    kept = request.app[NOTES]
    return web.json_response(list(kept), headers={"Cache-Control": "no-store"})


async def add_note(request: web.Request) -> web.Response:
    """The form. A script asks for JSON; a browser without one is sent back to the page."""
    text = str((await request.post()).get("text", "")).strip()
    if not text:
        raise web.HTTPBadRequest(text="The note is empty.")
    if len(text) > MAX_NOTE_LENGTH:
        raise web.HTTPBadRequest(text=f"The note is longer than {MAX_NOTE_LENGTH} characters.")
    request.app[NOTES].appendleft({"at": time.time(), "by": signed_in(request) or "someone", "text": text})
    if "application/json" in request.headers.get("Accept", ""):
        return await notes(request)
    raise web.HTTPSeeOther("./")


async def upload(request: web.Request) -> web.Response:
    """Counts and hashes what is sent, as it arrives, and keeps none of it."""
    digest, size, began = hashlib.sha256(), 0, time.monotonic()
    async for chunk in request.content.iter_chunked(BLOCK):
        digest.update(chunk)
        size += len(chunk)
    seconds = round(time.monotonic() - began, 3)
    return web.json_response({"bytes": size, "sha256": digest.hexdigest(), "seconds": seconds})


async def download(request: web.Request) -> web.StreamResponse:
    """`?mb=…` megabytes (10⁶ bytes) that no part of the way can have known before."""
    mb = request.query.get("mb", "10")
    if not (mb.isascii() and mb.isdigit() and 1 <= int(mb) <= MAX_DOWNLOAD_MB):
        raise web.HTTPBadRequest(text=f"mb must be a whole number from 1 to {MAX_DOWNLOAD_MB}.")
    size = int(mb) * 1_000_000
    response = web.StreamResponse(
        headers={
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f'attachment; filename="measurements-{mb}mb.bin"',
        }
    )
    response.content_length = size
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    with contextlib.suppress(ConnectionError):
        for block in download_blocks(size):
            await response.write(block)
    return response


# ── The application ─────────────────────────────────────────────────────────────────────────────────────


async def _set_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.setdefault("Content-Security-Policy", "default-src 'self'; img-src 'self' data:")
    response.headers.setdefault("X-Content-Type-Options", "nosniff")


async def _close_sockets(app: web.Application) -> None:
    viewers = app[VIEWERS]
    for socket in list(viewers):
        await socket.close()


def make_app() -> web.Application:
    app = web.Application()
    app[VIEWERS] = set()
    app[NOTES] = deque(maxlen=MAX_NOTES)
    app.add_routes(
        [
            web.get("/", index),
            web.get("/live", live),
            web.get("/log", log),
            web.get("/notes", notes),
            web.post("/notes", add_note),
            web.post("/upload", upload),
            web.get("/download", download),
            web.static("/static", STATIC),
        ]
    )
    app.on_response_prepare.append(_set_headers)
    app.on_shutdown.append(_close_sockets)
    return app


async def serve(host: str, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        make_app(), access_log=None, shutdown_timeout=SHUTDOWN_SECONDS, handler_cancellation=True
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        address = runner.addresses[0]
        print(f"http://{address[0]}:{address[1]}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description="A sample dashboard to share with Guestpass.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=3000, help="port, 0 for a free one (default: %(default)s)"
    )
    options = parser.parse_args()
    asyncio.run(serve(options.host, options.port))


if __name__ == "__main__":
    main()
