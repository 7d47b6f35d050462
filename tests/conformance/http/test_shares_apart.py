"""Two shares of one domain in one browser, real Chromium: a page of the one can do nothing to the other.

They are siblings, so a browser counts them as one site: SameSite cookies go along, and a page may set cookies for the
domain of both. What keeps them apart is that each is an origin of its own (which the browser enforces), that our
cookies are __Host- (which it enforces too), and that the edge looks where an unsafe request or an upgrade comes from.

The application counts what reaches it, for each share; whether an attempt was accepted is read there and in the
browser. Everything that a neighbour tries, the share's own page does as well, and there it must work.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conformance.http.world import SITE, START_SECONDS, Lane
from support.browser import browser
from support.programs import Program, free_port, wait_until
from support.scoreboard import row

from guestpass.config import load_edge
from guestpass.edge.app import Edge
from guestpass.gateway.enroll import load_or_create_key
from guestpass.local_ca import write_certificates
from guestpass.model import Gateway, SessionKind
from guestpass.plugin import Client
from guestpass.shares.service import NewShare
from guestpass.shares.store import gateways as gateway_rows

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

DOMAIN = "share.localhost"
APP = Path(__file__).parent / "origins" / "neighbour_app.py"
VICTIM, ATTACKER = "alice@example.org", "mallory@example.org"
STEP_MS = 20_000


@dataclass
class Neighbours:
    """`mine` is the attacker's share, `other` the one that the attacker's page is after; one browser is in both."""

    lane: Lane
    app: str
    mine: str
    other: str
    secrets: dict[str, str]
    context: BrowserContext
    accepted: list[str] = field(default_factory=list)
    tried: int = 0

    def origin(self, share: str) -> str:
        return f"https://{share}.{DOMAIN}:{self.lane.tls_port}"

    def counts(self) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.app}/counts", timeout=10) as answer:
            found: dict[str, int] = json.load(answer)
        return found

    def count(self, share: str, what: str) -> int:
        return self.counts().get(f"{share} {what}", 0)

    def at(self, share: str, path: str = "/") -> Page:
        page = self.context.new_page()
        answer = page.goto(self.origin(share) + path)
        assert answer is not None
        assert answer.status == 200, answer.text()
        return page

    def sign_in(self) -> None:
        """As the edge does it, at the end of a sign-in."""
        self.context.clear_cookies()
        self.context.add_cookies(
            [
                {
                    "name": "__Host-guestpass",
                    "value": self.secrets[share],
                    "url": self.origin(share),
                    "secure": True,
                    "httpOnly": True,
                    "sameSite": "Lax",
                }
                for share in (self.mine, self.other)
            ]
        )

    def judge(self, name: str, *, accepted: bool) -> None:
        self.tried += 1
        if accepted:
            self.accepted.append(name)


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbours]:
    folder = tmp_path_factory.mktemp("neighbours")
    with ExitStack() as stack:
        app_port, port, admin = free_port(), free_port(), free_port()
        app = stack.enter_context(Program([sys.executable, APP, str(app_port)], log=folder / "app.log"))
        app.wait_for_line("ready", seconds=START_SECONDS)
        ca, cert, cert_key = write_certificates(folder, (DOMAIN, f"*.{DOMAIN}", "localhost"))
        key = load_or_create_key(folder / "gateway.key")
        (folder / "edge.toml").write_text(
            f'[edge]\nlisten = ["https://127.0.0.1:{port}"]\nadmin_listen = "127.0.0.1:{admin}"\n'
            f'public_url = "https://{DOMAIN}:{port}"\nshare_domain = "{DOMAIN}:{port}"\n'
            f'tls = {{ cert = "{cert.name}", key = "{cert_key.name}" }}\ndrain_seconds = 1\n',
            "utf-8",
        )
        (folder / "gateway.toml").write_text(
            f'[gateway]\nname = "gw-1"\nsite = "{SITE}"\nkey = "gateway.key"\nca = "{ca.name}"\n'
            f'edges = ["https://localhost:{port}"]\n[services.app]\nurl = "http://127.0.0.1:{app_port}"\n',
            "utf-8",
        )
        lane = Lane("fast", folder, port, port, admin, ssl.create_default_context(cafile=str(ca)))
        (mine, one), (other, two) = asyncio.run(_prepare(folder, key.public_key().public_bytes_raw()))
        guestpass = (sys.executable, "-m", "guestpass")
        for name in ("edge", "gateway"):
            command = [*guestpass, name, "--config", str(folder / f"{name}.toml"), "--json"]
            program = stack.enter_context(Program(command, log=folder / f"{name}.log"))
            program.wait_for_line("{", seconds=START_SECONDS)
            lane.program = lane.program or program
        wait_until(
            "the gateway is connected", lambda: lane.metric("guestpass_tunnels"), seconds=START_SECONDS
        )
        # No browser knows the CA, and for service workers it is not enough that a context ignores it.
        chromium = stack.enter_context(browser("--ignore-certificate-errors"))
        context = chromium.new_context()
        context.set_default_timeout(STEP_MS)
        found = Neighbours(
            lane, f"http://127.0.0.1:{app_port}", mine, other, {mine: one, other: two}, context
        )
        yield found
        context.close()
        if found.tried:  # some of the tests may have been selected
            row(
                "shares against each other",
                f"{found.tried} attempts of one share's page on another share, in Chromium",
                f"{len(found.accepted)} accepted {found.accepted or ''}".strip(),
                "0",
                ok=not found.accepted,
                figure=12,
            )


async def _prepare(folder: Path, public_key: bytes) -> list[tuple[str, str]]:
    """The gateway, two shares, and a session of a browser in each; (share, secret)."""
    edge = Edge(load_edge(folder / "edge.toml"))
    await edge.start()
    try:
        gateway = Gateway(SITE, "gw-1", public_key, time.time())
        await edge.service._store.write(lambda db: gateway_rows.insert(db, gateway))
        found = []
        for email in (ATTACKER, VICTIM):
            new = NewShare(site=SITE, service="app", path="/", to=[email], invite=False)
            created = await edge.service.create(new)
            _, secret = await edge.service.open_session(
                created.share.id, email, SessionKind.COOKIE, "email-code", Client("127.0.0.1")
            )
            found.append((created.share.id, secret))
        return found
    finally:
        await edge.stop()


@pytest.fixture(autouse=True)
def signed_in(neighbours: Neighbours) -> Iterator[None]:
    neighbours.sign_in()
    yield
    for page in neighbours.context.pages:
        page.close()


def test_they_are_one_site(neighbours: Neighbours) -> None:
    """Else a browser would keep them apart by itself, and all of this would prove nothing."""
    page = neighbours.at(neighbours.mine)
    page.evaluate(READ, [neighbours.origin(neighbours.other), {"credentials": "include", "mode": "no-cors"}])
    assert neighbours.count(neighbours.other, f"same-site {VICTIM}") == 1


# Scripts of a page; `other` is an origin. Each says whether it got through, as far as the page can know.
FETCH = """async ([other, options]) => {
  try { const answer = await fetch(other + "/act", options); return answer.type !== "opaque" && answer.ok; }
  catch { return false; }
}"""
READ = """async ([other, options]) => {
  try { const answer = await fetch(other + "/", options); return (await answer.text()).includes("secret"); }
  catch { return false; }
}"""
SOCKET = """([other]) => new Promise((done) => {
  const socket = new WebSocket(other.replace("https", "wss") + "/socket");
  socket.onmessage = (event) => done(event.data === "secret");
  socket.onerror = socket.onclose = () => done(false);
})"""
BEACON = """([other]) =>
  navigator.sendBeacon(other + "/act", "x") && new Promise((done) => setTimeout(done, 500, false))
