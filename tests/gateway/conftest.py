"""A gateway's upstream behind a real tunnel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from support import tunnel
from support.upstream import Rig, new_session


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with tunnel.edge(tmp_path, tls=False) as edge:
        gateway = tunnel.TestGateway(new_session=new_session)
        edge.enrol(gateway.key)
        await gateway.join(edge)
        made = Rig(edge, gateway)
        try:
            yield made
        finally:
            await gateway.close()
            if made.upstream is not None:
                await made.upstream.close()
