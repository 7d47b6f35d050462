"""What somebody who is not signed in, or has one share, writes into requests to upset what is there for all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
from support.people import ALICE, API_KEY, People, people


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[People]:
    async with people(tmp_path) as found:
        yield found


# Python has decoders for all of these: some are slow (quadratic), some make text that can be stored nowhere, and one
# that is unknown raises.
CHARSETS = ("punycode", "idna", "utf-7", "unicode_escape", "utf-16", "rot13", "no-such")


@pytest.mark.parametrize("charset", CHARSETS)
async def test_a_form_is_utf_8_whatever_it_says(edge: People, charset: str) -> None:
    kind = f"application/x-www-form-urlencoded; charset={charset}"
    share, _ = await edge.share()
    browser = edge.browser()
    page = await browser.follow(await browser.get(edge.origins.share_origin(share.id) + "/"))
    answer = await browser.post(
        edge.main + page.action, {"csrf": page.csrf, "email": ALICE}, Content_Type=kind
    )
    assert (answer.status, await edge.code() != "") == (303, True)
    stranger = edge.browser()
    wrong = await stranger.post(f"{edge.main}/console/sign-in", {"key": "gpk_+2AA-"}, Content_Type=kind)
    assert wrong.status == 403
    right = await stranger.post(f"{edge.main}/console/sign-in", {"key": API_KEY}, Content_Type=kind)
    assert right.status == 303


async def test_a_form_that_is_none_is_refused(edge: People) -> None:
    share, _ = await edge.share()
    browser = edge.browser()
    page = await browser.follow(await browser.get(edge.origins.share_origin(share.id) + "/"))
    token = urlencode({"csrf": page.csrf})
    for body in (f"{token}&" + "a=b&" * 100, f"{token}&email=\ud800"):
        answer = await browser._ask(
            "POST",
            edge.main + page.action,
            body.encode("utf-8", "surrogatepass"),  # type: ignore[arg-type]
            {"Origin": edge.main},
        )
        assert answer.status == 403, answer.words