"""
FORM = """([other, method, encoding]) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.name = "target";
  document.body.append(frame);
  const form = document.createElement("form");
  Object.assign(form, { action: other + "/act", method, enctype: encoding, target: "target" });
  const input = document.createElement("input");
  input.name = "a";
  form.append(input);
  document.body.append(form);
  frame.onload = () => { if (frame.dataset.sent) done(false); };
  frame.dataset.sent = "1";
  form.submit();
})"""
FRAME = """([other]) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.src = other + "/";
  frame.onload = () => {
    try { done(frame.contentDocument.body.innerText.includes("secret")); } catch { done(false); }
  };
  document.body.append(frame);
})"""
RELAXED = (
    "([other, domain]) => { try { document.domain = domain; } catch {} return (" + FRAME + ")([other]); }"
)
WORKER = """async ([other]) => {
  try { await navigator.serviceWorker.register(other + "/worker.js"); return true; } catch { return false; }
}"""
WIDER = """async () => {
  try { await navigator.serviceWorker.register("/deep/worker.js", { scope: "/" }); return true; }
  catch { return false; }
}"""

ACTS: dict[str, tuple[str, list[Any]]] = {
    "POST, no-cors": (FETCH, [{"method": "POST", "mode": "no-cors", "credentials": "include", "body": "x"}]),
    "POST, cors": (FETCH, [{"method": "POST", "credentials": "include", "body": "x"}]),
    "POST without a body": (FETCH, [{"method": "POST", "mode": "no-cors", "credentials": "include"}]),
    "POST without a referrer": (
        FETCH,
        [{"method": "POST", "mode": "no-cors", "credentials": "include", "referrerPolicy": "no-referrer"}],
    ),
    "PUT": (FETCH, [{"method": "PUT", "credentials": "include", "body": "x"}]),
    "DELETE": (FETCH, [{"method": "DELETE", "credentials": "include"}]),
    "POST of JSON": (
        FETCH,
        [
            {
                "method": "POST",
                "credentials": "include",
                "body": "{}",
                "headers": {"Content-Type": "application/json"},
            }
        ],
    ),
    "POST with keepalive": (
        FETCH,
        [{"method": "POST", "mode": "no-cors", "credentials": "include", "keepalive": True, "body": "x"}],
    ),
    "a beacon": (BEACON, []),
    "a form": (FORM, ["POST", "application/x-www-form-urlencoded"]),
    "a form of plain text": (FORM, ["POST", "text/plain"]),
    "a form with parts": (FORM, ["POST", "multipart/form-data"]),
}


@pytest.mark.parametrize("name", ACTS)
def test_a_page_cannot_act_on_another_share(neighbours: Neighbours, name: str) -> None:
    script, more = ACTS[name]
    page = neighbours.at(neighbours.mine)
    before = neighbours.count(neighbours.other, "act")
    claimed = page.evaluate(script, [neighbours.origin(neighbours.other), *more])
    acted = neighbours.count(neighbours.other, "act") - before
    neighbours.judge(name, accepted=bool(claimed) or acted > 0)
    assert (bool(claimed), acted) == (False, 0)
    # And the share's own page can.
    own = neighbours.at(neighbours.other)
    own.evaluate(script, [neighbours.origin(neighbours.other), *more])
    wait_until(
        "the share's own page acts",
        lambda: neighbours.count(neighbours.other, "act") == before + 1,
        seconds=10,
        pause=lambda seconds: own.wait_for_timeout(seconds * 1000),
    )


def test_a_page_cannot_open_another_shares_socket(neighbours: Neighbours) -> None:
    page = neighbours.at(neighbours.mine)
    opened = page.evaluate(SOCKET, [neighbours.origin(neighbours.other)])
    reached = neighbours.count(neighbours.other, "socket")
    neighbours.judge("a WebSocket", accepted=opened or reached > 0)
    assert (opened, reached) == (False, 0)
    own = neighbours.at(neighbours.other)
    assert own.evaluate(SOCKET, [neighbours.origin(neighbours.other)])


READS: dict[str, tuple[str, list[Any]]] = {
    "fetch": (READ, [{"credentials": "include"}]),
    "fetch, no-cors": (READ, [{"credentials": "include", "mode": "no-cors"}]),
    "a frame": (FRAME, []),
    "a frame, document.domain": (RELAXED, [DOMAIN]),
}


@pytest.mark.parametrize("name", READS)
def test_a_page_cannot_read_another_share(neighbours: Neighbours, name: str) -> None:
    script, more = READS[name]
    page = neighbours.at(neighbours.mine)
    got = page.evaluate(script, [neighbours.origin(neighbours.other), *more])
    neighbours.judge(f"reading by {name}", accepted=bool(got))
    assert not got
    own = neighbours.at(neighbours.other)
    assert own.evaluate(script, [neighbours.origin(neighbours.other), *more]), "the share's own page reads it"


TOSSED = (
    "__Host-guestpass=evil; Domain=share.localhost; Path=/; Secure",
    "__Host-guestpass=evil; Domain=.share.localhost; Path=/; Secure",
    "__host-guestpass=evil; Domain=share.localhost; Path=/; Secure",
    "__HOST-GUESTPASS=evil; Domain=share.localhost; Path=/; Secure",
    "=__Host-guestpass=evil; Domain=share.localhost; Path=/; Secure",
    "__Host-guestpass; Domain=share.localhost; Path=/; Secure",
    " \t__Host-guestpass=evil; Domain=share.localhost; Path=/; Secure",
    "\u2000__Host-guestpass=evil; Domain=share.localhost; Path=/; Secure",
    "\u00a0__Host-guestpass=evil; Domain=share.localhost; Path=/; Secure",
    "__Secure-guestpass=evil; Domain=share.localhost; Path=/; Secure",
    "__Host-gp-nonce=evil; Domain=share.localhost; Path=/; Secure",
    "__Host-gp-flow=evil; Domain=share.localhost; Path=/; Secure",
    "a=1; __Host-guestpass=evil; Domain=share.localhost; Path=/; Secure",
)


@pytest.mark.parametrize("cookie", TOSSED)
def test_a_page_cannot_toss_a_session_at_another_share(neighbours: Neighbours, cookie: str) -> None:
    """Also not one of its own: a visitor who works in a stranger's session tells them everything."""
    page = neighbours.at(neighbours.mine)
    for value in ("evil", neighbours.secrets[neighbours.mine]):
        page.evaluate("(cookie) => { document.cookie = cookie; }", cookie.replace("evil", value))
    before = neighbours.count(neighbours.other, f"page {VICTIM}")
    neighbours.at(neighbours.other)  # with the session of before, or this fails
    served = neighbours.count(neighbours.other, f"page {VICTIM}") - before
    strangers = [
        name for name in neighbours.counts() if name.startswith(neighbours.other) and ATTACKER in name
    ]
    neighbours.judge(f"tossing {cookie.partition(';')[0]}", accepted=served != 1 or bool(strangers))
    assert (served, strangers) == (1, [])
    # Without a session of its own the share is shut, whatever was tossed.
    neighbours.context.clear_cookies(name="__Host-guestpass")
    page.evaluate(
        "(cookie) => { document.cookie = cookie; }",
        cookie.replace("evil", neighbours.secrets[neighbours.other]),
    )
    probe = neighbours.context.new_page()
    answer = probe.goto(neighbours.origin(neighbours.other) + "/")
    assert answer is not None
    inside = "secret" in answer.text()
    neighbours.judge(f"entering by {cookie.partition(';')[0]}", accepted=inside)
    assert not inside


