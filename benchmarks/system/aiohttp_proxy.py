"""A plain reverse proxy on aiohttp, as people write it: the peer that shows what Python costs by itself.

python aiohttp_proxy.py PORT UPSTREAM
"""

from __future__ import annotations

import sys

import uvloop
from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web

HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"}

CHUNK = 64 * 1024


async def make(upstream: str) -> web.Application:
    session = ClientSession(
        connector=TCPConnector(limit=0, keepalive_timeout=600),
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        timeout=ClientTimeout(total=None),
    )

    async def handle(request: web.Request) -> web.StreamResponse:
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
        body = request.content if request.body_exists else None
        async with session.request(
            request.method, upstream + request.raw_path, headers=headers, data=body, allow_redirects=False
        ) as answer:
            kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP]
            response = web.StreamResponse(status=answer.status, headers=dict(kept))
            await response.prepare(request)
            async for part in answer.content.iter_chunked(CHUNK):
                await response.write(part)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)

    async def close(_: web.Application) -> None:
        await session.close()

    app.on_cleanup.append(close)
    return app


def main() -> None:
    port, upstream = int(sys.argv[1]), sys.argv[2]
    uvloop.install()
    web.run_app(
        make(upstream), host="127.0.0.1", port=port, access_log=None, print=None, keepalive_timeout=600
    )


if __name__ == "__main__":
    main()
