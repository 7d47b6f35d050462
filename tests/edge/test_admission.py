"""From a link to a session, and from a session to a grant: the whole way in, and every way round that must not work."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.people import ALICE, BOB, MALLORY, Answer, Browser, People, people

from guestpass.edge.admission import START_PATH
from guestpass.model import Revocation, SessionKind


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[People]:
    async with people(tmp_path) as found:
        yield found


def origin_of(edge: People, share_id: str) -> str:
    return edge.origins.share_origin(share_id)


# ── the way in ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_from_the_link_to_the_page(edge: People) -> None:
    share, links = await edge.share(name="Sales, “Q3” 🙂", message="Have a look.\nAda", path="/d/sales?x=1")
    browser = edge.browser()
    page = await browser.get(links[ALICE])
    assert page.status == 200
    for words in ("Sales, “Q3” 🙂", "Ada Lovelace", "Have a look."):
        assert words in page.words
    page = await browser.follow(await browser.submit(page))
    assert urlsplit(page.url).netloc == urlsplit(edge.main).netloc
    page = await browser.follow(await browser.submit(page, email="Alice@Example.ORG "))
    assert ALICE in page.words
    page = await browser.submit(page, code=(await edge.code()).replace(" ", "-"))
    assert page.status == 303
    assert page.location.startswith(f"{origin_of(edge, share.id)}/.guestpass/finish?code=")
    page = await browser.get(page.location)
    assert (page.status, page.location) == (303, "/d/sales?x=1"), "the address bar would keep the code"
    page = await browser.follow(page)
    assert page.text in [f"application: {ALICE} by {gateway} at /d/sales?x=1" for gateway in "ab"]
    found = (await edge.service.get(share.id)).recipient(ALICE)
    assert found is not None
    assert found.first_opened is not None


async def test_strangers_who_know_an_address_cannot_keep_its_owner_out(edge: People) -> None:
    share, links = await edge.share()

    async def ask(browser: Browser, page: Answer) -> Answer:
        return await browser.follow(await browser.submit(await browser.follow(page), email=ALICE))

    for _ in range(4):
        stranger = edge.browser(**{"X-Test-Client": "198.51.100.1"})
        page = await ask(stranger, await stranger.get(f"{origin_of(edge, share.id)}{START_PATH}?via=x"))
    assert "Too many codes" in page.words
    edge.mail.clear()
    browser = edge.browser()
    started = await browser.submit(await browser.get(links[ALICE]))
    assert "/.guestpass/start?via=" in started.location
    page = await ask(browser, started)
    assert "is on its way" in page.words
    page = await browser.follow(await browser.submit(page, code=await edge.code()))
    assert page.text.startswith("application:")

    # The code by which the share's origin hears of the link works once, and is good for nothing else.
    again = await ask(stranger := edge.browser(), await stranger.get(started.location))
    assert "Too many codes" in again.words
    fresh = (await browser.submit(await edge.browser().get(links[ALICE]))).location.partition("via=")[2]
    assert (await browser.get(f"{edge.main}/signin/{fresh}")).status == 410
    finish = await edge.browser().get(f"{origin_of(edge, share.id)}/.guestpass/finish?code={fresh}")
    assert finish.status == 400


async def test_a_page_that_was_asked_for_comes_back(edge: People) -> None:
    share, _ = await edge.share()
    page = await edge.browser().sign_in(origin_of(edge, share.id) + "/deep/page?with=query&and=%2f")
    assert page.text.endswith("at /deep/page?with=query&and=%2f")


@pytest.mark.parametrize(
    "path", ["//evil.example/x", "/\\evil.example", "/.guestpass/start", "/" + "a" * 3000]
)
async def test_where_to_come_back_is_never_another_origin(edge: People, path: str) -> None:
    share, _ = await edge.share(path="/home")
    browser = edge.browser()
    answer = await browser.get(origin_of(edge, share.id) + path)
    page = await browser.follow(answer)
    page = await browser.follow(await browser.submit(page, email=ALICE))
    page = await browser.submit(page, code=await edge.code())
    assert (await browser.get(page.location)).location == "/home"


async def test_who_has_a_session_goes_straight_in(edge: People) -> None:
    share, links = await edge.share()
    browser = edge.browser()
    await browser.sign_in(origin_of(edge, share.id))
    page = await browser.follow(await browser.submit(await browser.get(links[ALICE])))
    assert page.text.startswith(f"application: {ALICE}")


async def test_each_sign_in_is_a_new_session_and_ends_the_one_before(edge: People) -> None:
    share, _ = await edge.share()
    browser = edge.browser()
    await browser.sign_in(origin_of(edge, share.id))
    first = browser.cookie(origin_of(edge, share.id), "__Host-guestpass")
    # Two tabs: the second was at the form already when the first came in.
    other = await browser.get(f"{origin_of(edge, share.id)}{START_PATH}")
    assert other.location == "/", "no second session is needed"
    tab = edge.browser()
    tab.cookies = browser.cookies
    del tab.cookies[urlsplit(origin_of(edge, share.id)).netloc]["__Host-guestpass"]
    page = await tab.get(f"{origin_of(edge, share.id)}{START_PATH}")
    tab.cookies[urlsplit(origin_of(edge, share.id)).netloc]["__Host-guestpass"] = first or ""
    page = await tab.follow(await tab.submit(await tab.follow(page)))
    second = tab.cookie(origin_of(edge, share.id), "__Host-guestpass")
    assert first != second
    assert len(await edge.service.sessions(share.id)) == 1


async def test_two_tabs_at_the_same_time(edge: People) -> None:
    share, _ = await edge.share()
    browser, start = edge.browser(), origin_of(edge, share.id)
    one = await browser.follow(await browser.get(start + "/one"))
    two = await browser.follow(await browser.get(start + "/two"))
    one = await browser.follow(await browser.submit(one, email=ALICE))
    code_one = await edge.code()
    two = await browser.follow(await browser.submit(two, email=ALICE))
    code_two = await edge.code()
    assert (await browser.follow(await browser.submit(one, code=code_one))).text.endswith("at /one")
    assert (await browser.follow(await browser.submit(two, code=code_two))).text.endswith("at /two")


async def test_a_second_share_takes_one_click(edge: People) -> None:
    one, _ = await edge.share()
    two, _ = await edge.share(ALICE, BOB)
    browser = edge.browser()
    await browser.sign_in(origin_of(edge, one.id))
    page = await browser.follow(await browser.get(origin_of(edge, two.id)))
    assert f"Continue as {ALICE}" in page.words
    page = await browser.follow(await browser.submit(page))
    assert page.text.startswith(f"application: {ALICE}")
    assert not edge.mail


async def test_another_address_than_the_remembered_one(edge: People) -> None:
    one, _ = await edge.share()
    two, _ = await edge.share(BOB)
    browser = edge.browser()
    await browser.sign_in(origin_of(edge, one.id))
    page = await browser.follow(await browser.get(origin_of(edge, two.id)))
    refused = await browser.submit(page)
    assert refused.status == 403
    assert "You are not invited" in refused.words
    page = await browser.follow(await browser.get(origin_of(edge, two.id)))
    page = await browser.get(edge.main + urlsplit(page.url).path + "/email-code")
    page = await browser.follow(await browser.submit(page, email=BOB))
    page = await browser.follow(await browser.submit(page, code=await edge.code(BOB)))
    assert page.text.startswith(f"application: {BOB}")


# ── what scanners do ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_scanners_use_nothing_up_and_gain_nothing(edge: People) -> None:
    """A mail scanner that follows everything, posts the forms it finds, and comes back."""
    share, links = await edge.share()
    scanner = edge.browser()
    for method in ("GET", "HEAD"):
        answer = await scanner.get(links[ALICE], method=method)
        assert answer.status == 200
        assert "Set-Cookie" not in answer.headers
    page = await scanner.get(links[ALICE])
    for _ in range(3):
        form = await scanner.follow(await scanner.submit(page))
        assert form.status == 200
        assert 'name="email"' in form.text
    await scanner.get(form.url, method="HEAD")
    blind = await scanner.submit(form, email="")
    assert blind.status == 303
    assert 'role="alert"' in (await scanner.follow(blind)).text
    assert not edge.mail
    assert await edge.service.sessions(share.id) == []
    found = (await edge.service.get(share.id)).recipient(ALICE)
    assert found is not None
    assert found.first_opened is None
    # And the person behind the scanner gets in as if nothing had happened.
    browser = edge.browser()
    page = await browser.follow(await browser.submit(await browser.get(links[ALICE])))
    page = await browser.follow(await browser.submit(page, email=ALICE))
    page = await browser.follow(await browser.submit(page, code=await edge.code()))
    assert page.text.startswith("application")


async def test_a_prefetched_sign_in_page_still_belongs_to_who_uses_it(edge: People) -> None:
    share, _ = await edge.share()
    browser, scanner = edge.browser(), edge.browser()
    page = await browser.get(f"{origin_of(edge, share.id)}{START_PATH}")
    await scanner.get(page.location)
    page = await browser.follow(page)
    page = await browser.follow(await browser.submit(page, email=ALICE))
    assert (await scanner.get(page.url)).status == 403
    page = await browser.follow(await browser.submit(page, code=await edge.code()))
    assert page.text.startswith("application")


# ── the hand-over ────────────────────────────────────────────────────────────────────────────────────────────────


async def handed_over(edge: People, browser: Browser, share_id: str) -> str:
    """A finish URL, not yet used."""
    page = await browser.follow(await browser.get(origin_of(edge, share_id)))
    page = await browser.follow(await browser.submit(page, email=ALICE))
    return (await browser.submit(page, code=await edge.code())).location


async def test_a_hand_over_works_once(edge: People) -> None:
    share, _ = await edge.share()
    browser = edge.browser()
    url = await handed_over(edge, browser, share.id)
    nonce = browser.cookie(url, "__Host-gp-nonce")
    assert (await browser.get(url)).status == 303
    assert browser.cookie(url, "__Host-gp-nonce") is None
    # Again, in a browser with the same nonce and no session.
    again = edge.browser()
    again.cookies[urlsplit(url).netloc] = {"__Host-gp-nonce": nonce or ""}
    answer = await again.get(url)
    assert answer.status == 400
    assert "cannot be finished here" in answer.words
    # "Back" in the browser that is in goes on to the page.
    assert (await browser.get(url)).location == "/"


async def test_a_hand_over_works_only_in_the_browser_that_began(edge: People) -> None:
    share, _ = await edge.share()
    url = await handed_over(edge, edge.browser(), share.id)
    victim = edge.browser()
    await victim.get(f"{origin_of(edge, share.id)}{START_PATH}")  # has a nonce, but another one
    answer = await victim.get(url)
    assert answer.status == 400
    assert victim.cookie(url, "__Host-guestpass") is None


async def test_a_hand_over_belongs_to_its_share(edge: People) -> None:
    one, _ = await edge.share()
    two, _ = await edge.share()
    browser = edge.browser()
    url = await handed_over(edge, browser, one.id)
    elsewhere = url.replace(origin_of(edge, one.id), origin_of(edge, two.id))
    # Even with the same nonce on both origins.
    browser.cookies[urlsplit(elsewhere).netloc] = dict(browser.cookies[urlsplit(url).netloc])
    assert (await browser.get(elsewhere)).status == 400
    assert browser.cookie(elsewhere, "__Host-guestpass") is None


async def test_asking_with_head_does_not_use_a_hand_over_up(edge: People) -> None:
    share, _ = await edge.share()
    browser = edge.browser()
    url = await handed_over(edge, browser, share.id)
    assert (await browser.get(url, method="HEAD")).status == 405
    assert (await browser.get(url)).status == 303


@pytest.mark.parametrize(
    "cookie",
    [
        "__Host-gp-nonce={0}; __Host-gp-nonce={0}",  # a neighbour tossed a second one
        "\u2000__Host-gp-nonce={0}",  # parsers that strip make it ours
        "__host-gp-nonce={0}",
        "__Host-gp-nonce=short",
        "",
    ],
)
async def test_the_nonce_is_read_exactly(edge: People, cookie: str) -> None:
    share, _ = await edge.share()
    browser = edge.browser()
    url = await handed_over(edge, browser, share.id)
    nonce = browser.cookie(url, "__Host-gp-nonce")
    answer = await edge.browser().get(url, Cookie=cookie.format(nonce))
    assert answer.status == 400


# ── forms ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("origin", "headers"),
    [
        ("http://evil.example", {}),
        ("null", {}),
        (None, {}),
        (None, {"Sec-Fetch-Site": "same-site"}),
        (None, {"Sec-Fetch-Site": "cross-site"}),
    ],
)
async def test_forms_of_other_sites_are_refused(
    edge: People, origin: str | None, headers: dict[str, str]
) -> None:
    share, links = await edge.share()
    browser = edge.browser()
    page = await browser.follow(await browser.get(origin_of(edge, share.id)))
    fields = {"csrf": page.csrf, "email": ALICE}
    answer = await browser.post(edge.main + page.action, fields, origin=origin, **headers)
    assert answer.status == 403
    assert (await browser.post(links[ALICE], {}, origin=origin, **headers)).status == 403
    assert not edge.mail


async def test_a_sibling_share_is_another_site(edge: People) -> None:
    one, _ = await edge.share()
    two, _ = await edge.share()
    browser = edge.browser()
    page = await browser.follow(await browser.get(origin_of(edge, one.id)))
    answer = await browser.post(
        edge.main + page.action, {"csrf": page.csrf, "email": ALICE}, origin=origin_of(edge, two.id)
    )
    assert answer.status == 403


async def test_a_browser_that_sends_no_origin_but_fetch_metadata(edge: People) -> None:
    share, _ = await edge.share()
    browser = edge.browser()
    page = await browser.follow(await browser.get(origin_of(edge, share.id)))
    fields = {"csrf": page.csrf, "email": ALICE}
    answer = await browser.post(
        edge.main + page.action, fields, origin=None, **{"Sec-Fetch-Site": "same-origin"}
    )
    assert answer.status == 303


async def test_a_form_needs_its_token_and_its_cookie(edge: People) -> None:
    share, _ = await edge.share()
    browser = edge.browser()
    page = await browser.follow(await browser.get(origin_of(edge, share.id)))
    url = edge.main + page.action
    assert (await browser.post(url, {"email": ALICE})).status == 403
    assert (await browser.post(url, {"email": ALICE, "csrf": page.csrf[:-1] + "x"})).status == 403
    assert (await edge.browser().post(url, {"email": ALICE, "csrf": page.csrf})).status == 403
    multipart = {"Content-Type": "multipart/form-data; boundary=x"}
    assert (await browser.post(url, {"email": ALICE, "csrf": page.csrf}, **multipart)).status == 403
    assert not edge.mail


async def test_a_flow_belongs_to_the_browser_that_used_it(edge: People) -> None:
    share, _ = await edge.share()
    browser, thief = edge.browser(), edge.browser()
    page = await browser.follow(await browser.get(origin_of(edge, share.id)))
    await thief.get(page.url)
    page = await browser.follow(await browser.submit(page, email=ALICE))
    stolen = await thief.get(page.url)
    assert stolen.status == 403
    assert "belongs to another browser" in stolen.words
    assert ALICE not in stolen.text
    assert (await thief.post(page.url, {"csrf": "x", "code": await edge.code()})).status == 403


async def test_a_sign_in_that_is_over_says_so(edge: People) -> None:
    answer = await edge.browser().get(f"{edge.main}/signin/{'x' * 43}")
    assert answer.status == 410
    assert "This sign-in is over" in answer.words
    answer = await edge.browser().get(f"{edge.main}/signin/{'x' * 43}/email-code")
    assert answer.status == 410


async def test_what_is_remembered_is_no_flow_and_no_flow_is_remembered(edge: People) -> None:
    share, _ = await edge.share()
    browser = edge.browser()
    page = await browser.get(origin_of(edge, share.id))
    flow = page.location.rpartition("/")[2]
    await browser.sign_in(origin_of(edge, share.id))
    remembered = browser.cookie(edge.main, "__Host-gp-me")
    assert (await browser.get(f"{edge.main}/signin/{remembered}")).status == 410
    other = edge.browser()
    other.cookies[urlsplit(edge.main).netloc] = {"__Host-gp-me": flow}
    assert "Prove your email address" in (await other.get(f"{edge.main}/me")).words


async def test_one_network_cannot_fill_the_store(edge: People, monkeypatch: pytest.MonkeyPatch) -> None:
    share, _ = await edge.share()
    monkeypatch.setattr(edge.admission._begun, "_most", 3)
    browser = edge.browser()
    answers = [(await browser.get(origin_of(edge, share.id))).status for _ in range(5)]
    assert answers == [303, 303, 303, 429, 429]
    elsewhere = edge.browser(**{"X-Test-Client": "198.51.100.7"})
    assert (await elsewhere.get(origin_of(edge, share.id))).status == 303


# ── who is invited stays unsaid ──────────────────────────────────────────────────────────────────────────────────


async def test_the_same_words_for_whoever_asks(edge: People) -> None:
    share, _ = await edge.share()
    texts = []
    for email in (ALICE, MALLORY):
        browser = edge.browser()
        page = await browser.follow(await browser.get(origin_of(edge, share.id)))
        page = await browser.follow(await browser.submit(page, email=email))
        asked = page.words
        page = await browser.follow(await browser.submit(page, code="0000 0000"))
        texts.append([t.replace(email, "ADDRESS") for t in (asked, page.words)])
    assert texts[0] == texts[1]
    await edge.code()
    assert not edge.mail, "mail went to an address that is not invited"


# ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_ended_share_is_gone_everywhere(edge: People) -> None:
    share, links = await edge.share()
    browser = edge.browser()
    origin = origin_of(edge, share.id)
    await browser.sign_in(origin)
    stale = await edge.browser().get(origin)
    await edge.service.delete(share.id)
    for url in (links[ALICE], origin + "/", origin + START_PATH, origin + "/.guestpass/finish?code=x"):
        answer = await browser.get(url)
        assert answer.status == 410, url
        assert "This share has ended" in answer.words
    ended = await browser.get(origin + "/x")
    assert ended.headers["Clear-Site-Data"] == '"cache", "storage"'
    assert browser.cookie(origin, "__Host-guestpass") is None
    assert (await edge.browser().get(origin + "/", Sec_Fetch_Mode="cors")).status == 410
    page = await edge.browser().get(stale.location)
    assert page.status == 410


async def test_a_removed_recipient_is_out(edge: People) -> None:
    share, links = await edge.share(ALICE, BOB)
    browser = edge.browser()
    origin = origin_of(edge, share.id)
    await browser.sign_in(origin)
    await edge.service.remove_recipient(share.id, ALICE)
    assert (await browser.get(origin + "/")).status == 410
    assert (await browser.get(links[ALICE])).status == 410
    page = await browser.follow(await browser.get(origin + "/"))
    refused = await browser.submit(page)
    assert refused.status == 403
    assert f"{ALICE} is not among the addresses" in refused.words


async def test_an_unknown_link_and_an_unknown_share(edge: People) -> None:
    for secret in ("x" * 43, "x", "%00", "%C3%A9"):
        answer = await edge.browser().get(f"{edge.main}/s/{secret}")
        assert answer.status == 404, secret
        assert "There is nothing here" in answer.words
    nowhere = origin_of(edge, "snowhere")
    assert (await edge.browser().get(nowhere)).status == 421
    assert (await edge.browser().get(nowhere + START_PATH)).status == 404


async def test_signing_out(edge: People) -> None:
    share, _ = await edge.share()
    browser = edge.browser()
    origin = origin_of(edge, share.id)
    await browser.sign_in(origin)
    cookie = browser.cookie(origin, "__Host-guestpass")
    browser.cookies[urlsplit(origin).netloc]["app_session"] = "x"
    page = await browser.get(origin + "/.guestpass/sign-out")
    assert page.status == 200
    forged = await browser.post(origin + "/.guestpass/sign-out", {"csrf": page.csrf}, origin=edge.main)
    assert forged.status == 403
    answer = await browser.submit(page)
    assert answer.headers["Clear-Site-Data"] == '"cache", "storage"'
    assert browser.cookies[urlsplit(origin).netloc] == {}, "the application's cookie is still there"
    page = await browser.follow(answer)
    assert "You are signed out of this share" in page.words
    assert (await browser.get(origin)).status == 303
    # The old cookie is dead, wherever it was copied to.
    copy = edge.browser()
    copy.cookies[urlsplit(origin).netloc] = {"__Host-guestpass": cookie or ""}
    assert (await copy.get(origin)).status == 303
    page = await browser.follow(await browser.submit(page))
    assert "You are signed out" in page.words
    page = await browser.follow(await browser.get(origin))
    assert "Continue as" not in page.words


# ── shared with me ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_shared_with_me(edge: People) -> None:
    one, _ = await edge.share(name="One")
    two, _ = await edge.share(name="Two")
    await edge.share(BOB, name="Three")
    browser = edge.browser()
    page = await browser.follow(await browser.submit(await browser.get(edge.main + "/me")))
    page = await browser.follow(await browser.submit(page, email=ALICE))
    page = await browser.follow(await browser.submit(page, code=await edge.code()))
    assert page.url == edge.main + "/me"
    assert "One" in page.words
    assert "Two" in page.words
    assert "Three" not in page.words
    opened = re.findall(r'href="(http[^"]+/\.guestpass/start)"', page.text)
    assert set(opened) == {origin_of(edge, share.id) + START_PATH for share in (one, two)}
    page = await browser.follow(await browser.get(opened[0]))
    page = await browser.follow(await browser.submit(page))
    assert page.text.startswith(f"application: {ALICE}")
    # Removing oneself is asked first, and ends what is open.
    page = await browser.get(f"{edge.main}/me/remove/{two.id}")
    assert "Remove yourself?" in page.words
    page = await browser.submit(page)
    assert "no longer among the recipients" in page.words
    assert (await edge.service.get(two.id)).recipient(ALICE) is None
    assert (await browser.get(origin_of(edge, two.id) + "/")).status in (303, 410)


async def test_shared_with_me_for_who_is_invited_to_nothing(edge: People) -> None:
    browser = edge.browser()
    page = await browser.follow(await browser.submit(await browser.get(edge.main + "/me")))
    page = await browser.follow(await browser.submit(page, email=MALLORY))
    assert MALLORY in page.words
    page = await browser.follow(await browser.submit(page, code="12345678"))
    assert "not right" in page.words
    assert not edge.mail


async def test_nobody_removes_somebody_else(edge: People) -> None:
    share, _ = await edge.share(BOB)
    mine, _ = await edge.share(ALICE)
    browser = edge.browser()
    await browser.sign_in(origin_of(edge, mine.id))
    assert (await browser.get(f"{edge.main}/me/remove/{share.id}")).location == "/me"
    page = await browser.get(f"{edge.main}/me/remove/{mine.id}")
    answer = await browser.post(f"{edge.main}/me/remove/{share.id}", {"csrf": page.csrf})
    assert answer.location == "/me"
    assert (await edge.service.get(share.id)).recipient(BOB) is not None
    assert (await browser.post(f"{edge.main}/me/remove/{mine.id}", {})).status == 403
    assert (await edge.service.get(mine.id)).recipient(ALICE) is not None


# ── challenges ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", {}, 303),
        ("HEAD", {}, 303),
        ("GET", {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}, 401),
        ("GET", {"Sec-Fetch-Dest": "image", "Sec-Fetch-Mode": "no-cors"}, 401),
        ("GET", {"Sec-Fetch-Dest": "iframe"}, 401),
        ("GET", {"Upgrade": "websocket", "Connection": "Upgrade"}, 401),
        ("POST", {}, 401),
        ("DELETE", {}, 401),
    ],
)
async def test_only_navigations_are_sent_to_sign_in(
    edge: People, method: str, headers: dict[str, str], status: int
) -> None:
    share, _ = await edge.share()
    answer = await edge.browser().get(origin_of(edge, share.id) + "/x", method=method, **headers)
    assert answer.status == status
    if status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert "Set-Cookie" not in answer.headers


async def test_a_script_gets_short_text(edge: People) -> None:
    share, _ = await edge.share()
    url = f"http://127.0.0.1:{edge.port}/x"
    host = urlsplit(origin_of(edge, share.id)).netloc
    async with edge.session.get(url, headers={"Host": host}, allow_redirects=False) as answer:
        assert answer.status == 401
        assert answer.content_type == "text/plain"
        assert (await answer.text()).startswith("401 Sign in first\n")


# ── sessions and grants ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_share_with_all_places_taken(edge: People) -> None:
    share, _ = await edge.share(ALICE, BOB, max_sessions=1)
    origin = origin_of(edge, share.id)
    await edge.browser().sign_in(origin, ALICE)
    bob = edge.browser()
    page = await bob.sign_in(origin, BOB)
    assert page.status == 403
    assert "All places are taken" in page.words
    assert bob.cookie(origin, "__Host-guestpass") is None
    recipient = (await edge.service.get(share.id)).recipient(BOB)
    assert recipient is not None
    assert recipient.first_opened is None, "it says that somebody opened what they were refused"
    (session,) = await edge.service.sessions(share.id)
    await edge.service.end_session(session.id)
    page = await bob.follow(await bob.get(origin))
    page = await bob.follow(await bob.submit(page))
    assert page.text.startswith(f"application: {BOB}")


async def test_who_comes_at_the_same_moment_does_not_get_past_the_limit(edge: People) -> None:
    share, _ = await edge.share(ALICE, BOB, max_sessions=1)
    browsers = {ALICE: edge.browser(), BOB: edge.browser()}
    urls = {}
    for email, browser in browsers.items():
        page = await browser.follow(await browser.get(origin_of(edge, share.id)))
        page = await browser.follow(await browser.submit(page, email=email))
        urls[email] = (await browser.submit(page, code=await edge.code(email))).location
    answers = await asyncio.gather(*(browsers[email].get(url) for email, url in urls.items()))
    assert sorted(answer.status for answer in answers) == [303, 403]
    assert len(await edge.service.sessions(share.id)) == 1


async def test_a_bearer_token(edge: People) -> None:
    share, _ = await edge.share()
    other, _ = await edge.share()
    _, token = await edge.service.create_token(share.id, ALICE)
    authorization = {"Authorization": f"Bearer {token}"}
    answer = await edge.browser().get(origin_of(edge, share.id) + "/data", **authorization)
    assert answer.text.startswith(f"application: {ALICE}")
    foreign = await edge.browser().get(
        origin_of(edge, other.id) + "/data", Sec_Fetch_Mode="cors", **authorization
    )
    assert foreign.status == 401
    wrong = {"Authorization": f"Bearer gp_{'x' * 43}"}
    answer = await edge.browser().get(origin_of(edge, share.id) + "/data", Sec_Fetch_Mode="cors", **wrong)
    assert answer.status == 401
    await edge.service.delete(share.id)
    answer = await edge.browser().get(origin_of(edge, share.id) + "/data", **authorization)
    assert answer.status == 410


async def test_a_cookie_is_good_for_its_share_only(edge: People) -> None:
    one, _ = await edge.share()
    two, _ = await edge.share()
    browser = edge.browser()
    await browser.sign_in(origin_of(edge, one.id))
    cookie = browser.cookie(origin_of(edge, one.id), "__Host-guestpass") or ""
    other = edge.browser()
    other.cookies[urlsplit(origin_of(edge, two.id)).netloc] = {"__Host-guestpass": cookie}
    assert (await other.get(origin_of(edge, two.id))).status == 303


async def test_restores_that_come_together_ask_once(edge: People, monkeypatch: pytest.MonkeyPatch) -> None:
    share, _ = await edge.share()
    browser = edge.browser()
    await browser.sign_in(origin_of(edge, share.id))
    (session,) = await edge.service.sessions(share.id)
    edge.grants.end_all("test")
    asked = 0
    check = edge.plugins.check

    async def counted(*arguments: object) -> Revocation | None:
        nonlocal asked
        asked += 1
        return await check(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(edge.plugins, "check", counted)
    answers = await asyncio.gather(*(browser.get(f"{origin_of(edge, share.id)}/{n}") for n in range(20)))
    assert {answer.status for answer in answers} == {200}
    assert asked == 1
    assert len(edge.grants) == 1
    assert edge.grants.sessions(share.id) == 1
    assert session.kind is SessionKind.COOKIE


async def test_a_revocation_during_a_restore_wins(edge: People, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store said yes, then the share was deleted, then the grant would have been added."""
    share, _ = await edge.share()
    browser = edge.browser()
    await browser.sign_in(origin_of(edge, share.id))
    edge.grants.end_all("test")
    check = edge.plugins.check

    async def deleted_meanwhile(*arguments: object) -> Revocation | None:
        answer = await check(*arguments)  # type: ignore[arg-type]
        if (await edge.service.get(share.id)).deleted is None:
            await edge.service.delete(share.id)
        return answer

    monkeypatch.setattr(edge.plugins, "check", deleted_meanwhile)
    assert (await browser.get(origin_of(edge, share.id))).status == 410
    assert len(edge.grants) == 0


async def test_sessions_survive_a_restart(tmp_path: Path) -> None:
    async with people(tmp_path) as edge:
        share, _ = await edge.share()
        browser = edge.browser()
        await browser.sign_in(origin_of(edge, share.id))
        cookie = browser.cookie(origin_of(edge, share.id), "__Host-guestpass") or ""
    async with people(tmp_path) as edge:
        browser = edge.browser()
        browser.cookies[urlsplit(origin_of(edge, share.id)).netloc] = {"__Host-guestpass": cookie}
        assert (await browser.get(origin_of(edge, share.id))).text.startswith("application")
