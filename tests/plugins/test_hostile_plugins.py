"""A plugin that means harm, in a process of its own: what it is told, and what it can do to the edge."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.people import ALICE, BOB, MALLORY, People, people, plugin, usual
from support.served import serving
from support.stack import EMAIL, Stack, running

from guestpass.config import EdgeConfig, PluginSection, parse
from guestpass.edge import isolation
from guestpass.edge import plugins as module
from guestpass.edge.isolation import Isolated
from guestpass.edge.plugin_loader import KINDS
from guestpass.edge.plugins import PluginSet
from guestpass.errors import ConfigError, PluginError
from guestpass.model import Revocation, Revoked, SessionKind
from guestpass.plugin import Authenticator, Client, Denied, Plugin, Redirect, SignIn, Step, Unproven
from guestpass.shares.bus import Bus


@pytest.fixture
async def application() -> AsyncIterator[str]:
    async def show(request: web.Request) -> web.Response:
        return web.json_response({k.lower(): v for k, v in request.headers.items()})

    app = web.Application()
    app.router.add_get("/{tail:.*}", show)
    async with serving(app) as url:
        yield url


def isolated(folder: Path, source: str, cls: str, **settings: Any) -> dict[str, Any]:
    """A section for a plugin of this source. The imports are there already."""
    folder.chmod(0o755)
    file = folder / f"{cls.lower()}.py"
    file.write_text(f"import asyncio\nfrom guestpass.plugin import *\n\n{source}")
    file.chmod(0o644)
    return {"use": f"./{file.name}:{cls}", "isolation": "process", **settings}


# ── what it is told ──────────────────────────────────────────────────────────────────────────────────────────────

LISTENS = """
class Listens(RequestFilter):
    async def on_request(self, request):
        await self.host.storage.set("told", [list(field) for field in request.headers])
"""


async def test_a_filter_is_not_told_what_lets_somebody_in(tmp_path: Path, application: str) -> None:
    section = isolated(tmp_path, LISTENS, "Listens")
    async with running(tmp_path, application, config={"filter": [section]}) as stack:
        storage = stack.edge.service.storage("filter/Listens")
        _, secret = await stack.edge.service.open_session(
            stack.share_id, EMAIL, SessionKind.COOKIE, "email-code", Client("127.0.0.1"), None
        )
        credentials: tuple[Mapping[str, str], ...] = (
            {"Authorization": f"bearer  {stack.token}"},
            {"Cookie": f"theme=dark; __Host-guestpass={secret}; __Host-gp-console={secret}"},
        )
        for fields in credentials:
            headers = {"Host": stack.host, "X-Mine": "1", **fields}
            async with stack.session.get(stack.url("/"), headers=headers) as answer:
                assert answer.status == 200
            told = await storage.get("told")
            assert ["X-Mine", "1"] in told
            assert not any(s in str(told) for s in (stack.token, secret))
        assert ["Cookie", "theme=dark"] in told


async def test_a_sign_in_is_not_told_who_else_the_browser_is(tmp_path: Path) -> None:
    """The owner's console and what was shared with them are on the main origin as well."""
    told: list[SignIn] = []

    class Listens(Authenticator):
        label = "Listen"

        def begin(self, sign_in: SignIn) -> Step:
            told.append(sign_in)
            raise Denied("Not today.")

    plugins: dict[str, list[Plugin]] = usual()
    plugins["authenticate"].append(plugin(Listens, "listens"))
    async with people(tmp_path, plugins=plugins) as edge:
        share, _ = await edge.share()
        browser = edge.browser()
        page = await browser.follow(await browser.get(edge.origins.share_origin(share.id) + "/"))
        secrets = {"__Host-gp-console": "c" * 43, "__Host-gp-me": "m" * 43}
        browser.cookies[page.url.split("/")[2]].update(**secrets, theme="dark")
        await browser.get(f"{page.url}/listens", **{"X-Mine": "1"})
    (sign_in,) = told
    assert ("X-Mine", "1") in sign_in.headers
    assert [value for name, value in sign_in.headers if name == "Cookie"] == ["theme=dark"]


