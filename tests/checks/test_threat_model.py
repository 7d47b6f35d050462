"""THREAT_MODEL.md claims nothing that no test shows: each row of what is defended names at least one, which exists (see
test_docs.py)."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "THREAT_MODEL.md"


def rows() -> list[str]:
    text = PAGE.read_text("utf-8")
    part = text[text.index("## What is defended") : text.index("## What is not defended")]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [line for line in lines if not line.startswith(("| attack |", "| fault |"))]


def test_every_claim_names_its_test() -> None:
    found = rows()
    assert len(found) > 50
    assert not [row for row in found if not re.search(r"`tests/[\w/]+\.py(::\w+)?`", row)]
