"""Signing in as a person with a browser does: by a provider, by a passkey; and scanners that run a whole browser."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from support.applications import START_SECONDS, start_dashboard
from support.browser import gallery
from support.mail_server import MailServer, code_in, link_in
from support.provider import SECRET, provider
from support.scoreboard import row
from support.up import Up, answer
from support.visitor import STEP_MS, opens, press, sign_in, submit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = [pytest.mark.apps, pytest.mark.timeout(300)]

ALICE = "alice@example.org"
BOB = "bob@example.org"

CONFIG = """
[[authenticate]]
use = "email-code"
[[authenticate]]
use = "oidc"
name = "works"
label = "Continue with Works"
issuer = "{issuer}"
client_id = "basic"
client_secret = "{secret}"
[[authenticate]]
use = "oidc"
name = "google"
label = "Continue with Google"
issuer = "{issuer}"
client_id = "post"
token_auth = "client_secret_post"
client_secret = "{secret}"
"""


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    with provider() as found:
        yield found


@pytest.fixture
def up(mail: MailServer, tmp_path: Path) -> Iterator[Up]:
    yield from started(mail, tmp_path, "")


@pytest.fixture
def up_with_providers(mail: MailServer, tmp_path: Path, issuer: str) -> Iterator[Up]:
    yield from started(mail, tmp_path, CONFIG.format(issuer=issuer, secret=SECRET))


def started(mail: MailServer, folder: Path, config: str) -> Iterator[Up]:
    running = start_dashboard(folder)
    with running.program:
        running.program.wait_for_url(running.url, seconds=START_SECONDS)
        with Up(running.url, to=ALICE, mail=mail.url, folder=folder, config=config) as found:
            yield found


def at_provider(page: Page, login: str) -> None:
    page.locator("input[name=login]").fill(login, timeout=STEP_MS)
    page.locator("input[name=password]").fill("any")
    page.get_by_role("button", name="Sign-in").click()
    page.get_by_role("button", name="Continue").click(timeout=STEP_MS)


def lands(page: Page, up: Up) -> None:
    page.wait_for_url(f"{up.origin}/**", timeout=STEP_MS, wait_until="commit")
    page.get_by_text(f"Signed in as {ALICE}").wait_for(timeout=STEP_MS)


def test_with_a_provider(context: BrowserContext, mail: MailServer, up_with_providers: Up) -> None:
    up = up_with_providers
    page = context.new_page()
    opens(page, link_in(mail.take(ALICE)))
    press(page, "Continue")
    page.get_by_role("heading", name="Sign in to continue").wait_for(timeout=STEP_MS)
    labels = [link.inner_text() for link in page.locator("main a.button").all()]
    assert labels == ["Get a code by email", "Continue with Works", "Continue with Google"]
    gallery(page, "choose")
    press(page, "Continue with Works")
    at_provider(page, "verified")
    lands(page, up)
    assert urlsplit(page.url).query == "", "the address bar holds a code"


def test_a_provider_that_does_not_vouch(
    context: BrowserContext, mail: MailServer, up_with_providers: Up
) -> None:
    """Then a code is typed as well; limited by the owner to one provider, that one is begun at once."""
    up = up_with_providers
    answer(up.command("share", "update", up.share, "--sign-in", "google"))
    page = context.new_page()
    opens(page, link_in(mail.take(ALICE)))
    press(page, "Continue")
    at_provider(page, "silent")
    page.locator("input[name=code]").wait_for(timeout=STEP_MS)
    gallery(page, "code-after-provider")
    assert page.get_by_text("Use another address").count() == 0
    page.fill("input[name=code]", code_in(mail.take(ALICE)))
    submit(page, "code")
    lands(page, up)


def test_an_owner_chooses_the_ways_in_the_console(
    context: BrowserContext, mail: MailServer, up_with_providers: Up
) -> None:
    """For a new share by boxes on its form, later on the form for changes; the visitor meets what was ticked."""
    up = up_with_providers
    page = context.new_page()
    opens(page, up.edge + "/console/shares/new")
    page.fill("input[name=key]", up.api_key)
    submit(page, "key")
    press(page, "New share")
    boxes = page.get_by_role("group", name="Ways of signing in").get_by_role("checkbox")
    assert [box.get_attribute("name") for box in boxes.all()] == ["way-email-code", "way-works", "way-google"]
    page.fill("input[name=to]", BOB)
    page.get_by_label("Continue with Works").check()
    gallery(page, "console-new-share-ways")
    submit(page, "to")
    page.get_by_text("shown this once").wait_for(timeout=STEP_MS)

    visitor = context.new_page()
    link = link_in(mail.take(BOB))
    opens(visitor, link)
    press(visitor, "Continue")
    visitor.locator("input[name=login]").wait_for(timeout=STEP_MS)  # at the provider, without a choice

    press(page, "Change")
    assert page.get_by_label("Continue with Works").is_checked()
    page.get_by_label("Get a code by email").check()
    gallery(page, "console-change")
    submit(page, "path")
    page.get_by_text("is changed").wait_for(timeout=STEP_MS)
    assert page.get_by_text("works, email-code").or_(page.get_by_text("email-code, works")).is_visible()
    opens(visitor, link)
    press(visitor, "Continue")
    visitor.get_by_role("heading", name="Sign in to continue").wait_for(timeout=STEP_MS)
    labels = [shown.inner_text() for shown in visitor.locator("main a.button").all()]
    assert labels == ["Get a code by email", "Continue with Works"]


# ── passkeys ─────────────────────────────────────────────────────────────────────────────────────────────────────


def give_authenticator(page: Page) -> None:
    """A device with a fingerprint sensor, and a finger that is always on it."""
    session = page.context.new_cdp_session(page)
    session.send("WebAuthn.enable")
    session.send(
        "WebAuthn.addVirtualAuthenticator",
        {
            "options": {
                "protocol": "ctap2",
                "transport": "internal",
                "hasResidentKey": True,
                "hasUserVerification": True,
                "isUserVerified": True,
                "automaticPresenceSimulation": True,
            }
        },
    )


def test_a_remembered_device(context: BrowserContext, mail: MailServer, up: Up) -> None:
    page = context.new_page()
    give_authenticator(page)
    link = link_in(mail.take(ALICE))
    opens(page, link)
    press(page, "Continue")
    page.locator("input[name=email]").wait_for(timeout=STEP_MS)
    gallery(page, "sign-in-passkey")
    page.fill("input[name=email]", ALICE)
    submit(page, "email")
    page.locator("input[name=code]").wait_for(timeout=STEP_MS)
    page.locator("input[name=passkeys][value='1']").wait_for(state="attached", timeout=STEP_MS)
    page.fill("input[name=code]", code_in(mail.take(ALICE)))
    submit(page, "code")
    page.get_by_role("heading", name="Remember this device?").wait_for(timeout=STEP_MS)
    gallery(page, "remember")
    press(page, "Remember this device")
    lands(page, up)

    context.clear_cookies()
    opens(page, link)
    press(page, "Continue")
    press(page, "Use a passkey of this device")
    lands(page, up)

    # A page of the share asks for the passkey of the main origin.
    taken = page.evaluate(
        """async (id) => { try {
            const found = await navigator.credentials.get({publicKey: {rpId: id, challenge: new Uint8Array(32)}})
            return new TextDecoder().decode(found.response.clientDataJSON)
        } catch (error) { return error.name } }""",
        urlsplit(up.edge).hostname,
    )
    assert taken in ("SecurityError", "NotAllowedError") or f'"origin":"{up.origin}"' in taken

    context.clear_cookies()
    opens(page, link)
    press(page, "Continue")
    page.fill("input[name=email]", ALICE)
    submit(page, "email")
    page.locator("input[name=code]").wait_for(timeout=STEP_MS)
    page.fill("input[name=code]", code_in(mail.take(ALICE)))
    submit(page, "code")
    press(page, "Forget the devices that were remembered")
    lands(page, up)

    context.clear_cookies()
    opens(page, link)
    press(page, "Continue")
    press(page, "Use a passkey of this device")
    page.get_by_role("alert").filter(has_text="does not prove an address here any more").wait_for(
        timeout=STEP_MS
    )


def test_a_browser_without_passkeys_sees_nothing_of_them(
    context: BrowserContext, mail: MailServer, up: Up
) -> None:
    context.add_init_script("delete window.PublicKeyCredential")
    page = context.new_page()

    def look(name: str) -> None:
        assert page.locator("[data-passkey]:visible").count() == 0, name
        assert page.locator("[data-passkey-problem]:visible").count() == 0, name

    sign_in(page, link_in(mail.take(ALICE)), ALICE, mail, origin=up.origin, look=look)


# ── scanners with a browser ──────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def served(body: str) -> Iterator[str]:
    """A page of somebody else's."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def renders(page: Page, link: str) -> None:
    page.goto(link, wait_until="networkidle")