def test_an_application_cannot_set_cookies_for_its_neighbours(neighbours: Neighbours) -> None:
    page = neighbours.at(neighbours.mine, "/toss")
    set_here = {cookie["name"] for cookie in neighbours.context.cookies(neighbours.origin(neighbours.mine))}
    assert {"kept", "tossed-1"} <= set_here, "on its own origin they are what it said"
    page.goto(neighbours.origin(neighbours.other) + "/cookies")
    seen = page.inner_text("body")
    for name in ("tossed-1", "tossed-2", "tossed-3", "__Host-guestpass"):
        neighbours.judge(f"Set-Cookie of {name} for the domain", accepted=name in seen)
    assert seen == "[]"
    # And the session on its own origin is still ours.
    neighbours.at(neighbours.mine)


def test_no_worker_reaches_beyond_its_place(neighbours: Neighbours) -> None:
    page = neighbours.at(neighbours.mine)
    foreign = page.evaluate(WORKER, [neighbours.origin(neighbours.other)])
    neighbours.judge("a service worker for another share", accepted=foreign)
    assert not foreign
    # The application allows its script the whole origin; that is not passed on.
    wider = page.evaluate(WIDER)
    neighbours.judge("a service worker above its folder", accepted=wider)
    assert not wider
    assert page.evaluate(WORKER, [neighbours.origin(neighbours.mine)]), "a worker of its own it may have"


