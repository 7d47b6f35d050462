"""Guestpass's own pages in a browser: every step of a recipient and of an owner, on a desktop and on the narrowest
phone, light and dark, by keyboard alone and without scripts, and with nothing loaded from elsewhere.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from support.applications import START_SECONDS, start_dashboard
from support.browser import Sockets, gallery
from support.mail_server import MailServer, code_in, link_in
from support.programs import wait_until
from support.up import Up, answer
from support.visitor import STEP_MS, opens, press, sign_in, submit

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = [pytest.mark.apps, pytest.mark.timeout(300)]

ALICE = "alice@example.org"
MALLORY = "mallory@example.org"

NAME = "Riverside, “line 3”"
MESSAGE = "The numbers we spoke about. Pump 2 is the one to watch."


@pytest.fixture
def up(mail: MailServer, tmp_path: Path) -> Iterator[Up]:
    running = start_dashboard(tmp_path)
    options = ["--name", NAME, "--message", MESSAGE, "--expires", "7d"]
    with running.program:
        running.program.wait_for_url(running.url, seconds=START_SECONDS)
        with Up(running.url, to=ALICE, mail=mail.url, folder=tmp_path, options=options) as found:
            yield found


def test_every_page_of_a_recipient(context: BrowserContext, mail: MailServer, up: Up) -> None:
    page = context.new_page()
    asked = hosts_asked(page)
    link = link_in(mail.take(ALICE))

    def look(name: str) -> None:
        if name == "link":
            assert page.get_by_role("heading", name=NAME).is_visible()
            assert page.get_by_text(MESSAGE).is_visible()
        gallery(page, name)
        if name == "code":
            page.fill("input[name=code]", "0000 0000")
            submit(page, "code")
            page.get_by_role("alert").wait_for(timeout=STEP_MS)
            gallery(page, "code-wrong")

    sign_in(page, link, ALICE, mail, origin=up.origin, look=look)
    page.locator("#state.live").wait_for(timeout=STEP_MS)
    assert page.get_by_text(f"Signed in as {ALICE}").is_visible()
    assert urlsplit(page.url).query == "", "the address bar holds a code"
    gallery(page, "application-dashboard")

    assert opens(page, up.edge + "/").status == 200
    gallery(page, "home")
    assert opens(page, up.edge + "/nowhere").status == 404
    gallery(page, "not-found")
    assert opens(page, up.origin + "/.guestpass/sign-out").status == 200
    gallery(page, "sign-out")
    assert asked == {urlsplit(up.edge).netloc, urlsplit(up.origin).netloc}


def test_keyboard_alone_and_no_scripts(chromium: Browser, mail: MailServer, up: Up) -> None:
    context = chromium.new_context(java_script_enabled=False)
    try:
        page = context.new_page()
        opens(page, link_in(mail.take(ALICE)))
        tab_to(page, "Continue")
        page.keyboard.press("Enter")
        page.locator("input[name=email]").wait_for(timeout=STEP_MS)
        assert page.locator("input[name=email]:focus").count() == 1, "the first field has no focus"
        page.keyboard.type(ALICE)
        page.keyboard.press("Enter")
        page.locator("input[name=code]:focus").wait_for(timeout=STEP_MS)
        page.keyboard.type(code_in(mail.take(ALICE)))
        page.keyboard.press("Enter")
        page.wait_for_url(f"{up.origin}/**", timeout=STEP_MS)
        assert page.get_by_text(f"Signed in as {ALICE}").is_visible()
    finally:
        context.close()


def test_an_owner_with_keyboard_alone_and_no_scripts(chromium: Browser, mail: MailServer, up: Up) -> None:
    """From the key to a share that is made, changed and deleted."""
    context = chromium.new_context(java_script_enabled=False)
    try:
        page = context.new_page()
        opens(page, up.edge + "/console")
        page.locator("input[name=key]:focus").wait_for(timeout=STEP_MS)
        page.keyboard.type(up.api_key)
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Shares", exact=True).wait_for(timeout=STEP_MS)
        tab_to(page, "New share")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="New share").wait_for(timeout=STEP_MS)
        tab_to_field(page, "to")
        page.keyboard.type("bob@example.org")
        tab_to_field(page, "path")
        page.keyboard.press("Control+A")
        page.keyboard.type("/line-3")
        tab_to_field(page, "only")
        page.keyboard.press("Space")
        tab_to_field(page, "name")
        page.keyboard.type("For Bob")
        tab_to(page, "Share")
        page.keyboard.press("Enter")
        page.get_by_text("shown this once").wait_for(timeout=STEP_MS)
        assert page.get_by_text("* /line-3/**").is_visible()
        tab_to(page, "Change")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Change “For Bob”").wait_for(timeout=STEP_MS)
        tab_to_field(page, "name")
        page.keyboard.press("Control+A")
        page.keyboard.type("For Robert")
        page.keyboard.press("Enter")
        page.get_by_text("“For Robert” is changed").wait_for(timeout=STEP_MS)
        tab_to(page, "Delete")
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Delete “For Robert”?").wait_for(timeout=STEP_MS)
        tab_to(page, "Delete the share")
        page.keyboard.press("Enter")
        page.get_by_text("“For Robert” is deleted").wait_for(timeout=STEP_MS)
    finally:
        context.close()


def test_who_is_invited_shows_nowhere(context: BrowserContext, mail: MailServer, up: Up) -> None:
    """An address that is not invited sees the same page in the same words, and is sent nothing."""
    link = link_in(mail.take(ALICE))
    seen = []
    for address in (MALLORY, ALICE):
        page = context.new_page()
        opens(page, link)
        press(page, "Continue")
        page.fill("input[name=email]", address)
        submit(page, "email")
        page.locator("input[name=code]").wait_for(timeout=STEP_MS)
        seen.append(page.locator("main").inner_text().replace(address, "ADDRESS"))
        page.close()
    assert seen[0] == seen[1]
    mail.take(ALICE)  # was asked for later, so one for the other address would be there by now
    assert mail.is_empty()


def test_every_page_of_an_owner(context: BrowserContext, mail: MailServer, up: Up) -> None:
    page = context.new_page()
    assert opens(page, up.edge + "/console").status in (200, 401)
    gallery(page, "console-sign-in")
    page.fill("input[name=key]", "not the key")
    submit(page, "key")
    page.locator(".fault").wait_for(timeout=STEP_MS)
    page.fill("input[name=key]", up.api_key)
    submit(page, "key")
    page.get_by_role("link", name=NAME).wait_for(timeout=STEP_MS)

    visitor = context.new_page()
    visitor_sockets = Sockets(visitor)
    sign_in(visitor, link_in(mail.take(ALICE)), ALICE, mail, origin=up.origin)
    visitor.locator("#viewers", has_text="1").wait_for(timeout=STEP_MS)

    page.reload()
    page.get_by_text("1 viewer").first.wait_for(timeout=STEP_MS)
    gallery(page, "console-shares")
    press(page, "Gateways")
    page.get_by_text("connected").first.wait_for(timeout=STEP_MS)
    gallery(page, "console-gateways")

    press(page, "New share")
    page.fill("input[name=to]", "bob@example.org, carol@")
    page.fill("input[name=service]", "local/app")
    page.fill("input[name=name]", "For Bob")
    submit(page, "name")
    page.get_by_role("alert").wait_for(timeout=STEP_MS)
    gallery(page, "console-new-share")
    page.fill("input[name=to]", "bob@example.org, carol@example.org")
    submit(page, "to")
    page.get_by_text("shown this once").wait_for(timeout=STEP_MS)
    for address in ("bob@example.org", "carol@example.org"):
        link = link_in(mail.take(address))
        assert link.startswith(up.edge)

    press(page, "Shares")
    page.get_by_role("link", name=NAME).click()
    page.get_by_role("heading", name=NAME).wait_for(timeout=STEP_MS)
    gallery(page, "console-share")
    page.get_by_role("link", name="Delete").click()
    gallery(page, "console-delete")
    live = visitor_sockets.live()
    page.get_by_role("button", name="Delete the share").click()
    page.get_by_text("1 session").or_(page.get_by_text("1 viewer")).first.wait_for(timeout=STEP_MS)
    assert live
    visitor_sockets.wait_until_closed(live, seconds=1.0)
    gallery(page, "console-deleted")

    answer = visitor.reload()
    assert answer is not None
    assert answer.status == 410
    gallery(visitor, "ended")
    assert opens(visitor, up.link).status == 410


def test_the_list_of_a_recipient(context: BrowserContext, mail: MailServer, up: Up) -> None:
    """What is shared with somebody, and how they leave it."""
    page = context.new_page()
    assert opens(page, up.edge + "/me").status == 200
    gallery(page, "me-start")
    press(page, "Continue")
    page.fill("input[name=email]", ALICE)
    submit(page, "email")
    page.locator("input[name=code]").wait_for(timeout=STEP_MS)
    mail.take(ALICE)  # the invitation
    page.fill("input[name=code]", code_in(mail.take(ALICE)))
    submit(page, "code")
    page.get_by_role("heading", name="Shared with you").wait_for(timeout=STEP_MS)
    gallery(page, "me")
    press(page, f"Remove me from {NAME}")
    gallery(page, "me-remove")
    press(page, "Keep it")
    press(page, f"Open {NAME}")
    press(page, f"Continue as {ALICE}")
    page.get_by_text(f"Signed in as {ALICE}").wait_for(timeout=STEP_MS)
    opens(page, up.edge + "/me")
    press(page, f"Remove me from {NAME}")
    press(page, "Remove me")
    page.get_by_text("You are no longer among the recipients").wait_for(timeout=STEP_MS)
    gallery(page, "me-removed")
    press(page, "Sign out of this list")
    page.get_by_role("heading", name="You are signed out").wait_for(timeout=STEP_MS)
    gallery(page, "signed-out")
    assert opens(page, up.origin + "/").status == 410


def test_pages_of_what_goes_wrong(context: BrowserContext, mail: MailServer, tmp_path: Path) -> None:
    """A wrong link, a wrong address, a sign-in that is over, an application that is down, a gateway that is gone."""
    running = start_dashboard(tmp_path)
    with (
        running.program,
        Up(running.url, to=ALICE, mail=mail.url, folder=tmp_path, options=["--name", NAME]) as up,
    ):
        running.program.wait_for_url(running.url, seconds=START_SECONDS)
        page = context.new_page()
        assert opens(page, up.edge + "/s/AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA").status == 404
        gallery(page, "wrong-link")
        assert opens(page, up.edge + "/signin/AAAAAAAAAAAAAAAAAAAAAAAAAAAA").status == 410
        gallery(page, "sign-in-over")

        sign_in(page, link_in(mail.take(ALICE)), ALICE, mail, origin=up.origin)
        page.locator("#state.live").wait_for(timeout=STEP_MS)
        other = answer(up.command("share", "create", "--service", "local/app", "--to", "bob@example.org"))
        opens(page, other["origin"] + "/")
        press(page, f"Continue as {ALICE}")
        page.get_by_role("heading", name="You are not invited").wait_for(timeout=STEP_MS)
        gallery(page, "not-invited")

        full = answer(
            up.command(*("share", "create", "--service", "local/app", "--to", ALICE), "--max-sessions", "1")
        )
        for expected in ("Signed in as", "All places are taken"):
            opens(page, full["origin"] + "/.guestpass/start")
            press(page, f"Continue as {ALICE}")
            page.get_by_text(expected).first.wait_for(timeout=STEP_MS)
            page.context.clear_cookies(domain=urlsplit(full["origin"]).hostname)
        gallery(page, "all-places-taken")

        scoped = answer(
            up.command(*("share", "create", "--service", "local/app", "--to", ALICE), "--scope", "GET /")
        )
        opens(page, scoped["origin"] + "/")
        press(page, f"Continue as {ALICE}")
        page.wait_for_url(f"{scoped['origin']}/**", timeout=STEP_MS, wait_until="commit")
        assert opens(page, scoped["origin"] + "/not-shared").status == 403
        gallery(page, "not-shared")

        def reaches(status: int) -> None:
            wait_until(
                f"the share answers {status}",
                lambda: opens(page, up.origin + "/").status == status,
                seconds=STEP_MS / 1000,
                pause=lambda seconds: page.wait_for_timeout(seconds * 1000),
            )

        running.program.stop()
        reaches(502)
        gallery(page, "application-down")
        for pid in up.facts["pids"]["gateways"]:
            os.kill(pid, signal.SIGKILL)
        reaches(503)
        gallery(page, "no-gateway")


def hosts_asked(page: Page) -> set[str]:
    """Every host that the page asks for anything, from now on."""
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("websocket", lambda websocket: hosts.add(urlsplit(websocket.url).netloc))
    return hosts


def tab_to(page: Page, words: str) -> None:
    """Press Tab until the button or link has the focus."""
    tab_until(page, words, lambda: page.locator("button:focus, a:focus", has_text=words).count())


def tab_to_field(page: Page, name: str) -> None:
    tab_until(page, name, lambda: page.locator(f"[name={name}]:focus").count())


def tab_until(page: Page, what: str, reached: Callable[[], int]) -> None:
    for _ in range(30):
        page.keyboard.press("Tab")
        if reached():
            return
    raise AssertionError(f"{what} is not reached by keyboard")
