"""A remembered device stands for the code: made only after one, for that address, until it is forgotten or too old."""

from __future__ import annotations

import html
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.authenticator import USER_PRESENT, USER_VERIFIED, Authenticator, b64
from support.people import ALICE, BOB, Answer, Browser, Clock, People, people

from guestpass.model import Share
from guestpass_plugins.authenticate.email_code import PASSKEY_DAYS

OPTIONS = re.compile(r'data-passkey="(get|create)" data-options="([^"]*)"')


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def edge(tmp_path: Path, clock: Clock) -> AsyncIterator[People]:
    async with people(tmp_path, now=clock) as found:
        yield found


def options(page: Answer, kind: str) -> dict[str, Any]:
    found = OPTIONS.search(page.text)
    assert found, page.words
    assert found[1] == kind
    decoded: dict[str, Any] = json.loads(html.unescape(found[2]))
    return decoded


async def first_page(edge: People, share: Share) -> tuple[Browser, Answer]:
    browser = edge.browser()
    return browser, await browser.follow(await browser.get(edge.origins.share_origin(share.id) + "/"))


async def after_code(edge: People, share: Share, email: str = ALICE, **more: str) -> tuple[Browser, Answer]:
    browser, page = await first_page(edge, share)
    page = await browser.follow(await browser.submit(page, email=email))
    code = await edge.code(email)
    return browser, await browser.follow(await browser.submit(page, code=code, **more))


async def remembered(edge: People, share: Share, email: str = ALICE) -> Authenticator:
    device = Authenticator(edge.main)
    browser, page = await after_code(edge, share, email, passkeys="1")
    assert "Remember this device?" in page.words
    credential = device.make(options(page, "create"))
    page = await browser.follow(await browser.submit(page, credential=credential))
    assert f"application: {email}" in page.text
    return device


async def by_passkey(edge: People, share: Share, device: Authenticator, **lies: Any) -> Answer:
    browser, page = await first_page(edge, share)
    credential = device.use(options(page, "get"), **lies)
    return await browser.follow(await browser.submit(page, credential=credential, email=""))


async def test_the_next_time_without_a_code(edge: People) -> None:
    share, _ = await edge.share(ALICE)
    device = await remembered(edge, share)
    for _ in range(2):
        page = await by_passkey(edge, share, device)
        assert "application: alice@example.org" in page.text
    assert not edge.mail


async def test_nobody_is_offered_what_their_browser_cannot(edge: People) -> None:
    share, _ = await edge.share(ALICE)
    _, page = await after_code(edge, share)
    assert "application" in page.text


async def test_the_page_is_the_same_for_who_has_one(edge: People) -> None:
    share, _ = await edge.share(ALICE)
    _, before = await first_page(edge, share)
    await remembered(edge, share)
    _, after = await first_page(edge, share)
    assert before.words == after.words
    assert (
        set(options(before, "get"))
        == set(options(after, "get"))
        == {
            "challenge",
            "rpId",
            "timeout",
            "userVerification",
        }
    )


async def test_without_remembering(edge: People) -> None:
    share, _ = await edge.share(ALICE)
    browser, page = await after_code(edge, share, passkeys="1")
    page = await browser.follow(await browser.submit(page))
    assert "application" in page.text


async def test_the_offer_needs_the_code_that_came_before(edge: People) -> None:
    """A credential that is posted where a code is asked for is none."""
    share, _ = await edge.share(ALICE)
    device = Authenticator(edge.main)
    _, page = await after_code(edge, share, passkeys="1")
    credential = device.make(options(page, "create"))
    other, page = await first_page(edge, share)
    page = await other.follow(await other.submit(page, email=ALICE))
    page = await other.follow(await other.submit(page, credential=credential, proven="1"))
    assert "The code has 8 digits" in page.words
    _, page = await first_page(edge, share)
    page = await other.follow(await other.submit(page, credential=credential))
    assert not await edge.service.sessions(share.id)


async def test_forgetting(edge: People, clock: Clock) -> None:
    """From any device, after a code."""
    share, _ = await edge.share(ALICE)
    devices = [await remembered(edge, share) for _ in range(2)]
    browser, page = await after_code(edge, share)
    assert "Forget the devices" in page.words
    page = await browser.follow(await browser.submit(page, action="forget"))
    assert "application" in page.text
    assert [(e.type, e.actor) for e in edge.seen if "device" in e.type] == [
        *[("signin.device_remembered", ALICE)] * 2,
        ("signin.devices_forgotten", ALICE),
    ]
    for device in devices:
        page = await by_passkey(edge, share, device)
        assert "does not prove an address here any more" in page.words
    clock.at += 3601  # for a fourth code
    again = await remembered(edge, share)
    assert "application" in (await by_passkey(edge, share, again)).text


