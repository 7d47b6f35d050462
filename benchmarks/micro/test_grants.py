"""The grant table's look-up, as the relay on aiohttp makes it, with few and with many grants in it.

The fast lane has its own table of the same grants; what a request costs there as it grows is measured with the whole
system: benchmarks/system/grants.py.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from guestpass import tokens
from guestpass.edge.grants import Grant, GrantTable
from guestpass.model import Recipient, Session, SessionKind, Share

# Sessions that are in use, whatever the size of the table.
ACTIVE = 10

COOKIE = SessionKind.COOKIE
EMAIL = "alice@example.org"


async def table(number: int, share: Share) -> tuple[GrantTable, list[bytes]]:
    """A table with `number` grants, and the digests of ten of them."""
    now = share.created
    grants = GrantTable(now=lambda: now)
    recipient = share.recipients[0]
    digests = [tokens.digest(str(index)) for index in range(number)]
    for digest in digests:
        session = Session(
            tokens.new_id(), share.id, recipient.id, EMAIL, COOKIE, "email-code", now, now, None, ""
        )
        assert grants.add(Grant(COOKIE, digest, share, session, "gateway-1", None), grants.generation)
    return grants, digests[:: number // ACTIVE]


@pytest.mark.parametrize("number", [10, 100_000])
def test_look_up(benchmark: Any, number: int) -> None:
    recipients = (Recipient(tokens.new_id(), "s", EMAIL),)
    share = Share("s", "", "bench", "app", "/", (), "", "", time.time(), None, None, recipients=recipients)
    grants, digests = asyncio.run(table(number, share))

    def look_up() -> None:
        for digest in digests:
            assert grants.get(COOKIE, digest, "s") is not None

    benchmark(look_up)
    benchmark.extra_info |= {"items": len(digests), "unit": "look-ups"}
