"""`oidc` with a certified provider that nobody here wrote, over real HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.people import ALICE, People, people, plugin
from support.provider import SECRET, provider, through

from guestpass.model import Share
from guestpass.plugin import Plugin
from guestpass_plugins.authenticate.email_code import EmailCode
from guestpass_plugins.authenticate.oidc import Oidc
from guestpass_plugins.choose.random import Random
from guestpass_plugins.revoke.share_state import ShareState


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    with provider() as found:
        yield found


# name → settings besides the issuer
WAYS: dict[str, dict[str, Any]] = {
    "basic": {"client_id": "basic", "client_secret": SECRET, "label": "Continue with Basic"},
    "post": {"client_id": "post", "client_secret": SECRET, "token_auth": "client_secret_post"},
    "public": {"client_id": "public"},
    "es256": {"client_id": "es256", "client_secret": SECRET, "algorithm": "ES256"},
    "strict": {"client_id": "basic", "client_secret": SECRET, "ask_code": False},
}


def ways(issuer: str) -> dict[str, list[Plugin]]:
    return {
        "authenticate": [
            plugin(EmailCode, "email-code"),
            *(plugin(Oidc, name, issuer=issuer, **settings) for name, settings in WAYS.items()),
        ],
        "revoke": [plugin(ShareState, "share-state")],
        "choose": [plugin(Random, "random")],
    }


@pytest.fixture
async def edge(tmp_path: Path, issuer: str) -> AsyncIterator[People]:
    async with people(tmp_path, plugins=ways(issuer)) as found:
        yield found


async def at_callback(edge: People, share: Share, way: str, login: str) -> tuple[Any, str]:
    """A browser, and the URL with which the provider sends it back."""
    browser = edge.browser()
    page = await browser.follow(await browser.get(edge.origins.share_origin(share.id) + "/plots?x=1"))
    assert f'href="{page.url.removeprefix(edge.main)}/{way}"' in page.text
    leaves = await browser.get(f"{page.url}/{way}")
    assert leaves.status == 303
    return browser, await through(leaves.location, login, f"{edge.main}/callback/")


@pytest.mark.parametrize("way", ["basic", "post", "public", "es256", "strict"])
async def test_whom_the_provider_verified_is_let_in(edge: People, way: str) -> None:
    share, _ = await edge.share(ALICE)
    browser, back = await at_callback(edge, share, way, "verified")
    assert back.startswith(f"{edge.main}/callback/{way}?")
    page = await browser.follow(await browser.get(back))
    assert "application: alice@example.org" in page.text
    assert page.text.endswith("/plots?x=1")
    (session,) = await edge.service.sessions(share.id, live=True)
    assert (session.email, session.provider) == (ALICE, way)
    (event,) = (e for e in edge.seen if e.type == "signin.succeeded")
    assert str(event.detail["subject"]).endswith(" verified")
    assert not edge.mail


@pytest.mark.parametrize("login", ["unverified", "silent"])
async def test_whom_the_provider_does_not_vouch_for_types_a_code_as_well(edge: People, login: str) -> None:
    share, _ = await edge.share(ALICE)
    browser, back = await at_callback(edge, share, "basic", login)
    page = await browser.follow(await browser.get(back))
    assert page.status == 200
    assert "code is on its way to alice@example.org" in page.words
    assert "Use another address" not in page.words
    page = await browser.follow(await browser.submit(page, code=await edge.code()))
    assert "application: alice@example.org" in page.text
    (session,) = await edge.service.sessions(share.id, live=True)
    assert session.provider == "basic"


async def test_an_address_that_is_to_be_proven_cannot_be_exchanged(edge: People) -> None:
    share, _ = await edge.share(ALICE, "bob@example.org")
    browser, back = await at_callback(edge, share, "basic", "silent")
    page = await browser.follow(await browser.get(back))
    for fields in ({"action": "other"}, {"email": "bob@example.org"}):
        page = await browser.follow(await browser.submit(page, **fields))
        assert "The code has 8 digits" in page.words
    assert all(message.to == ALICE for message in edge.mail)


async def test_without_a_code_an_unverified_address_is_refused(edge: People) -> None:
    share, _ = await edge.share(ALICE)
    browser, back = await at_callback(edge, share, "strict", "unverified")
    page = await browser.follow(await browser.get(back))
    assert page.status == 403
    assert "was verified" in page.words
    assert not await edge.service.sessions(share.id)


async def test_who_is_not_invited_does_not_get_in(edge: People) -> None:
    share, _ = await edge.share("bob@example.org")
    browser, back = await at_callback(edge, share, "basic", "verified")
    page = await browser.follow(await browser.get(back))
    assert page.status == 403
    assert "You are not invited" in page.words
    assert not await edge.service.sessions(share.id)