def clicks_everything(page: Page, link: str) -> None:
    """Every button and link of each page that comes, four deep."""
    page.goto(link)
    for _ in range(4):
        found = page.locator("main button:visible, main a:visible")
        if not found.count():
            return
        found.first.click(timeout=STEP_MS)
        page.wait_for_load_state()


def submits_everything(page: Page, link: str) -> None:
    """By script, so that nothing that is required holds it back."""
    page.goto(link)
    for _ in range(4):
        if not page.locator("form").count():
            return
        with page.expect_navigation(timeout=STEP_MS):
            page.evaluate("document.forms[0].submit()")


def types_an_address(page: Page, link: str) -> None:
    page.goto(link)
    press(page, "Continue")
    page.fill("input[name=email]", "scanner@example.net", timeout=STEP_MS)
    submit(page, "email")
    page.fill("input[name=code]", "12345678", timeout=STEP_MS)
    submit(page, "code")
    page.wait_for_load_state()


def embeds(page: Page, link: str) -> None:
    body = (
        f'<link rel=prefetch href="{link}"><link rel=prerender href="{link}"><img src="{link}"><iframe src="{link}">'
        f'</iframe><script type=speculationrules>{{"prerender": [{{"source": "list", "urls": ["{link}"]}}]}}</script>'
        f'<script>fetch("{link}", {{mode: "no-cors", credentials: "include"}})</script>'
    )
    with served(body) as url:
        page.goto(url)
        page.wait_for_timeout(1000)


