"""The admin listener: metrics for Prometheus, and whether the edge is well. Nothing of it is public."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CONTENT_TYPE_LATEST, Counter

from guestpass.edge.front import HANDLER_KEEPALIVE, Answered, House, bare_lane
from guestpass.edge.listener import Listener
from guestpass.edge.pages import Pages
from guestpass_speedups.relay import Lane

log = logging.getLogger("guestpass.edge")


class ServerLog(logging.LoggerAdapter[logging.Logger]):
    """aiohttp's log without what visitors sent: its parser quotes the bytes that it refuses, which may be a cookie or a
    piece of an upload, and anybody could fill the log with them."""

    def __init__(self, refused: Counter) -> None:
        super().__init__(logging.getLogger("guestpass.edge.http"), {})
        self._refused = refused

    def exception(self, msg: object, *args: Any, exc_info: Any = True, **more: Any) -> None:
        if isinstance(exc_info, HttpProcessingError):
            self._refused.labels(str(exc_info.code)).inc()
        else:
            super().exception(msg, *args, exc_info=exc_info, **more)

    def debug(self, msg: object, *args: Any, exc_info: Any = None, **more: Any) -> None:
        if isinstance(exc_info, HttpProcessingError):
            self._refused.labels(str(exc_info.code)).inc()
        else:
            super().debug(msg, *args, exc_info=exc_info, **more)


class Admin:
    """`start`, then `close` (accept no more) and `stop`."""

    def __init__(
        self,
        where: str,
        *,
        metrics: Callable[[], Awaitable[bytes]],
        faults: Callable[[], Awaitable[dict[str, str]]],
        pages: Pages,
        refused: Counter,
    ) -> None:
        """`where`: HOST:PORT. `metrics` gives the text for Prometheus, `faults` why the edge is not ready."""
        self._host = urlsplit("//" + where).hostname or ""
        self._listener = Listener(f"http://{where}", None)
        self._metrics_text = metrics
        self._faults = faults
        self._pages = pages
        self._refused = refused
        self._runner: web.AppRunner | None = None
        self._lane: Lane | None = None

    async def start(self) -> str:
        """Returns its URL. Raises PortTaken, ConfigError."""
        host = self._host
        allowed = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host}

        @web.middleware
        async def known_host(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            # A web page that resolves its own name to this address must not read the metrics (DNS rebinding).
            if request.host.rpartition(":")[0].lower() not in allowed and request.host.lower() not in allowed:
                return web.Response(status=421, text="no such host here\n")
            return await handler(request)

        app = web.Application(middlewares=[known_host])
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        runner = self._runner = web.AppRunner(
            app,
            access_log=log,
            access_log_class=Answered,
            logger=ServerLog(self._refused),
            keepalive_timeout=HANDLER_KEEPALIVE,
            shutdown_timeout=1.0,
        )
        await runner.setup()
        server = runner.server
        assert server is not None
        self._lane = bare_lane()
        house = House(
            lane=self._lane,
            handler=server,
            tunnel=lambda transport, head, rest: transport.abort(),
            pages=self._pages,
            refused=lambda status: self._refused.labels(str(status)).inc(),
        )
        await self._listener.start(house.front)
        return self._listener.url

    def close(self) -> None:
        self._listener.close()

    async def stop(self) -> None:
        self.close()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._lane is not None:
            self._lane.close()

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=await self._metrics_text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _readyz(self, request: web.Request) -> web.Response:
        faults = await self._faults()
        return web.json_response(
            {"status": "not ready" if faults else "ready", "faults": faults}, status=503 if faults else 200
        )
