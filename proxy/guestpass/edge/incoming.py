"""Requests from other systems to plugins: `/.guestpass/hooks/NAME/…` on the main origin (`Host.route`).

Anybody may call, so everything is bounded before a plugin sees it: the body's size and the time that it may take to
come, how often one network calls, how many calls are under way. A handler has a deadline, and what it raises is logged
and answered 500 with an error id. That is *not* counted as a failure of the plugin: a stranger with a request that a
handler chokes on must not be able to switch off a plugin that decides.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiohttp import web

from guestpass.edge.browser import Limiter, arrived
from guestpass.edge.keys import CLIENT, SHARE_ID
from guestpass.errors import PluginError
from guestpass.plugin import Answer, Incoming, Reply, settled

if TYPE_CHECKING:
    from guestpass.edge.origins import Origins

log = logging.getLogger(__name__)

PREFIX = "/.guestpass/hooks/"

# A security event or a webhook is a few kilobytes.
MAX_BODY = 64 * 1024
# Who pushes waits for the answer; RFC 8935 §2 asks for it "as soon as possible".
CALL_DEADLINE = 10.0
# Calls of one network in a window: bursts of events, not floods.
MOST_CALLS, CALLS_WINDOW = 600, 60.0
# Calls of one plugin under way at once.
MOST_AT_ONCE = 16
RETRY_AFTER = 5

Handler = Callable[[Incoming], Answer[Reply]]


class IncomingRoutes:
    """All routes that plugins have registered. One instance per edge; the set of plugins may change under it."""

    def __init__(self, origins: Origins | None = None) -> None:
        self._base = (origins.main if origins is not None else "") + PREFIX
        self._routes: dict[str, dict[str, Handler]] = {}
        self._owners: dict[str, tuple[str, object]] = {}  # name → (section/name, its host)
        self._limiter = Limiter(MOST_CALLS, CALLS_WINDOW)
        self._under_way: Counter[str] = Counter()

    def add(self, owner: str, host: object, path: str, handler: Handler) -> str:
        """`owner` is "section/name". Returns the URL. Raises PluginError."""
        name = owner.partition("/")[2]
        if path.strip("/") != path or not all(part.isascii() and part.isprintable() for part in path):
            raise PluginError(f"the route {path!r} of plugin {name!r} is not a plain relative path")
        taken = self._owners.get(name)
        if taken is not None and taken[0] != owner:
            raise PluginError(
                f'two plugins of the name "{name}" take requests from outside',
                hint='Give one of them a name of its own: name = "…".',
            )
        if taken is None or taken[1] is not host:  # the first route, or the first of a new set of plugins
            self._owners[name] = (owner, host)
            self._routes[name] = {}
        self._routes[name][path] = handler
        return f"{self._base}{name}" + (f"/{path}" if path else "")

    def remove(self, host: object) -> None:
        """All routes of a plugin that stops, unless its successor has taken them over."""
        for name in [name for name, (_, owner) in self._owners.items() if owner is host]:
            del self._owners[name], self._routes[name]

    def web_routes(self) -> list[web.RouteDef]:
        return [web.post(PREFIX + "{name}{rest:(/.*)?}", self._call)]

    async def _call(self, request: web.Request) -> web.Response:
        name, path = request.match_info["name"], request.match_info["rest"].strip("/")
        handler = self._routes.get(name, {}).get(path)
        if handler is None or SHARE_ID in request:  # shares' origins have none of these
            raise web.HTTPNotFound
        if not self._limiter.admits(request[CLIENT]):
            return web.Response(status=429, headers={"Retry-After": str(int(CALLS_WINDOW))})
        if self._under_way[name] >= MOST_AT_ONCE:
            return web.Response(status=503, headers={"Retry-After": str(RETRY_AFTER)})
        if (request.content_length or 0) > MAX_BODY:
            raise web.HTTPRequestEntityTooLarge(MAX_BODY, request.content_length or 0)
        self._under_way[name] += 1
        try:
            await arrived(request)
            body = await request.read()
            if len(body) > MAX_BODY:
                raise web.HTTPRequestEntityTooLarge(MAX_BODY, len(body))
            call = Incoming(
                method=request.method,
                path=path,
                headers=[(k.decode("latin-1"), v.decode("latin-1")) for k, v in request.raw_headers],
                body=body,
                client=request[CLIENT],
            )
            async with asyncio.timeout(CALL_DEADLINE):
                reply = await settled(handler(call))
            return web.Response(
                status=reply.status,
                body=reply.body,
                content_type=reply.content_type if reply.body else None,
                headers={"Cache-Control": "no-store", **dict(reply.headers)},
            )
        except (web.HTTPException, ConnectionError):
            raise
        except Exception:
            error_id = secrets.token_hex(4)
            log.exception("error %s: plugin %r failed on a request from outside", error_id, name)
            return web.Response(status=500, text=f"error {error_id}\n", headers={"Cache-Control": "no-store"})
        finally:
            self._under_way[name] -= 1