@pytest.mark.parametrize("where", ["the configuration", "the state"])
def test_an_edge_whose_files_it_could_read_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """As when they are kept below /usr, or in Python's environment."""
    settings = isolated(tmp_path, LISTENS, "Listens")
    shared = tmp_path / "prefix"
    state = shared if where == "the state" else tmp_path / "state"
    monkeypatch.setattr(isolation.sys, "prefix", str(shared if where == "the state" else tmp_path))
    toml = {
        "edge": {"state": f"sqlite:///{state}/edge.db", "share_domain": "x.example"},
        "filter": [settings],
    }
    config = parse(EdgeConfig, toml, tmp_path / "edge.toml")
    with pytest.raises(ConfigError, match="could read") as caught:
        PluginSet.load(config)
    assert str(state if where == "the state" else tmp_path) in caught.value.message
    assert "Keep" in caught.value.hint


# ── what a visitor can do to it ──────────────────────────────────────────────────────────────────────────────────

ASKS = """
class Asks(Authenticator):
    label = "Asks"
    def begin(self, sign_in):
        return Form("Who are you?", fields=(Field("email", "Address"),), state={"agent": sign_in.client.user_agent})
    def complete(self, sign_in, params):
        return Form("Once more", error=str(len(params["email"])), fields=(Field("email", "Address"),))
"""


def proxy_of(stack: Stack) -> Isolated:
    (found,) = [p for p in stack.edge.plugins.all if isinstance(p, Isolated)]
    return found


async def test_what_cannot_be_passed_on_is_no_fault_of_the_plugin(tmp_path: Path, application: str) -> None:
    """Else a stranger could have it switched off for everybody."""
    section = isolated(tmp_path, ASKS, "Asks")
    async with running(tmp_path, application, config={"authenticate": [section]}) as stack:
        for _ in range(module.BREAKER_FAILURES):
            flow = await stack.edge.service.create_flow({"type": "sign-in"}, 60)
            head = f"GET /signin/{flow} HTTP/1.1\r\nHost: localhost:{stack.port}\r\nUser-Agent: ".encode()
            answer = await stack.raw(head + b"\xff\xfe\r\nConnection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 303"), answer[:200]
        assert not stack.edge.plugins.health()
        sign_in = SignIn("f1", None, Client("192.0.2.1"), {}, "https://x.example/", _nobody)
        # As a body of the greatest size that is taken: in JSON each of these takes six bytes.
        for _ in range(module.BREAKER_FAILURES):
            with pytest.raises(Denied):
                await stack.edge.plugins.complete("Asks", sign_in, {"email": "\x01" * (256 << 10)})
        assert not stack.edge.plugins.health()


async def _nobody(address: str) -> bool:
    return False


WHO = """
class Who(Authenticator):
    label = "Who"
    private_headers = ("X-Who",)
    def begin(self, sign_in):
        raise Denied("no")
"""


async def test_its_private_fields_never_reach_an_application(tmp_path: Path, application: str) -> None:
    sections = [{"use": "email-code"}, {"use": "bearer-token"}, isolated(tmp_path, WHO, "Who")]
    async with running(tmp_path, application, config={"authenticate": sections}) as stack:
        answer = await stack.get("/", headers={"X-Who": "root", "x_who": "root", "X-Whom": "1"})
        assert answer.status == 200
        assert b"root" not in answer.body
        assert b"x-whom" in answer.body


def test_too_many_private_fields_are_refused(tmp_path: Path) -> None:
    source = WHO.replace('("X-Who",)', "tuple(f'X-{n}' for n in range(1000))")
    section = PluginSection.model_validate(isolated(tmp_path, source, "Who"))
    toml = tmp_path / "edge.toml"
    toml.write_text("")
    with pytest.raises(PluginError, match=f"at most {isolation.MAX_PRIVATE} names"):
        module._built(KINDS["authenticate"], section, 1, toml)


# ── what it can do to the edge ───────────────────────────────────────────────────────────────────────────────────

GUSHES = """
class Gushes(Revoker):
    def check(self, share, session):
        return None
    async def watch(self):
        for number in range(100_000):
            yield Revocation("more", session_id="e")
            if number % 100 == 0:
                await asyncio.sleep(0)
"""

