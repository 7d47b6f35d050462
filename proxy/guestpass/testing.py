"""For the tests of plugins: a whole Guestpass in the test's event loop.

    from guestpass.testing import edge_with, use

    async def test_nobody_enters_at_night() -> None:
        async with edge_with(use(OfficeHours, opens="08:00", closes="18:00")) as edge:
            visitor = await edge.admitted("alice@example.org")
            edge.clock.set(datetime(2026, 1, 5, 23, 0, tzinfo=UTC))
            assert (await visitor.get("/")).status == 403

The edge is the real one, with real sockets, a store in a temporary folder, and gateways that enrolled; the application
behind it answers with what it was sent. Only the clock is the test's. Each kind of plugin takes the place of the usual
one; where a test brings none of a kind the usual one is there: people sign in by `email-code`, and `edge.messages` has
what was mailed.

No test framework is imported or needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import re
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

import aiohttp
from aiohttp import web
from pydantic import ValidationError

from guestpass.config import EdgeConfig, GatewayConfig, PluginSection, first_fault, parse
from guestpass.edge.app import Edge
from guestpass.edge.plugin_loader import KINDS, Kind, build, check_class
from guestpass.edge.plugins import ObserveHook, PluginSet
from guestpass.errors import PluginError
from guestpass.gateway.agent import Agent
from guestpass.gateway.enroll import enroll
from guestpass.model import Event, Share
from guestpass.plugin import Authenticator, Message, Notifier, Plugin
from guestpass.shares.service import NewShare

__all__ = ["Application", "Clock", "Page", "Prepared", "TestEdge", "Visitor", "edge_with", "use"]

SITE = "test"
SERVICE = "app"
ALICE = "alice@example.org"

# How long a test waits for what should be there in a moment.
PATIENCE = 10.0
# As browsers: then it is a loop.
MAX_REDIRECTS = 20

P = TypeVar("P", bound=Plugin)

# What stands where a test brings none of the kind.
USUAL: Mapping[str, Sequence[str]] = {
    "authenticate": ("guestpass_plugins.authenticate.email_code:EmailCode",),
    "choose": ("guestpass_plugins.choose.random:Random",),
}


class Clock:
    """The time of the edge and its plugins. Stands still unless it is moved."""

    def __init__(self) -> None:
        self._now = float(int(time.time()))

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._now

    def set(self, when: float | datetime) -> None:
        self._now = when.timestamp() if isinstance(when, datetime) else float(when)

    def advance(self, seconds: float) -> None:
        self._now += seconds


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plugin class and its section of edge.toml."""

    cls: type[Plugin]
    name: str
    settings: Mapping[str, Any]


def use(cls: type[Plugin], *, name: str = "", **settings: Any) -> Prepared:
    """A plugin with settings, as `edge.toml` would have them."""
    return Prepared(cls, name or cls.__name__, settings)


@dataclass(frozen=True, slots=True)
class Page:
    """What a visitor got, at the end of its redirects."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes
    _visitor: Visitor = field(repr=False)

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    @property
    def words(self) -> str:
        """A page's text as a person reads it."""
        body = re.sub(r"(?s)<head>.*?</head>|<(script|style).*?</\1>", "", self.text)
        return " ".join(html.unescape(re.sub(r"(?s)<[^>]+>", " ", body)).split())

    @property
    def request(self) -> dict[str, Any]:
        """What the application was sent: `method`, `path`, `headers` (names in lower case), `gateway`, `body`."""
        found: dict[str, Any] = json.loads(self.body)
        return found

    async def submit(self, **fields: str) -> Page:
        """Fill in the page's form and send it."""
        form = re.search(r'(?s)<form method="post" action="([^"]+)".*?</form>', self.text)
        if form is None:
            raise AssertionError(f"there is no form on {self.url}: {self.status} {self.words}")
        hidden = dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', form[0]))
        target = urljoin(self.url, html.unescape(form[1]))
        return await self._visitor.post(target, {**hidden, **fields})

    async def follow(self, words: str) -> Page:
        """Follow the link with these words."""
        for href, label in re.findall(r'(?s)<a [^>]*href="([^"]+)"[^>]*>(.*?)</a>', self.text):
            if words in html.unescape(label):
                return await self._visitor.get(urljoin(self.url, html.unescape(href)))
        raise AssertionError(f"there is no link {words!r} on {self.url}: {self.words}")