async def test_it_lasts_so_many_days(edge: People, clock: Clock) -> None:
    share, _ = await edge.share(ALICE)
    device = await remembered(edge, share)
    clock.at += (PASSKEY_DAYS - 1) * 86_400
    assert "any more" not in (await by_passkey(edge, share, device)).words
    clock.at += 86_401
    assert "any more" in (await by_passkey(edge, share, device)).words
    assert [e.type for e in edge.seen].count("signin.succeeded") == 2


async def test_it_proves_its_address_and_no_other(edge: People) -> None:
    hers, _ = await edge.share(ALICE)
    device = await remembered(edge, hers)
    his, _ = await edge.share(BOB)
    page = await by_passkey(edge, his, device)
    assert "You are not invited" in page.words
    assert not await edge.service.sessions(his.id)


LIES: dict[str, dict[str, Any]] = {
    "a share's origin": {"origin": "http://k3v9.localhost"},
    "another site's origin": {"origin": "https://evil.example"},
    "another port": {"origin": "http://localhost:1"},
    "another domain": {"rp": "evil.example"},
    "a share's domain": {"rp": "k3v9.localhost"},
    "a challenge of its own": {"challenge": b64(b"x" * 32)},
    "another ceremony": {"kind": "webauthn.create"},
    "nobody verified": {"flags": USER_PRESENT},
    "nobody present": {"flags": USER_VERIFIED},
    "another person's handle": {"handle": b"x" * 32},
    "another key": {"key": Authenticator("").key},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_lies_of_a_device(edge: People, lie: dict[str, Any]) -> None:
    share, _ = await edge.share(ALICE)
    device = await remembered(edge, share)
    sessions = len(await edge.service.sessions(share.id))
    page = await by_passkey(edge, share, device, **lie)
    assert "does not prove an address here any more" in page.words
    assert len(await edge.service.sessions(share.id)) == sessions
    assert "application" in (await by_passkey(edge, share, device)).text


@pytest.mark.parametrize(
    "lie",
    [
        {"origin": "http://k3v9.localhost"},
        {"challenge": b64(b"x" * 32)},
        {"flags": USER_PRESENT},
        {"rp": "x"},
    ],
)
async def test_lies_when_one_is_made(edge: People, lie: dict[str, Any]) -> None:
    """The address is proven all the same; the device is not remembered."""
    share, _ = await edge.share(ALICE)
    device = Authenticator(edge.main)
    browser, page = await after_code(edge, share, passkeys="1")
    credential = device.make(options(page, "create"), **lie)
    page = await browser.follow(await browser.submit(page, credential=credential))
    assert "application" in page.text
    assert "any more" in (await by_passkey(edge, share, device)).words


async def test_an_answer_is_good_for_its_own_sign_in(edge: People) -> None:
    share, _ = await edge.share(ALICE)
    device = await remembered(edge, share)
    browser, page = await first_page(edge, share)
    credential = device.use(options(page, "get"))
    other, second = await first_page(edge, share)
    refused = await other.follow(await other.submit(second, credential=credential))
    assert "any more" in refused.words
    first = await browser.follow(await browser.submit(page, credential=credential))
    assert "application" in first.text
    again = await browser.submit(page, credential=credential)
    assert again.status == 410, "the sign-in is over"


async def test_a_copied_passkey_is_found_out(edge: People) -> None:
    """By its counter, where the device counts."""
    share, _ = await edge.share(ALICE)
    device = await remembered(edge, share)
    copy = Authenticator(
        device.origin, id=device.id, key=device.key, handle=device.handle, count=device.count
    )
    assert "application" in (await by_passkey(edge, share, device)).text
    assert "any more" in (await by_passkey(edge, share, copy)).words


@pytest.mark.parametrize(
    "credential",
    ["x", "{}", "[]", "null", '{"id": 1}', '{"id": "AA", "rawId": "AA", "type": "public-key"}', "x" * 20_000],
)
async def test_what_is_no_credential(edge: People, credential: str) -> None:
    share, _ = await edge.share(ALICE)
    browser, page = await first_page(edge, share)
    page = await browser.follow(await browser.submit(page, credential=credential))
    assert "any more" in page.words
    assert not edge.plugins.health()
    assert all(state.state == "ok" for state in edge.plugins.states())


async def test_answers_are_counted(edge: People) -> None:
    share, _ = await edge.share(ALICE)
    device = await remembered(edge, share)
    browser, page = await first_page(edge, share)
    for _ in range(5):
        page = await browser.follow(await browser.submit(page, credential="{}"))
    good = device.use(options(page, "get"))
    page = await browser.follow(await browser.submit(page, credential=good))
    assert "any more" in page.words
    assert len(await edge.service.sessions(share.id, live=True)) == 1
