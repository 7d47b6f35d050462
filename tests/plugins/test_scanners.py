"""What reads mail before people do: scanners, link expanders, previews, prefetchers. None may use an invitation up, nor
get further than the page that asks for a code which is in somebody's mailbox.

Those that run a whole browser are in tests/apps/test_sign_in.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.people import ALICE, MALLORY, Answer, Browser, People, people
from support.scoreboard import row

from guestpass.model import Share


@dataclass
class Mail:
    """An invitation, and the edge that it leads to."""

    edge: People
    share: Share
    link: str
    browsers: list[Browser]

    def browser(self, **headers: str) -> Browser:
        found = self.edge.browser(**headers)
        self.browsers.append(found)
        return found


def keeps_no_cookies(browser: Browser) -> None:
    for jar in browser.cookies.values():
        jar.clear()


async def gets(mail: Mail) -> None:
    for _ in range(5):
        assert (await mail.browser().get(mail.link)).status == 200


async def asks_by(mail: Mail, method: str) -> None:
    await mail.browser().get(mail.link, method=method)
    await mail.browser().get(mail.edge.origins.share_origin(mail.share.id) + "/", method=method)


async def heads(mail: Mail) -> None:
    await asks_by(mail, "HEAD")


async def probes(mail: Mail) -> None:
    for method in ("OPTIONS", "PUT", "DELETE", "PROPFIND"):
        await asks_by(mail, method)


async def comes_in_swarms(mail: Mail) -> None:
    await asyncio.gather(*(mail.browser(X_Test_Client=f"203.0.113.{n}").get(mail.link) for n in range(40)))


async def expands(mail: Mail) -> None:
    """As shorteners and safe-link services: no Fetch metadata, redirects followed."""
    browser = mail.browser(
        **{"Accept": "*/*", "User-Agent": "curl/8", "Sec-Fetch-Mode": "", "Sec-Fetch-Dest": ""}
    )
    for url in (
        mail.link,
        mail.link + "?utm_source=mail",
        mail.link + "#x",
        mail.link + "/",
        mail.link + ".",
    ):
        await browser.follow(await browser.get(url))


async def previews(mail: Mail) -> None:
    for agent in ("Slackbot-LinkExpanding 1.0", "facebookexternalhit/1.1", "WhatsApp/2", "SkypeUriPreview"):
        browser = mail.browser(**{"User-Agent": agent, "Range": "bytes=0-32767"})
        await browser.follow(await browser.get(mail.link))
        await browser.follow(await browser.get(mail.edge.origins.share_origin(mail.share.id) + "/"))


async def prefetches(mail: Mail) -> None:
    browser = mail.browser(**{"Sec-Purpose": "prefetch;prerender", "Purpose": "prefetch"})
    for url in (mail.link, mail.edge.origins.share_origin(mail.share.id) + "/"):
        page = await browser.follow(await browser.get(url))
        for way in ("", "/email-code"):
            await browser.get(page.url.removesuffix("/email-code") + way)


async def comes_twice_from_two_places(mail: Mail) -> None:
    first = mail.browser(**{"X-Test-Client": "198.51.100.1"})
    page = await first.follow(await first.get(mail.edge.origins.share_origin(mail.share.id) + "/"))
    second = mail.browser(**{"X-Test-Client": "198.51.100.2"})
    await second.get(page.url)
    await second.submit(page, email=ALICE)


async def posts_the_link(mail: Mail) -> None:
    """With and without what browsers send along; from another site's auto-submitted form."""
    for origin in (None, "https://evil.example", "null"):
        browser = mail.browser()
        await browser.follow(await browser.post(mail.link, {}, origin=origin))


async def continues(mail: Mail) -> Answer:
    browser = mail.browser()
    return await browser.follow(await browser.submit(await browser.get(mail.link)))


async def presses_every_button(mail: Mail) -> None:
    """Submits each form that it finds as it is, four pages deep."""
    browser = mail.browser()
    page = await browser.get(mail.link)
    for _ in range(4):
        if "<form" not in page.text:
            return
        page = await browser.follow(await browser.submit(page))


async def fills_forms_in(mail: Mail) -> None:
    """With an address of its own, and digits where a code is asked for."""
    browser = mail.browser()
    page = await browser.follow(await browser.submit(await browser.get(mail.link)))
    page = await browser.follow(await browser.submit(page, email=MALLORY))
    for _ in range(6):
        if "<form" not in page.text:
            return
        page = await browser.follow(await browser.submit(page, code="12345678"))