class Visitor:
    """One browser, or, with a token, one script."""

    def __init__(self, edge: TestEdge, share: Share, token: str | None) -> None:
        self.share = share
        self._edge = edge
        self._token = token
        self._cookies: dict[str, dict[str, str]] = {}

    async def get(self, path: str, **headers: str) -> Page:
        """`path` on the share's origin, or a URL."""
        return await self.request("GET", path, headers=headers)

    async def post(self, path: str, data: Mapping[str, str] | bytes = b"", **headers: str) -> Page:
        return await self.request("POST", path, data=data, headers=headers)

    async def request(
        self,
        method: str,
        path: str,
        *,
        data: Mapping[str, str] | bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> Page:
        """Sends it and follows where it leads. In names of headers `_` stands for `-`."""
        url = urljoin(self._edge.origin(self.share), path)
        fields = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
        if isinstance(data, Mapping):
            data, fields["Content-Type"] = urlencode(data).encode(), "application/x-www-form-urlencoded"
        for _ in range(MAX_REDIRECTS):
            page = await self._once(method, url, data, fields)
            if page.status not in (301, 302, 303, 307, 308) or "Location" not in page.headers:
                return page
            url, method, data = urljoin(url, page.headers["Location"]), "GET", b""
            fields.pop("Content-Type", None)
        raise AssertionError(f"redirected {MAX_REDIRECTS} times, last to {url}")

    async def _once(self, method: str, url: str, data: bytes, headers: Mapping[str, str]) -> Page:
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        jar = self._cookies.setdefault(parts.netloc, {})
        sent = {"Host": parts.netloc, "Accept": "text/html,*/*", "User-Agent": "guestpass.testing", **headers}
        if method not in ("GET", "HEAD"):
            sent.setdefault("Origin", origin)
        if self._token is not None:
            sent.setdefault("Authorization", f"Bearer {self._token}")
        else:
            sent |= {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        if jar:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in jar.items())
        # Whatever its name, the edge is on this machine.
        target = f"http://127.0.0.1:{self._edge.port}{parts.path or '/'}" + f"?{parts.query}" * bool(
            parts.query
        )
        async with self._edge.http.request(
            method, target, data=data or None, headers=sent, allow_redirects=False
        ) as answer:
            body = await answer.read()
            for name, morsel in answer.cookies.items():
                if morsel["max-age"] == "0" or not morsel.value:
                    jar.pop(name, None)
                else:
                    jar[name] = morsel.value
            return Page(url, answer.status, answer.headers, body, self)


class Application:
    """What is shared: answers with what it was sent and the gateway that it came through."""

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway

    async def answer(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "method": request.method,
                "path": request.path_qs,
                "headers": {name.lower(): value for name, value in request.headers.items()},
                "gateway": self._gateway,
                "body": (await request.read()).decode("utf-8", "replace"),
            }
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self.answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            host, port = runner.addresses[0][:2]
            yield f"http://{host}:{port}"
        finally:
            await runner.cleanup()


class _Inbox(Notifier):
    """Takes every message, for the test to read."""

    messages: list[Message]

    async def deliver(self, message: Message) -> str:
        self.messages.append(message)
        return "kept for the test"


class TestEdge:
    """A running edge. Made by `edge_with`."""

    __test__ = False  # not a class of tests, whatever its name

    def __init__(self, edge: Edge, clock: Clock, port: int, http: aiohttp.ClientSession) -> None:
        self.edge = edge
        self.clock = clock
        self.port = port
        self.http = http
        self.messages: list[Message] = []
        """What was mailed, unless the test brings a Notifier."""
        self.events: list[Event] = []
        self.share: Share
        """Shared with alice@example.org."""

    def origin(self, share: Share) -> str:
        return self.edge.origins.share_origin(share.id)

    async def new_share(self, *to: str, **settings: Any) -> Share:
        """Share the application with these addresses. `settings`: `path`, `scope`, `expires`, `max_sessions`,
        `invite`."""
        usual: dict[str, Any] = {"path": "/", "invite": False}
        new = NewShare(site=SITE, service=SERVICE, to=to or (ALICE,), **{**usual, **settings})
        return (await self.edge.service.create(new)).share

    def visitor(self, share: Share | None = None) -> Visitor:
        """A browser that nobody knows yet: its first page leads to sign-in."""
        return Visitor(self, share or self.share, None)

    async def admitted(self, email: str = ALICE, share: Share | None = None) -> Visitor:
        """A script with a token for this recipient, who need not sign in."""
        share = share or self.share
        _, token = await self.edge.service.create_token(share.id, email, None)
        return Visitor(self, share, token)

    def plugin(self, cls: type[P], name: str = "") -> P:
        """The running plugin of this class."""
        for slot in self.edge.plugins.all:
            if isinstance(slot, cls) and name in ("", slot.name):
                return slot
        raise KeyError(cls.__name__)

    def faults(self) -> dict[str, str]:
        """What `/readyz` says of plugins, and every one whose last hook failed."""
        failing = {
            s.name: f"its last hook failed, error id {s.error_id}"
            for s in self.edge.plugins.states()
            if s.failures
        }
        return {**failing, **self.edge.plugins.health()}

    async def until(self, condition: Callable[[], object], what: str = "the condition") -> None:
        """Wait for what happens in the background. Raises AssertionError."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {PATIENCE:g} seconds: {what}")
            await asyncio.sleep(0.01)


def kind_of(cls: type[Plugin]) -> Kind:
    """Raises PluginError."""
    for kind in KINDS.values():
        if isinstance(cls, type) and issubclass(cls, kind.base):
            return kind
    raise PluginError(
        f"{cls!r} is of none of the six kinds", hint="Derive it from one of guestpass.plugin's."
    )


def _constructed(prepared: Prepared, folder: Path) -> Plugin:
    kind = kind_of(prepared.cls)
    check_class(kind, prepared.cls.__name__, prepared.cls)
    config_class = prepared.cls.Config
    try:
        config = config_class.model_validate(dict(prepared.settings), context={"folder": folder})
    except ValidationError as exc:
        raise PluginError(f"{prepared.name}: {first_fault(exc, config_class)}") from exc
    return prepared.cls(prepared.name, config)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def edge_with(
    *plugins: type[Plugin] | Plugin | Prepared,
    gateways: int | Sequence[Mapping[str, str]] = 1,
    clock: Clock | None = None,
) -> AsyncIterator[TestEdge]:
    """An edge with these plugins and a share for alice@example.org. `gateways`: how many, or the labels of each.
    Raises PluginError when a plugin cannot be loaded or started."""
    clock = clock or Clock()
    labels: Sequence[Mapping[str, str]] = [{}] * gateways if isinstance(gateways, int) else gateways
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="guestpass-")))
        port = _free_port()
        settings = {
            "listen": [f"http://127.0.0.1:{port}"],
            "admin_listen": "127.0.0.1:0",
            "public_url": f"http://localhost:{port}",
            "share_domain": f"localhost:{port}",
            "state": "sqlite:///state/edge.db",
            "drain_seconds": 0,
            "fast_lane": False,  # it has a clock of its own
        }
        config = parse(EdgeConfig, {"edge": settings}, folder / "edge.toml")
        inbox = _Inbox("inbox", _Inbox.Config())
        inbox.messages = []

        def load(_: EdgeConfig, *, observe_hook: ObserveHook | None = None) -> PluginSet:
            return _plugin_set(plugins, inbox, config.file, observe_hook)

        edge = Edge(config, now=clock.now, load=load)
        await edge.start()
        stack.push_async_callback(edge.stop)
        http = await stack.enter_async_context(
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False)
        )
        found = TestEdge(edge, clock, port, http)
        found.messages = inbox.messages
        listening = asyncio.create_task(_collect(edge, found.events), name="events of the test")
        stack.callback(listening.cancel)
        for number, of_gateway in enumerate(labels, 1):
            await stack.enter_async_context(_gateway(found, f"gw-{number}", of_gateway, folder))
        found.share = await found.new_share(ALICE)
        yield found


def _plugin_set(
    given: Sequence[type[Plugin] | Plugin | Prepared],
    inbox: Plugin,
    file: Path,
    observe_hook: ObserveHook | None,
) -> PluginSet:
    found: dict[str, list[Plugin]] = {section: [] for section in KINDS}
    for one in given:
        if isinstance(one, type):
            one = use(one)
        plugin = _constructed(one, file.parent) if isinstance(one, Prepared) else one
        found[kind_of(type(plugin)).section].append(plugin)
    usual = dict(USUAL)
    if any(isinstance(p, Authenticator) and p.interactive for p in found["authenticate"]):
        usual["authenticate"] = ()
    always = {
        "authenticate": "guestpass_plugins.authenticate.bearer_token:BearerToken",
        "revoke": "guestpass_plugins.revoke.share_state:ShareState",
    }
    for section, names in usual.items():
        if section == "authenticate" or not found[section]:
            found[section] += [_usual(section, name, file) for name in names]
    for section, name in always.items():
        found[section].append(_usual(section, name, file))
    if not found["notify"]:
        found["notify"].append(inbox)
    return PluginSet(found, observe_hook=observe_hook)


def _usual(section: str, target: str, file: Path) -> Plugin:
    return build(
        KINDS[section], PluginSection(use=target, name=f"usual-{target.rpartition(':')[2]}"), 0, file
    )


async def _collect(edge: Edge, events: list[Event]) -> None:
    async for event in edge.events.subscribe():
        events.append(event)


@contextlib.asynccontextmanager
async def _gateway(edge: TestEdge, name: str, labels: Mapping[str, str], folder: Path) -> AsyncIterator[None]:
    url = f"http://localhost:{edge.port}"
    async with Application(name).running() as application:
        key = folder / f"{name}.key"
        await enroll(url, await edge.edge.service.create_join_token(SITE), name, key)
        settings = {
            "gateway": {"name": name, "site": SITE, "edges": [url], "key": str(key), "labels": dict(labels)},
            "services": {SERVICE: {"url": application}},
        }
        agent = Agent(parse(GatewayConfig, settings, folder / f"{name}.toml"))
        task = asyncio.create_task(agent.run(), name=f"gateway {name}")
        try:
            tunnels = edge.edge.tunnels
            await edge.until(
                lambda: any(c.name == name for c in tunnels.candidates(SITE, SERVICE)), f"{name} connects"
            )
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
