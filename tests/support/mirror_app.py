"""An application that sends back what it gets: the target and the fields of a request as lines, then its body, and the
messages of a WebSocket.

python mirror_app.py [NAME]      prints its URL
"""

from __future__ import annotations

import asyncio

from aiohttp import WSMsgType, web


async def mirror(request: web.Request) -> web.StreamResponse:
    if request.headers.get("Upgrade"):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            if message.type is WSMsgType.TEXT:
                await socket.send_str(message.data)
        return socket
    lines = [request.raw_path, *(f"{name}: {value}" for name, value in request.headers.items())]
    response = web.Response(body="\n".join(lines).encode() + await request.read())
    response.headers["X-Seen"] = request.headers.get("X-Note", "")
    response.set_cookie("seen", request.headers.get("X-Note", ""))
    return response


async def main() -> None:
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{tail:.*}", mirror)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    print(f"http://{host}:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
