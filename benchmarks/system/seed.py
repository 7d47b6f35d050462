"""Sessions with cookies in the store of an edge that does not run: python seed.py EDGE.TOML SHARE NUMBER

Prints the cookies, one a line.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from guestpass import loop
from guestpass.config import load_edge
from guestpass.model import SessionKind
from guestpass.plugin import Client
from guestpass.shares.bus import Bus
from guestpass.shares.service import ShareService
from guestpass.shares.store import Store


async def main(config: Path, share_id: str, number: int) -> None:
    settings = load_edge(config)
    async with await Store.open(settings.database) as store:
        service = ShareService(
            store,
            Bus(),
            now=time.time,
            emit=lambda event: None,
            public_url=settings.edge.public_url,
            share_origin=lambda share: f"https://{share}.example",
            default_owner="me",
        )
        share = await service.get(share_id)
        email = share.recipients[0].email
        for _ in range(number):
            _, secret = await service.open_session(
                share_id, email, SessionKind.COOKIE, "email-code", Client(address="192.0.2.1")
            )
            print(secret)
        await service.close()


if __name__ == "__main__":
    loop.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