DEAF = """
import json, socket, struct, sys, time

class Deaf(Observer):
    async def start(self, host):
        await super().start(host)
        await host.storage.set("big", "x" * 60_000)
        host.spawn(self.ask(), name="ask")
    async def ask(self):
        data = json.dumps({"do": "host", "id": 1 << 40, "name": "storage.get", "args": ["big"]}).encode()
        with socket.socket(fileno=int(sys.argv[1])) as edge:
            edge.setblocking(True)
            for number in range(150):  # and never reads an answer
                edge.sendall(20 * (struct.pack(">I", len(data)) + data))
                time.sleep(0.05)
            time.sleep(60)
    def on_event(self, event):
        return None
"""

CHATTERS = """
class Chatters(Observer):
    async def start(self, host):
        await super().start(host)
        for number in range(2000):
            host.logger.warning("%s", "n" * 20_000)
    def on_event(self, event):
        return None
"""


@pytest.mark.parametrize(
    ("section", "source", "cls", "why"),
    [
        ("revoke", GUSHES, "Gushes", f"more than {isolation.MAX_YIELDED} revocations wait"),
        ("observe", DEAF, "Deaf", f"more than {isolation.MAX_ASKED} questions at once"),
    ],
)
async def test_it_cannot_fill_the_edges_memory(
    tmp_path: Path,
    application: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    section: str,
    source: str,
    cls: str,
    why: str,
) -> None:
    """It is ended as soon as it says more than is taken from it, or asks without listening."""

    async def slow(self: Bus, revocation: Revocation) -> Revoked:
        await asyncio.sleep(0.01)  # as with several workers
        return Revoked(0, 0, 0.0)

    monkeypatch.setattr(Bus, "publish", slow)
    config = {section: [isolated(tmp_path, source, cls)]}
    async with running(tmp_path, application, config=config) as stack:
        proxy = proxy_of(stack)
        most = 0

        def is_ended() -> bool:
            nonlocal most
            writer = proxy._writer
            if writer is not None and not writer.transport.is_closing():
                most = max(most, writer.transport.get_write_buffer_size())
            return why in caplog.text

        await stack.until(is_ended, "it is ended")
        assert most < 2 * isolation.MAX_ASKED * 64 << 10


async def test_it_cannot_fill_the_log(
    tmp_path: Path, application: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"observe": [isolated(tmp_path, CHATTERS, "Chatters")]}
    async with running(tmp_path, application, config=config):
        lines = [r.getMessage() for r in caplog.records if r.name == "guestpass.plugin.observe.Chatters"]
    assert isolation.LOG_LINES <= len(lines) <= isolation.LOG_LINES + 1
    assert max(map(len, lines)) <= isolation.LOG_TEXT
    assert "are dropped" in lines[-1]


# ── what is asked after the hook has answered ────────────────────────────────────────────────────────────────────


async def test_the_bundled_email_code_in_a_process(tmp_path: Path) -> None:
    """It answers before anybody looks whether the address is invited, and asks for that afterwards."""
    section = PluginSection.model_validate({"use": "email-code", "isolation": "process"})
    toml = tmp_path / "edge.toml"
    toml.write_text("")
    plugins = usual()
    plugins["authenticate"] = [module._built(KINDS["authenticate"], section, 1, toml)]
    async with people(tmp_path, plugins=plugins) as edge:
        share, _ = await edge.share(ALICE)
        browser = edge.browser()
        page = await browser.sign_in(edge.origins.share_origin(share.id) + "/")
        assert page.text.startswith(f"application: {ALICE}")
        stranger = edge.browser()
        page = await stranger.follow(await stranger.get(edge.origins.share_origin(share.id) + "/"))
        await stranger.submit(page, email=MALLORY)
        async with asyncio.timeout(10):
            while not any(e.detail.get("reason") == "not_invited" for e in edge.seen):
                await asyncio.sleep(0.01)
        assert not edge.mail


# ── an address that a provider does not vouch for ────────────────────────────────────────────────────────────────


