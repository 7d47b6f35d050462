from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.shares import World, world


@pytest.fixture
async def w(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made
