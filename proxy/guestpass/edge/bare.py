"""A listener for an application of ours that knows no shares and no tunnels: metrics and health, redirects to https."""

from __future__ import annotations

import logging
import socket
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import Counter

from guestpass.config import Limits
from guestpass.edge.front import HANDLER_KEEPALIVE, Answered, House, bare_lane
from guestpass.edge.limits import Refusals
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


class BareServer:
    """`start`, then `close` (accept no more) and `stop`."""

    def __init__(
        self,
        url: str,
        app: web.Application,
        *,
        pages: Pages,
        refused: Counter,
        limits: Limits,
        refusals: Refusals | None = None,
        sock: socket.socket | None = None,
    ) -> None:
        self._app = app
        self._listener = Listener(url, None, sock)
        self._pages = pages
        self._refused = refused
        self._limits = limits
        self._refusals = refusals if refusals is not None else Refusals(limits)
        self._runner: web.AppRunner | None = None
        self._lane: Lane | None = None

    async def start(self) -> str:
        """Returns its URL. Raises PortTaken, ConfigError."""
        runner = self._runner = web.AppRunner(
            self._app,
            access_log=log,
            access_log_class=Answered,
            logger=ServerLog(self._refused),
            keepalive_timeout=HANDLER_KEEPALIVE,
            shutdown_timeout=1.0,
        )
        await runner.setup()
        server = runner.server
        assert server is not None
        self._lane = bare_lane(self._limits)
        house = House(
            lane=self._lane,
            handler=server,
            tunnel=lambda transport, head, rest: transport.abort(),
            pages=self._pages,
            refused=lambda status: self._refused.labels(str(status)).inc(),
            refusals=self._refusals,
        )
        await self._listener.start(house.front)
        return self._listener.url

    def close(self) -> None:
        self._listener.close()

    async def stop(self) -> None:
        """Never raises: whoever stops has more to stop."""
        self.close()
        if self._runner is not None:
            try:
                await self._runner.cleanup()
            except Exception:
                log.exception("while stopping")
        if self._lane is not None:
            self._lane.close()
