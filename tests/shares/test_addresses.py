"""One person has one canonical address, and nobody else has it."""

from __future__ import annotations

import pytest

from guestpass.addresses import canonical, split_addresses
from guestpass.errors import InvalidEmail

SAME = [
    ("alice@example.org", "alice@example.org"),
    ("  Alice@Example.ORG\n", "alice@example.org"),
    ("ALICE+tag@EXAMPLE.org", "alice+tag@example.org"),
    ("o'brien@example.org", "o'brien@example.org"),
    ("a/b=c@example.org", "a/b=c@example.org"),
    ("a@xn--mnchen-3ya.de", "a@xn--mnchen-3ya.de"),
    ("a@XN--MNCHEN-3YA.de", "a@xn--mnchen-3ya.de"),
    ("a@münchen.de", "a@xn--mnchen-3ya.de"),
    ("a@MÜNCHEN.de", "a@xn--mnchen-3ya.de"),
    ("a@mu\u0308nchen.de", "a@xn--mnchen-3ya.de"),  # decomposed
    ("a@straße.de", "a@xn--strae-oqa.de"),  # IDNA 2008: not strasse.de
    ("a@plant.internal", "a@plant.internal"),
]

REFUSED = [
    "",
    "   ",
    "alice",
    "@example.org",
    "alice@",
    "alice@localhost",  # no dot: a typing error, and nobody's mailbox
    "alice@example.org.",
    "alice@.example.org",
    "alice@example..org",
    "alice.@example.org",
    ".alice@example.org",
    "al..ice@example.org",
    "alice@exam_ple.org",
    "alice@-example.org",
    "alice@1.2.3.4",
    "alice@[1.2.3.4]",
    "alice@[IPv6:::1]",
    "alice@@example.org",
    "alice@evil.com@example.org",
    "alice@example.org)bob@evil.com",  # parseaddr() reads alice@example.org
    "alice@example.org,bob@evil.com",
    "alice@example.org;bob@evil.com",
    "alice@example.org bob@evil.com",
    "alice@example.org\nBcc: bob@evil.com",
    "alice@example.org\r\nBcc: bob@evil.com",
    "alice@exam\x00ple.org",
    "ali\x00ce@example.org",
    "ali\tce@example.org",
    "alice(comment)@example.org",
    "alice@(comment)example.org",
    "alice@example.org(comment)",
    '"alice"@example.org',
    '"alice bob"@example.org',
    '"alice@evil.com"@example.org',
    "Alice <alice@example.org>",
    "<alice@example.org>",
    "mailto:alice@example.org",
    "mıke@example.org",  # dotless i: upper-cases to MIKE
    "\u212aevin@example.org",  # Kelvin sign: lower-cases to k
    "mike@\u212aelvin.org",  # mapped to kelvin.org by UTS 46
    "alice@exa\uff4dple.org",  # full-width m
    "alice@example\u3002org",  # ideographic full stop
    "alice@example\uff0eorg",
    "alice\uff20example.org",  # full-width @
    "alice\ufe6bexample.org",  # small @
    "alice@example.org\u200b",
    "alice\u200b@example.org",
    "alice@exam\u200dple.org",
    "alice@exam\u00adple.org",
    "\u202ealice@example.org",
    "аlice@example.org",  # Cyrillic а
    "alice@\u24d4xample.org",  # circled e
    "ａlice@example.org",
    "alice@xn--a.org",  # not a valid A-label
    "alice@xn--.org",
    "x" * 65 + "@example.org",
    "a@" + "b" * 64 + ".org",
    "a@" + ".".join(["b" * 60] * 5) + ".org",
]


@pytest.mark.parametrize(("given", "expected"), SAME)
def test_canonical(given: str, expected: str) -> None:
    assert canonical(given) == expected
    assert canonical(expected) == expected


@pytest.mark.parametrize("given", REFUSED, ids=ascii)
def test_refused(given: str) -> None:
    with pytest.raises(InvalidEmail) as caught:
        canonical(given)
    assert caught.value.message.isprintable()  # fit for a log line


def test_no_look_alike_is_taken_for_another() -> None:
    """Homographs in the domain are other domains, with other canonical forms."""
    cyrillic = canonical("a@\u0430pple.com")
    assert cyrillic == "a@xn--pple-43d.com"
    assert cyrillic != canonical("a@apple.com")


def test_split() -> None:
    assert split_addresses(" A@example.org, b@example.org;c@example.org\n\n a@Example.org ,") == [
        "a@example.org",
        "b@example.org",
        "c@example.org",
    ]
    assert split_addresses(" ,\n") == []
    with pytest.raises(InvalidEmail, match="'nobody'"):
        split_addresses("a@example.org, nobody")