def test_storage_is_the_shares_own(neighbours: Neighbours) -> None:
    page = neighbours.at(neighbours.mine)
    page.evaluate("() => localStorage.setItem('a', 'evil')")
    page.goto(neighbours.origin(neighbours.other) + "/")
    found = page.evaluate("() => localStorage.getItem('a')")
    neighbours.judge("storage", accepted=found is not None)
    assert found is None


def test_a_deleted_share_takes_its_worker_along(neighbours: Neighbours) -> None:
    """The last one of the module: the attacker's share is gone afterwards. 410 has Clear-Site-Data."""
    page = neighbours.at(neighbours.mine)
    assert page.evaluate(WORKER, [neighbours.origin(neighbours.mine)])
    page.evaluate("async () => { await navigator.serviceWorker.ready; }")
    page.evaluate("() => localStorage.setItem('a', 'left')")
    page.reload()
    assert page.evaluate("() => navigator.serviceWorker.controller !== null"), "it stands in between"
    api_key = (neighbours.lane.folder / "api.key").read_text("ascii").strip()
    deletion = urllib.request.Request(
        f"https://localhost:{neighbours.lane.port}/api/v1/shares/{neighbours.mine}",
        method="DELETE",
        headers={"Host": f"{DOMAIN}:{neighbours.lane.port}", "Authorization": f"Bearer {api_key}"},
    )
    with urllib.request.urlopen(deletion, timeout=20, context=neighbours.lane.tls) as deleted:
        assert deleted.status == 200
    answer = page.goto(neighbours.origin(neighbours.mine) + "/")
    assert answer is not None
    assert answer.status == 410
    page.goto(neighbours.origin(neighbours.mine) + "/")
    left = page.evaluate("async () => (await navigator.serviceWorker.getRegistrations()).length")
    stored = page.evaluate("() => localStorage.getItem('a')")
    neighbours.judge("a service worker of a deleted share", accepted=left > 0)
    assert (left, stored) == (0, None)
    neighbours.at(neighbours.other)