async def knows_the_address(mail: Mail) -> None:
    """It stands in the mail's To: field."""
    browser = mail.browser()
    page = await browser.follow(await browser.submit(await browser.get(mail.link)))
    page = await browser.follow(await browser.submit(page, email=ALICE))
    await browser.follow(await browser.submit(page, code="00000000"))


async def reads_the_code_as_well(mail: Mail) -> None:
    """The mail with the code is scanned too; the code is of no use but in the browser that asked for it."""
    hers = mail.edge.browser()
    page = await hers.follow(await hers.submit(await hers.get(mail.link)))
    asked = await hers.follow(await hers.submit(page, email=ALICE))
    code = await mail.edge.code()
    its = mail.browser()
    await its.submit(asked, code=code)  # at her sign-in
    page = await its.follow(await its.submit(await its.get(mail.link)))
    page = await its.follow(await its.submit(page, email=ALICE))  # at one of its own
    await its.follow(await its.submit(page, code=code))
    await mail.browser().submit(page, code=await mail.edge.code())


async def keeps_no_cookie_between_forms(mail: Mail) -> None:
    browser = mail.browser()
    page = await browser.submit(await browser.get(mail.link))
    for _ in range(6):
        keeps_no_cookies(browser)
        if page.status == 303:
            page = await browser.get(page.location)
        elif "<form" in page.text:
            page = await browser.submit(page, email=ALICE)


async def starts_at_the_share(mail: Mail) -> None:
    browser = mail.browser()
    origin = mail.edge.origins.share_origin(mail.share.id)
    for path in ("/", "/.guestpass/start", "/.guestpass/finish", "/.guestpass/finish?code=x", "/favicon.ico"):
        await browser.follow(await browser.get(origin + path))


async def submits_from_elsewhere(mail: Mail) -> None:
    """The form of a flow, auto-submitted by a page of another site in the browser that has the flow."""
    browser = mail.browser()
    page = await browser.follow(await browser.submit(await browser.get(mail.link)))
    for origin in ("https://evil.example", "null", mail.edge.origins.share_origin(mail.share.id)):
        await browser.post(page.url, {"csrf": page.csrf, "email": ALICE}, origin=origin)


Behave = Callable[[Mail], Awaitable[object]]

BEHAVIOURS: dict[str, Behave] = {
    "GET": gets,
    "HEAD": heads,
    "OPTIONS and methods that change things": probes,
    "forty at once": comes_in_swarms,
    "link expander": expands,
    "preview": previews,
    "prefetch and prerender": prefetches,
    "two places": comes_twice_from_two_places,
    "POST to the link": posts_the_link,
    "presses Continue": continues,
    "presses every button": presses_every_button,
    "fills in forms": fills_forms_in,
    "knows the address": knows_the_address,
    "reads the code as well": reads_the_code_as_well,
    "keeps no cookies": keeps_no_cookie_between_forms,
    "starts at the share's origin": starts_at_the_share,
    "auto-submitted form of another site": submits_from_elsewhere,
}


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[People]:
    async with people(tmp_path) as found:
        yield found


async def test_scanners_use_nothing_up_and_gain_nothing(edge: People) -> None:
    consumed: list[str] = []
    gained: list[str] = []
    for name, behave in BEHAVIOURS.items():
        edge.mail.clear()
        share, links = await edge.share(ALICE)
        mail = Mail(edge, share, links[ALICE], [])
        await behave(mail)
        cookies = [jar for b in mail.browsers for jar in b.cookies.values()]
        known = [c for jar in cookies for c in jar if c in ("__Host-gp-me", "__Host-guestpass")]
        if await edge.service.sessions(share.id) or known:
            gained.append(name)
        if not await she_gets_in(mail):
            consumed.append(name)
    assert len(BEHAVIOURS) >= 10
    row(
        "mail scanners",
        f"{len(BEHAVIOURS)} behaviours, then the recipient opens the same link",
        f"{len(consumed)} used the link up, {len(gained)} gained something: {consumed + gained or 'none'}",
        "0",
        ok=not consumed and not gained,
        figure=11,
    )


async def she_gets_in(mail: Mail) -> bool:
    browser = mail.edge.browser(**{"X-Test-Client": "192.0.2.77"})
    page = await browser.follow(await browser.submit(await browser.get(mail.link)))
    mail.edge.mail.clear()
    page = await browser.follow(await browser.submit(page, email=ALICE))
    if "Enter the code" not in page.words or "Too many" in page.words:
        return False
    page = await browser.follow(await browser.submit(page, code=await mail.edge.code()))
    return "application: alice@example.org" in page.text