class Away(Authenticator):
    """A provider who says who somebody is, and does not prove it."""

    label = "By away"

    def begin(self, sign_in: SignIn) -> Step:
        return Redirect(f"https://idp.example/?state={sign_in.flow_id}.1", state={"n": 1})

    def complete(self, sign_in: SignIn, params: Mapping[str, str]) -> Step:
        return Unproven(params["email"], subject="s1")


PIN = """
class Pin(Authenticator):
    label = "By PIN"
    {blocking}
    {wait}def begin(self, sign_in):
        raise Denied("Not by itself.")
    {wait}def prove(self, sign_in, email):
        if email.startswith("mallory"):
            raise Denied("Not you.")
        known = {invited}
        return Form("Type the PIN", f"invited: {{known}}", (Field("pin", "PIN"),), state={{"email": email}})
    {wait}def complete(self, sign_in, params):
        if params["pin"] != "1234":
            return Form("Type the PIN", error="Wrong.", fields=(Field("pin", "PIN"),), state=sign_in.state)
        return Identity(params.get("instead") or sign_in.state["email"], "whoever")
"""
FORMS = {
    "waits": {"blocking": "", "wait": "async ", "invited": "await sign_in.is_invited(email)"},
    "blocks": {
        "blocking": "blocking = True",
        "wait": "",
        "invited": "self.host.wait(sign_in.is_invited(email))",
    },
}


@pytest.fixture(params=FORMS)
async def proving(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[People]:
    settings = isolated(tmp_path, PIN.format(**FORMS[request.param]), "Pin")
    toml = tmp_path / "edge.toml"
    toml.write_text("")
    prover = module._built(KINDS["authenticate"], PluginSection.model_validate(settings), 1, toml)
    plugins: dict[str, list[Plugin]] = usual()
    plugins["authenticate"] = [plugin(Away, "away"), prover]
    async with people(tmp_path, plugins=plugins) as edge:
        assert edge.plugins.prover == "Pin"
        yield edge


async def claim(edge: People, share: Any, email: str) -> tuple[Any, Any]:
    """A browser that comes back from the provider with this address."""
    browser = edge.browser()
    begun = await browser.get(edge.origins.share_origin(share.id) + "/")
    flow = begun.location.rpartition("/")[2]
    await browser.get(f"{begun.location}/away")
    return browser, await browser.follow(
        await browser.get(f"{edge.main}/callback/away?state={flow}.1&email={email}")
    )


async def test_a_claimed_address_is_proven_in_a_process(proving: People) -> None:
    share, _ = await proving.share(ALICE, sign_in=("away",))
    browser, page = await claim(proving, share, ALICE)
    assert "Type the PIN invited: True" in page.words
    page = await browser.follow(await browser.submit(page, pin="0000"))
    assert "Wrong." in page.words
    page = await browser.follow(await browser.submit(page, pin="1234"))
    assert page.text.startswith(f"application: {ALICE}")
    (session,) = await proving.service.sessions(share.id)
    # As who knew the address, not as who proved it.
    assert (session.email, session.provider) == (ALICE, "away")


async def test_a_process_proves_no_other_address(proving: People) -> None:
    share, _ = await proving.share(ALICE)
    browser, page = await claim(proving, share, BOB)
    assert "invited: False" in page.words
    page = await browser.follow(await browser.submit(page, pin="1234", instead=ALICE))
    assert page.status == 403
    assert not await proving.service.sessions(share.id)


async def test_a_process_refuses_to_prove(proving: People) -> None:
    share, _ = await proving.share(ALICE)
    browser, page = await claim(proving, share, MALLORY)
    assert (page.status, "Not you." in page.words) == (403, True)
    flow = page.url.partition("state=")[2].partition(".")[0]
    assert (await browser.get(f"{proving.main}/signin/{flow}")).status == 410  # over


async def test_a_process_that_dies_proves_nothing(proving: People) -> None:
    share, _ = await proving.share(ALICE)
    browser, page = await claim(proving, share, ALICE)
    (prover,) = [p for p in proving.plugins.all if isinstance(p, Isolated)]
    prover.kill()
    assert (await browser.submit(page, pin="1234")).status == 503
    assert not await proving.service.sessions(share.id)
