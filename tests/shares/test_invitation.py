from __future__ import annotations

import pytest

from guestpass.model import Recipient, Share
from guestpass.shares.invitation import invitation

LINK = "https://share.example.com/s/SECRET"


def share(**fields: object) -> Share:
    given: dict[str, object] = {
        "id": "s1",
        "name": "Boiler “3”",
        "site": "plant-a",
        "service": "dashboards",
        "path": "/",
        "scope": (),
        "owner": "Olga Owner",
        "message": "",
        "created": 0.0,
        "expires": None,
        "max_sessions": None,
    }
    return Share(**{**given, **fields})  # type: ignore[arg-type]


ALICE = Recipient("r1", "s1", "alice@example.org")


def test_says_who_shares_what_until_when_and_what_to_do() -> None:
    message = invitation(share(message="Look at\nthis.", expires=1785585600.0), ALICE, LINK)
    assert message.subject == "Olga Owner shared “Boiler “3”” with you"
    assert message.html is not None
    for text in (message.text, message.html):
        for part in (
            "Olga Owner",
            "Boiler “3”",
            "Look at",
            LINK,
            "2026-08-01 12:00 UTC",
            "alice@example.org",
            "prove",
        ):
            assert part in text
    assert "\n> Look at\n> this.\n" in message.text
    assert f"\n{LINK}\n" in message.text
    assert (message.kind, message.to, message.share_id, message.recipient_id) == (
        "invitation",
        "alice@example.org",
        "s1",
        "r1",
    )
    assert message.expires == 1785585600.0


def test_leaves_out_what_there_is_not() -> None:
    message = invitation(share(), ALICE, LINK)
    assert "writes" not in message.text
    assert "until" not in message.text
    assert "blockquote" not in (message.html or "")
    assert "\n\n\n" not in message.text


@pytest.mark.parametrize("field", ["name", "owner", "message"])
def test_markup_stays_text_in_html(field: str) -> None:
    message = invitation(share(**{field: "<script>alert('x')</script> & {{ 7*7 }}"}), ALICE, LINK)
    assert message.html is not None
    assert "<script" not in message.html
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; {{ 7*7 }}" in message.html
    assert "<script>alert('x')</script> & {{ 7*7 }}" in message.text
    assert "49" not in message.text
