"""The fuzzer's inputs, on the modules as they are installed: `make fuzz-asan` runs them with AddressSanitizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz import seeds
from fuzz.targets import THOROUGH

CORPUS = Path(__file__).parents[1] / "corpus" / "tunnel"


@pytest.mark.parametrize("target", THOROUGH)
def test_every_input_at_every_cut(target: str) -> None:
    found = sorted(CORPUS.glob(f"{target}.*.bin"))
    assert len(found) >= 12
    for path in found:
        try:
            THOROUGH[target](path.read_bytes())
        except Exception as exc:
            exc.add_note(path.name)
            raise


def test_seeds_are_committed() -> None:
    for name, content in seeds.inputs().items():
        assert (CORPUS / name).read_bytes() == content, f"run tests/fuzz/seeds.py: {name}"