def posts_from_elsewhere(page: Page, link: str) -> None:
    body = (
        f'<form method=post action="{link}"><input name=x></form><script>document.forms[0].submit()</script>'
    )
    with served(body) as url:
        page.goto(url)
        page.wait_for_url(lambda found: not found.startswith(url), timeout=STEP_MS)


BEHAVIOURS = (renders, clicks_everything, submits_everything, types_an_address, embeds, posts_from_elsewhere)


def test_scanners_that_run_a_browser(chromium: Browser, mail: MailServer, up: Up) -> None:
    link = link_in(mail.take(ALICE))
    gained = []
    for behave in BEHAVIOURS:
        context = chromium.new_context()
        try:
            behave(context.new_page(), link)
            names = {cookie.get("name") for cookie in context.cookies()}
            if names & {"__Host-gp-me", "__Host-guestpass"}:
                gained.append(behave.__name__)
        finally:
            context.close()
    live = answer(up.command("share", "show", up.share))["live"]
    context = chromium.new_context()
    try:
        page = context.new_page()
        sign_in(page, link, ALICE, mail, origin=up.origin)
        lands(page, up)
    finally:
        context.close()
    row(
        "mail scanners with a browser",
        f"{len(BEHAVIOURS)} behaviours of Chromium, then the recipient opens the same link",
        f"{len(gained)} gained something{gained or ''}, {live['sessions']} sessions; she gets in",
        "0",
        ok=not gained and not live["sessions"],
        figure=11,
    )
