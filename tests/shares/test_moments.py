from __future__ import annotations

import pytest

from guestpass.errors import Invalid
from guestpass.moments import parse_moment, to_text

NOW = 1785585600.0


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("90s", NOW + 90),
        ("15m", NOW + 900),
        ("12h", NOW + 43200),
        (" 7d ", NOW + 604800),
        ("2026-08-01T12:00:00Z", NOW),
        ("2026-08-01T14:00:00+02:00", NOW),
        ("2026-08-01t12:00:00.250Z", NOW + 0.25),
    ],
)
def test_parse(text: str, at: float) -> None:
    assert parse_moment(text, NOW) == at


@pytest.mark.parametrize(
    "text",
    ["", "tomorrow", "7", "-7d", "0d", "2026-08-01T12:00:00", "9999-12-31T23:59:59Z", "2026-13-01T00:00:00Z"],
)
def test_refused(text: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse_moment(text, NOW)
    assert repr(text) in caught.value.message


def test_round_trip() -> None:
    assert to_text(NOW) == "2026-08-01T12:00:00.000Z"
    assert parse_moment(to_text(NOW + 0.125), 0.0) == NOW + 0.125
