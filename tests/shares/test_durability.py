"""`kill -9` loses nothing that was acknowledged and brings back nothing that was deleted."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from support.shares import world

from guestpass.errors import ShareNotFound

KILLS = int(os.environ.get("GUESTPASS_KILLS", "20"))

# Creates shares and deletes some, for ever; a line is printed after each acknowledgement. "begin delete" says that the
# outcome is open until the acknowledgement comes.
PROGRAM = """
import asyncio, random, sys
from pathlib import Path
from support.shares import new, world

async def main():
    async with world(Path(sys.argv[1])) as w:
        mine = []
        print("ready", flush=True)
        while True:
            made = await w.service.create(new("a@example.org", "b@example.org", name="kept"))
            mine.append(made.share.id)
            print("created", made.share.id, flush=True)
            if random.random() < 0.4:
                gone = mine.pop(random.randrange(len(mine)))
                print("begin", gone, flush=True)
                await w.service.delete(gone)
                print("deleted", gone, flush=True)

asyncio.run(main())
"""


async def test_kill(tmp_path: Path) -> None:
    created: set[str] = set()
    deleted: set[str] = set()
    begun: set[str] = set()
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        # So many acknowledgements, however slow the machine is, and then at any moment.
        output = b"".join(process.stdout.readline() for _ in range(random.randrange(12)))
        time.sleep(random.uniform(0.0, 0.02))
        process.kill()
        output += process.communicate()[0]
        for line in output.decode().splitlines(keepends=True):
            if not line.endswith("\n"):
                continue  # torn by the kill
            what, share_id = line.split()
            {"created": created, "begin": begun, "deleted": deleted}[what].add(share_id)
    assert len(created) > KILLS
    async with world(tmp_path) as w:
        for share_id in created:
            try:
                share = await w.service.get(share_id)
            except ShareNotFound:
                raise AssertionError(f"{share_id} was acknowledged and is lost") from None
            assert [r.email for r in share.recipients] == ["a@example.org", "b@example.org"]
            if share_id in deleted:
                assert share.deleted is not None, f"{share_id} was deleted and is back"
            elif share_id not in begun:
                assert share.deleted is None
        # All or nothing: whatever is there is whole, with a mail for each recipient of what is not deleted.
        cursor, active = None, 0
        while True:
            page = await w.service.list(cursor, 200, include_ended=True)
            active += sum(share.deleted is None for share in page.items)
            assert all(len(share.recipients) == 2 for share in page.items)
            cursor = page.next
            if cursor is None:
                break
        assert len(await w.queued()) == min(2 * active, 1000)
