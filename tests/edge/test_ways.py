"""Several ways of signing in on one page, chosen by the visitor, limited by the share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.people import ALICE, BOB, People, people, plugin

from guestpass.errors import Invalid
from guestpass.plugin import Authenticator, Field, Form, Identity, Plugin, Redirect, SignIn, Step, Unproven
from guestpass_plugins.authenticate.bearer_token import BearerToken
from guestpass_plugins.authenticate.email_code import EmailCode
from guestpass_plugins.choose.random import Random
from guestpass_plugins.revoke.share_state import ShareState


class Ask(Authenticator):
    """Believes whatever address is typed."""

    async def begin(self, sign_in: SignIn) -> Step:
        return Form("Who are you?", fields=(Field("email", "Address", type="email"),))

    async def complete(self, sign_in: SignIn, params: Mapping[str, str]) -> Step:
        return Identity(params["email"], "somebody else")


class Away(Authenticator):
    """Sends the visitor away; who comes back is whom they claim to be, unproven."""

    async def begin(self, sign_in: SignIn) -> Step:
        return Redirect(f"https://idp.example/?state={sign_in.flow_id}.1", state={"n": 1})

    async def complete(self, sign_in: SignIn, params: Mapping[str, str]) -> Step:
        return Unproven(params["email"], subject="s1")


class Confused(Ask):
    """Proves another address than the one that it is given."""

    async def prove(self, sign_in: SignIn, email: str) -> Step:
        return Identity(BOB, self.name)


class Doubtful(Ask):
    async def prove(self, sign_in: SignIn, email: str) -> Step:
        return Unproven(email)


def ways(*more: Plugin) -> dict[str, list[Plugin]]:
    named = [plugin(Ask, "ask"), plugin(Away, "away"), *(more or (plugin(EmailCode, "email-code"),))]
    for way in named:
        if not isinstance(way, EmailCode):
            way.label = f"By {way.name}"  # type: ignore[attr-defined]
    return {
        "authenticate": [*named, plugin(BearerToken, "bearer-token")],
        "revoke": [plugin(ShareState, "share-state")],
        "choose": [plugin(Random, "random")],
    }


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[People]:
    async with people(tmp_path, plugins=ways()) as found:
        yield found


async def sign_in_page(edge: People, share: Any) -> tuple[Any, Any]:
    browser = edge.browser()
    return browser, await browser.follow(await browser.get(edge.origins.share_origin(share.id) + "/"))


async def test_all_stand_on_the_page_in_the_order_of_the_configuration(edge: People) -> None:
    share, _ = await edge.share(ALICE)
    _, page = await sign_in_page(edge, share)
    labels = ("By ask", "By away", "Get a code by email")
    positions = [page.words.index(label) for label in labels]
    assert positions == sorted(positions)


async def test_a_share_shows_only_what_it_takes(edge: People) -> None:
    share, _ = await edge.share(ALICE, sign_in=("away", "email-code"))
    browser, page = await sign_in_page(edge, share)
    assert "By ask" not in page.words
    assert "By away" in page.words
    assert (await browser.get(f"{page.url}/ask")).status == 404
    assert (await browser.get(f"{page.url}/away")).status == 303


async def test_one_way_is_begun_at_once(edge: People) -> None:
    share, _ = await edge.share(ALICE, sign_in=("email-code",))
    _, page = await sign_in_page(edge, share)
    assert "Prove your email address" in page.words


@pytest.mark.parametrize("ahead", [{"method": "HEAD"}, {"Sec-Purpose": "prefetch"}, {"Purpose": "prerender"}])
async def test_looking_ahead_begins_nothing(edge: People, ahead: dict[str, str]) -> None:
    """A proxy that fetches what the visitor is about to open does not get their sign-in."""
    share, _ = await edge.share(ALICE, sign_in=("away",))
    flow = (await edge.browser().get(edge.origins.share_origin(share.id) + "/")).location
    for url in (flow, f"{flow}/away"):
        assert (await edge.browser().get(url, **ahead)).status == 503
    leaves = await edge.browser().get(flow)
    assert leaves.location.startswith("https://idp.example/")


async def test_what_is_not_taken_cannot_be_posted_either(edge: People) -> None:
    """The token of another form of the same flow is good for it; the share is not."""
    share, _ = await edge.share(ALICE, sign_in=("away", "email-code"))
    browser, page = await sign_in_page(edge, share)
    form = await browser.get(f"{page.url}/email-code")
    refused = await browser.post(f"{page.url}/ask", {"csrf": form.csrf, "email": ALICE})
    assert refused.status == 404
    assert not await edge.service.sessions(share.id)


async def test_it_is_asked_again_when_the_address_is_proven(edge: People) -> None:
    """The owner limits the share while somebody signs in."""
    share, _ = await edge.share(ALICE)
    browser, page = await sign_in_page(edge, share)
    form = await browser.get(f"{page.url}/ask")
    handed = await browser.submit(form, email=ALICE)  # towards the share's origin, with a code
    await edge.service.update(share.id, sign_in=("email-code",))
    page = await browser.follow(handed)
    assert page.status == 403
    assert "in another way" in page.words
    assert not await edge.service.sessions(share.id)


async def test_a_remembered_address_counts_only_as_it_was_proven(edge: People) -> None:
    first, _ = await edge.share(ALICE)
    second, _ = await edge.share(ALICE, sign_in=("email-code",))
    browser, page = await sign_in_page(edge, first)
    form = await browser.get(f"{page.url}/ask")
    assert "application" in (await browser.follow(await browser.submit(form, email=ALICE))).text
    page = await browser.follow(await browser.get(edge.origins.share_origin(second.id) + "/"))
    assert "Continue as" not in page.words
    flow = page.url.rsplit("/", 1)[0] if page.url.endswith("email-code") else page.url
    refused = await browser.follow(await browser.post(flow, {"csrf": page.csrf}))
    assert refused.status == 403
    assert not await edge.service.sessions(second.id)


async def test_a_limit_ends_the_sessions_that_it_does_not_take(edge: People) -> None:
    share, _ = await edge.share(ALICE, BOB)
    browser, page = await sign_in_page(edge, share)
    form = await browser.get(f"{page.url}/ask")
    assert "application" in (await browser.follow(await browser.submit(form, email=ALICE))).text
    other = edge.browser()
    page = await other.follow(await other.get(edge.origins.share_origin(share.id) + "/"))
    page = await other.get(f"{page.url}/email-code")
    page = await other.follow(await other.submit(page, email=BOB))
    page = await other.follow(await other.submit(page, code=await edge.code(BOB)))
    assert "application" in page.text
    changed = await edge.service.update(share.id, sign_in=("email-code",))
    assert changed.share.sign_in == ("email-code",)
    url = edge.origins.share_origin(share.id) + "/"
    assert "Prove your email address" in (await browser.follow(await browser.get(url))).words
    assert "application" in (await other.get(url)).text
    lifted = await edge.service.update(share.id, sign_in=())
    assert lifted.share.sign_in == ()


async def test_tokens_are_no_way_of_signing_in(edge: People) -> None:
    """What the owner makes for a script goes on."""
    share, _ = await edge.share(ALICE, sign_in=("email-code",))
    _, token = await edge.service.create_token(share.id, ALICE)
    url = edge.origins.share_origin(share.id) + "/"
    page = await edge.browser().get(url, Authorization=f"Bearer {token}")
    assert "application" in page.text


async def test_a_share_that_takes_only_what_is_gone_says_so(tmp_path: Path) -> None:
    async with people(tmp_path, plugins=ways()) as before:
        share, _ = await before.share(ALICE, sign_in=("ask",))
    less = ways()
    less["authenticate"] = less["authenticate"][1:]
    async with people(tmp_path, plugins=less) as after:
        _, page = await sign_in_page(after, share)
        assert page.status == 403
        assert "Nobody can sign in" in page.words


@pytest.mark.parametrize("names", [("nobody",), ("bearer-token",), ("ask", "")])
async def test_a_name_that_is_not_offered_is_refused(edge: People, names: tuple[str, ...]) -> None:
    with pytest.raises(Invalid, match="no way of signing in"):
        await edge.share(ALICE, sign_in=names)
    share, _ = await edge.share(ALICE)
    with pytest.raises(Invalid, match="no way of signing in"):
        await edge.service.update(share.id, sign_in=names)


# ── addresses that another authenticator proves ──────────────────────────────────────────────────────────────────


async def claimed(edge: People, share: Any, email: str = ALICE) -> tuple[Any, Any]:
    browser, page = await sign_in_page(edge, share)
    if not page.url.startswith("https://idp.example/"):  # where it is the only way, one is there already
        page = await browser.get(f"{page.url}/away")
    state = (page.location or page.url).partition("state=")[2]
    return browser, await browser.follow(
        await browser.get(f"{edge.main}/callback/away?state={state}&email={email}")
    )


async def test_a_share_that_takes_the_provider_takes_its_code(edge: People) -> None:
    share, _ = await edge.share(ALICE, sign_in=("away",))
    browser, page = await claimed(edge, share)
    assert "Enter the code" in page.words
    page = await browser.follow(await browser.submit(page, code=await edge.code()))
    assert "application" in page.text
    (session,) = await edge.service.sessions(share.id, live=True)
    assert (session.email, session.provider) == (ALICE, "away")


async def test_a_claim_ends_with_another_choice(edge: People) -> None:
    share, _ = await edge.share(ALICE, sign_in=("away", "ask"))
    browser, page = await claimed(edge, share)
    flow = page.url.rsplit("/", 1)[0]
    form = await browser.get(f"{flow}/ask")
    page = await browser.follow(await browser.submit(form, email=ALICE))
    assert "application" in page.text
    (session,) = await edge.service.sessions(share.id, live=True)
    assert session.provider == "ask"


@pytest.mark.parametrize("cls", [Confused, Doubtful])
async def test_only_the_claimed_address_ends_it(tmp_path: Path, cls: type[Plugin]) -> None:
    async with people(tmp_path, plugins=ways(plugin(cls, "prover"))) as edge:
        share, _ = await edge.share(ALICE, BOB)
        _, page = await claimed(edge, share)
        assert page.status == 403
        assert not await edge.service.sessions(share.id)


async def test_without_anything_that_proves_it_is_denied(tmp_path: Path) -> None:
    async with people(tmp_path, plugins=ways(plugin(Ask, "other"))) as edge:
        share, _ = await edge.share(ALICE)
        _, page = await claimed(edge, share)
        assert page.status == 403
        assert "no other way here" in page.words
        assert not await edge.service.sessions(share.id)


async def test_a_provider_may_not_name_what_is_no_address(edge: People) -> None:
    share, _ = await edge.share(ALICE)
    _, page = await claimed(edge, share, "not-an-address")
    assert page.status == 503
    await asyncio.sleep(0)
    assert not edge.mail


@pytest.mark.parametrize("at", ["the application", "the hand-over", "a further share"])
async def test_a_way_that_is_gone_after_a_restart_admits_nobody(tmp_path: Path, at: str) -> None:
    """Whoever came by it: with a session, on the way to one, or remembered on the main origin."""
    async with people(tmp_path, plugins=ways()) as edge:
        share, _ = await edge.share(ALICE)
        further, _ = await edge.share(ALICE)
        browser, page = await sign_in_page(edge, share)
        handed = await browser.submit(await browser.get(f"{page.url}/ask"), email=ALICE)
        if at != "the hand-over":
            assert "application" in (await browser.follow(handed)).text
    fewer = ways()
    fewer["authenticate"] = [way for way in fewer["authenticate"] if way.name != "ask"]
    async with people(tmp_path, plugins=fewer) as again:
        jars = {host.rpartition(":")[0]: jar for host, jar in browser.cookies.items()}
        back = again.browser()
        back.cookies = {f"{host}:{again.port}": jar for host, jar in jars.items()}
        origin = again.origins.share_origin((further if at == "a further share" else share).id)
        path = "/" + handed.location.partition("://")[2].partition("/")[2] if at == "the hand-over" else "/"
        page = await back.follow(await back.get(origin + path))
        assert "application" not in page.text
        assert "Continue as" not in page.words
        if at == "the hand-over":
            assert page.status == 403
