"""The parts of an edge that people meet, in the test's event loop and over a real socket: the store, the share
service, the plugins, admission, pages and the console. Tunnels are the one thing that is only pretended.

`Browser` is a visitor: cookies by origin as a browser keeps them, Origin and Sec-Fetch fields as a browser sends them,
and no redirect followed without being asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import aiohttp
from aiohttp import web

from guestpass.edge.admission import Admission
from guestpass.edge.console import Console
from guestpass.edge.events import EventHub
from guestpass.edge.grants import GrantTable
from guestpass.edge.keys import CLIENT, SHARE_ID
from guestpass.edge.origins import Origins
from guestpass.edge.pages import Pages
from guestpass.edge.plugins import PluginSet
from guestpass.edge.tunnels import GatewayStatus
from guestpass.model import Candidate, Event, Share
from guestpass.plugin import Client, Message, Plugin, PluginConfig
from guestpass.shares.bus import Bus
from guestpass.shares.service import NewShare, ShareService
from guestpass.shares.store import Store
from guestpass_plugins.authenticate.bearer_token import BearerToken
from guestpass_plugins.authenticate.email_code import EmailCode
from guestpass_plugins.choose.random import Random
from guestpass_plugins.revoke.share_state import ShareState

ALICE = "alice@example.org"
BOB = "bob@example.org"
MALLORY = "mallory@example.org"
API_KEY = "gpk_" + "k" * 43

CODE = re.compile(r"^ {4}(\d{4} \d{4})$", re.MULTILINE)
INPUT = re.compile(r'<input type="hidden" name="csrf" value="([^"]+)">')
ACTION = re.compile(r'<form method="post" action="([^"]+)"')


class Clock:
    """Stands at the time at which it was made, until it is moved."""

    def __init__(self) -> None:
        self.at = time.time()

    def __call__(self) -> float:
        return self.at


class Gateways:
    """What admission asks of the tunnels."""

    def __init__(self) -> None:
        self.connected = [Candidate("plant", "a"), Candidate("plant", "b")]
        self.statuses: list[GatewayStatus] = []

    def candidates(self, site: str, service: str, *, unwell: bool = False) -> list[Candidate]:
        return [c for c in self.connected if c.site == site]

    def is_connected(self, site: str, name: str) -> bool:
        return any((c.site, c.name) == (site, name) for c in self.connected)

    def status(self) -> list[GatewayStatus]:
        return self.statuses


def plugin(cls: type[Plugin], name: str, **settings: Any) -> Plugin:
    """One with these settings, as if `edge.toml` named it."""
    config: PluginConfig = cls.Config(**settings)
    return cls(name, config)


def usual() -> dict[str, list[Plugin]]:
    return {
        "authenticate": [plugin(EmailCode, "email-code"), plugin(BearerToken, "bearer-token")],
        "revoke": [plugin(ShareState, "share-state")],
        "choose": [plugin(Random, "random")],
    }


@dataclass
class People:
    """A running edge without its data plane."""

    service: ShareService
    events: EventHub
    grants: GrantTable
    plugins: PluginSet
    admission: Admission
    pages: Pages
    origins: Origins
    gateways: Gateways
    port: int
    mail: list[Message]
    seen: list[Event]
    session: aiohttp.ClientSession
    _mailed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def main(self) -> str:
        return self.origins.main

    async def share(self, *to: str, **more: Any) -> tuple[Share, Mapping[str, str]]:
        """A new share and its links."""
        new = NewShare(site="plant", service="dash", to=to or (ALICE,), **{"invite": False, **more})
        created = await self.service.create(new)
        return created.share, created.links

    async def code(self, to: str = ALICE) -> str:
        """The next code that is mailed."""
        async with asyncio.timeout(10):
            while not any(m.kind == "code" and m.to == to for m in self.mail):
                self._mailed.clear()
                await self._mailed.wait()
        message = next(m for m in self.mail if m.kind == "code" and m.to == to)
        self.mail.remove(message)
        found = CODE.search(message.text)
        assert found
        return found[1]

    async def notify(self, message: Message) -> None:
        self.mail.append(message)
        self._mailed.set()

    def browser(self, **headers: str) -> Browser:
        return Browser(self, headers)


@contextlib.asynccontextmanager
async def people(
    folder: Path,
    *,
    plugins: Mapping[str, Sequence[Plugin]] | None = None,
    share_domain: str = "localhost",
    now: Callable[[], float] = time.time,
) -> AsyncIterator[People]:
    """Everything started, and stopped afterwards."""
    async with contextlib.AsyncExitStack() as stack:
        store = await Store.open(folder / "edge.db")
        stack.push_async_callback(store.close)
        bus, events, gateways = Bus(), EventHub(), Gateways()
        listener = stack.enter_context(_free_listener())
        port = listener.getsockname()[1]
        origins = Origins(f"http://localhost:{port}", f"{share_domain}:{port}")
        service = ShareService(
            store,
            bus,
            now=now,
            emit=events.emit,
            public_url=origins.main,
            share_origin=origins.share_origin,
            default_owner="Ada Lovelace",
            ways=lambda: [way.name for way in chosen.interactive],
        )
        stack.push_async_callback(service.close)
        grants = GrantTable(now=now, touched=service.touch)
        bus.subscribe(grants.revoke)
        pages = Pages(origins)
        chosen = PluginSet(usual() if plugins is None else plugins)
        admission = Admission(
            origins=origins,
            service=service,
            plugins=chosen,
            grants=grants,
            tunnels=gateways,  # type: ignore[arg-type]
            pages=pages,
            events=events,
        )
        console = Console(
            service=service,
            live=grants,
            gateways=gateways,  # type: ignore[arg-type]
            pages=pages,
            api_key=API_KEY,
            origins=origins,
            ways=lambda: chosen.interactive,
        )
        session = await stack.enter_async_context(
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)
        )
        found = People(
            service, events, grants, chosen, admission, pages, origins, gateways, port, [], [], session
        )
        watch = asyncio.create_task(_collect(events, found.seen))
        stack.callback(watch.cancel)
        await chosen.start(
            service,
            events,
            notify=found.notify,
            revoke=bus.publish,
            fail_closed=grants.end_all,
            secret=b"s" * 32,
            now=now,
        )
        stack.push_async_callback(chosen.stop)
        app = web.Application(middlewares=[_front(found)])
        app.add_routes(admission.main_routes())
        app.add_routes(admission.share_routes())
        app.add_routes(pages.asset_routes())
        app.add_routes(console.console_routes())
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.SockSite(runner, listener).start()
        yield found


async def _collect(events: EventHub, seen: list[Event]) -> None:
    async for event in events.subscribe():
        seen.append(event)


def _free_listener() -> Any:
    import socket

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def _front(edge: People) -> Any:
    """As the edge's own front: which origin, which client; what is not below the prefix is the application's, which
    here only says who came."""

    @web.middleware
    async def front(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        request[CLIENT] = Client(request.headers.get("X-Test-Client", "192.0.2.1"), "test")
        share_id = edge.origins.share_of(request.host)
        if share_id is not None:
            request[SHARE_ID] = share_id
            if not request.raw_path.startswith("/.guestpass/"):
                return await application(edge, request, share_id)
        elif request.raw_path.startswith("/.guestpass/") and "/assets/" not in request.raw_path:
            raise web.HTTPNotFound
        return await handler(request)

    return front


async def application(edge: People, request: web.Request, share_id: str) -> web.StreamResponse:
    from guestpass.edge import headers as h
    from guestpass.errors import ShareEnded, Unauthorized
    from guestpass.model import SessionKind
    from guestpass.tokens import BEARER_PREFIX, digest

    token = h.bearer(request.raw_headers, BEARER_PREFIX)
    secret = token or h.cookie(request.raw_headers, h.SESSION_COOKIE)
    if secret is None:
        return await edge.admission.challenge(request, share_id)
    kind = SessionKind.TOKEN if token else SessionKind.COOKIE
    try:
        grant = edge.grants.get(kind, digest(secret), share_id)
        if grant is None:
            grant = await edge.admission.restore(share_id, kind, secret, request)
    except ShareEnded:
        return edge.admission.ended(request)
    except Unauthorized:
        return await edge.admission.challenge(request, share_id)
    return web.Response(text=f"application: {grant.email} by {grant.gateway} at {request.raw_path}")


@dataclass
class Answer:
    """What the browser got."""

    url: str
    status: int
    headers: Any
    text: str

    @property
    def location(self) -> str:
        return str(self.headers.get("Location", ""))

    @property
    def words(self) -> str:
        """The page's text as a person reads it."""
        body = re.sub(r"(?s)<head>.*?</head>|<(script|style).*?</\1>", "", self.text)
        return " ".join(html.unescape(re.sub(r"(?s)<[^>]+>", " ", body)).split())

    @property
    def csrf(self) -> str:
        found = INPUT.search(self.text)
        assert found, self.words
        return found[1]

    @property
    def action(self) -> str:
        found = ACTION.search(self.text)
        assert found, self.words
        return html.unescape(found[1])


