"""The admin listener: metrics for Prometheus, and whether the edge is well. Nothing of it is public."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, Counter

from guestpass.config import Limits
from guestpass.edge.bare import BareServer
from guestpass.edge.pages import Pages
from guestpass.plugin import Answer, settled


class Admin(BareServer):
    def __init__(
        self,
        where: str,
        *,
        metrics: Callable[[], Awaitable[bytes]],
        faults: Callable[[], Awaitable[dict[str, str]]],
        pages: Pages,
        refused: Counter,
        limits: Limits,
        certificates: Callable[[], Answer[object]] | None = None,
    ) -> None:
        """`where`: HOST:PORT. `metrics` gives the text for Prometheus, `faults` why the edge is not ready;
        `certificates` how those by ACME stand."""
        self._metrics_text = metrics
        self._faults = faults
        self._certificates = certificates
        host = urlsplit("//" + where).hostname or ""
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
        super().__init__(f"http://{where}", app, pages=pages, refused=refused, limits=limits)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=await self._metrics_text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _readyz(self, request: web.Request) -> web.Response:
        faults = await self._faults()
        told: dict[str, Any] = {"status": "not ready" if faults else "ready", "faults": faults}
        if self._certificates is not None:
            # Told, and no fault: an edge that is taken out of service cannot answer the challenge.
            told["certificates"] = await settled(self._certificates())
        return web.json_response(told, status=503 if faults else 200)
