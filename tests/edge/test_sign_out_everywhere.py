"""`Host.sign_out`: an address is put out of everything, and what it proved before counts no more."""

from __future__ import annotations

import time
from pathlib import Path

from support.people import ALICE, people

from guestpass.model import Identity, SessionKind

NAVIGATION = {"Sec-Fetch-Mode": "navigate"}


async def test_a_browser_that_was_signed_in_must_prove_the_address_again(tmp_path: Path) -> None:
    async with people(tmp_path) as edge:
        first, _ = await edge.share()
        second, _ = await edge.share()
        browser = edge.browser()
        await browser.sign_in(f"{edge.origins.share_origin(first.id)}/")
        page = await browser.follow(
            await browser.get(f"{edge.origins.share_origin(second.id)}/", **NAVIGATION)
        )
        assert ALICE in page.text  # one click is enough
        assert await edge.service.sign_out(ALICE, "test") == 1
        assert not await edge.service.sessions()
        page = await browser.follow(
            await browser.get(f"{edge.origins.share_origin(second.id)}/", **NAVIGATION)
        )
        assert ALICE not in page.text
        me = await browser.get(f"{edge.main}/me")
        assert ALICE not in me.text
        await browser.sign_in(f"{edge.origins.share_origin(second.id)}/")
        (session,) = await edge.service.sessions()
        assert session.email == ALICE


async def test_a_proof_that_is_on_its_way_is_void(tmp_path: Path) -> None:
    """A hand-over code that was made before, and is used after."""
    async with people(tmp_path) as edge:
        share, _ = await edge.share()
        browser = edge.browser()
        origin = edge.origins.share_origin(share.id)
        page = await browser.follow(await browser.get(f"{origin}/", **NAVIGATION))
        page = await browser.follow(await browser.submit(page, email=ALICE))
        answer = await browser.submit(page, code=await _code(edge))
        assert "/.guestpass/finish" in answer.location
        await edge.service.sign_out(ALICE, "test")
        refused = await browser.follow(answer)
        assert refused.status == 403
        assert not await edge.service.sessions()


async def _code(edge: object) -> str:
    return str(await edge.code())  # type: ignore[attr-defined]


async def test_tokens_end_where_that_is_asked(tmp_path: Path) -> None:
    async with people(tmp_path) as edge:
        share, _ = await edge.share()
        await edge.service.create_token(share.id, ALICE)
        assert await edge.service.sign_out(ALICE, "test") == 0
        assert [s.kind for s in await edge.service.sessions()] == [SessionKind.TOKEN]
        assert await edge.service.sign_out(ALICE, "test", tokens=True) == 1
        assert not await edge.service.sessions()


async def test_whose_a_subject_is(tmp_path: Path) -> None:
    async with people(tmp_path) as edge:
        proofs = edge.service.proofs
        await proofs.remember(Identity(ALICE, "google", "1", time.time()))
        await proofs.remember(Identity(ALICE, "google", "", time.time()))
        assert await proofs.address_of("google", "1") == ALICE
        assert await proofs.address_of("googl", "e1") is None
        assert await proofs.address_of("google", "") is None


async def test_whoever_comes_again_is_remembered_for_longer(tmp_path: Path) -> None:
    """Else their provider's word that an account has ended would mean nobody, while a session of theirs goes on."""
    day, at = 86_400.0, [1_000_000.0]
    async with people(tmp_path, now=lambda: at[0]) as edge:
        proofs = edge.service.proofs
        for _ in range(2):
            at[0] += 60 * day
            await proofs.remember(Identity(ALICE, "google", "1", at[0]))
        at[0] += 60 * day
        assert await proofs.address_of("google", "1") == ALICE
        at[0] += 60 * day
        assert await proofs.address_of("google", "1") is None