class Browser:
    """One browser profile."""

    def __init__(self, edge: People, headers: Mapping[str, str]) -> None:
        self._edge = edge
        self._headers = headers
        self.cookies: dict[str, dict[str, str]] = {}

    async def get(self, url: str, *, method: str = "GET", **headers: str) -> Answer:
        return await self._ask(method, url, None, {"Sec-Fetch-Site": "none", **headers})

    async def post(
        self, url: str, fields: Mapping[str, str], *, origin: str | None = "", **headers: str
    ) -> Answer:
        """`origin`: of the page with the form; the target's own unless given, None to send no such field."""
        if origin == "":
            parts = urlsplit(url)
            origin = f"{parts.scheme}://{parts.netloc}"
        if origin is not None:
            headers = {"Origin": origin, **headers}
        return await self._ask("POST", url, urlencode(fields), headers)

    async def follow(self, answer: Answer, *, most: int = 10) -> Answer:
        """Redirects, to the end."""
        for _ in range(most):
            if answer.status != 303:
                return answer
            answer = await self.get(_join(answer.url, answer.location))
        raise AssertionError(f"redirected {most} times, last to {answer.location}")

    async def submit(self, page: Answer, **fields: str) -> Answer:
        """The page's form, filled in; where it leads."""
        token = INPUT.search(page.text)
        if token:
            fields = {"csrf": token[1], **fields}
        return await self.post(_join(page.url, page.action), fields)

    async def sign_in(self, start: str, email: str = ALICE) -> Answer:
        """From any URL that leads to sign-in to whatever comes after the code."""
        page = await self.follow(await self.get(start))
        page = await self.follow(await self.submit(page, email=email))
        return await self.follow(await self.submit(page, code=await self._edge.code(email)))

    def cookie(self, url: str, name: str) -> str | None:
        return self.cookies.get(urlsplit(url).netloc, {}).get(name)

    async def _ask(self, method: str, url: str, body: str | None, headers: Mapping[str, str]) -> Answer:
        parts = urlsplit(url)
        sent = {
            "Accept": "text/html,application/xhtml+xml,*/*;q=0.8",
            "Sec-Fetch-Mode": "navigate",
            "Sec-Fetch-Dest": "document",
            **self._headers,
            **{name.replace("_", "-"): value for name, value in headers.items()},
            "Host": parts.netloc,
        }
        jar = self.cookies.setdefault(parts.netloc, {})
        if jar and "Cookie" not in sent:
            sent["Cookie"] = "; ".join(f"{k}={v}" for k, v in jar.items())
        if body is not None:
            sent.setdefault("Content-Type", "application/x-www-form-urlencoded")
        target = f"http://127.0.0.1:{self._edge.port}{parts.path or '/'}"
        if parts.query:
            target += "?" + parts.query
        from yarl import URL

        async with self._edge.session.request(
            method, URL(target, encoded=True), headers=sent, data=body, allow_redirects=False
        ) as response:
            for line in response.headers.getall("Set-Cookie", ()):
                self._keep(jar, line)
            return Answer(url, response.status, response.headers, await response.text())

    @staticmethod
    def _keep(jar: dict[str, str], line: str) -> None:
        pair, *attributes = (part.strip() for part in line.split(";"))
        name, _, value = pair.partition("=")
        lower = [a.lower() for a in attributes]
        if name.startswith("__Host-"):
            assert "secure" in lower, line
            assert "path=/" in lower, line
            assert not any(a.startswith("domain") for a in lower), line
        if "max-age=0" in lower:
            jar.pop(name, None)
        else:
            jar[name] = value


def _join(base: str, location: str) -> str:
    from urllib.parse import urljoin

    return urljoin(base, location)
