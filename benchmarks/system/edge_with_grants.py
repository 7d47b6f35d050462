"""An edge for grants.py whose grant table is filled without a hundred thousand sign-ins.

python edge_with_grants.py --config edge.toml

It is the ordinary edge. When the file `fill.json` appears beside the configuration, {"number", "share", "active"}, it
puts that many grants in force, writes the bearer tokens of the first `active` of them, which are of that share, to
`tokens.txt`, and prints {"filled": number}. The others are of a thousand shares that nobody visits.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from guestpass import loop, tokens
from guestpass.config import load_edge
from guestpass.edge.app import Edge
from guestpass.edge.grants import Grant
from guestpass.model import Session, SessionKind

POLL_SECONDS = 0.05
OTHER_SHARES = 1000

# Grants put in force between two looks at the tunnels, which must be kept alive meanwhile.
BATCH = 500

DAY = 86_400.0


async def main(config: Path) -> None:
    edge = Edge(load_edge(config))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    print(json.dumps(await edge.start()), flush=True)
    filling = asyncio.create_task(fill(edge, config.parent))
    await stop.wait()
    filling.cancel()
    await edge.stop()


async def fill(edge: Edge, folder: Path) -> None:
    wanted = folder / "fill.json"
    while not wanted.exists():
        await asyncio.sleep(POLL_SECONDS)
    order = json.loads(wanted.read_text())
    share = await edge.service.get(order["share"])
    others = [replace(share, id=tokens.new_id()) for _ in range(OTHER_SHARES)]
    recipient = share.recipients[0]
    active = []
    now = time.time()
    for number in range(order["number"]):
        secret = tokens.new_secret(tokens.BEARER_PREFIX)
        own = share if number < order["active"] else others[number % OTHER_SHARES]
        if number < order["active"]:
            active.append(secret)
        session = Session(
            id=tokens.new_id(),
            share_id=own.id,
            recipient_id=recipient.id,
            email=recipient.email,
            kind=SessionKind.TOKEN,
            provider="bearer-token",
            created=now,
            last_seen=now,
            expires=now + DAY,
            client="192.0.2.1",
        )
        grant = Grant(
            kind=SessionKind.TOKEN,
            digest=tokens.digest(secret),
            share=own,
            session=session,
            gateway=order["gateway"],
            expires=session.expires,
        )
        if not edge.grants.add(grant, edge.grants.generation):
            raise RuntimeError("a grant was not taken")
        if number % BATCH == 0:
            await asyncio.sleep(0)
    (folder / "tokens.txt").write_text("\n".join(active) + "\n")
    print(json.dumps({"filled": len(edge.grants)}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    sys.exit(loop.run(main(parser.parse_args().config)))
