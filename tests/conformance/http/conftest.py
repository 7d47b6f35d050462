"""One world for all of the suite: starting it takes longer than most of the tests. After each group (a module) it is
looked whether anything was left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conformance.http.world import World, running


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("conformance")) as made:
        yield made


@pytest.fixture(scope="module")
def world(everything: World) -> Iterator[World]:
    before = everything.descriptors()
    started = {name: process.create_time() for name, process in everything.processes().items()}
    yield everything
    everything.settled(before, started)
