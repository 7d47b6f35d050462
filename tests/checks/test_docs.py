"""Documentation that fails when it is wrong: links lead somewhere, commands that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    p
    for p in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("build", "dist") for part in p.relative_to(ROOT).parts)
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)
FENCE = re.compile(r"```.*?```", re.DOTALL)


def anchor(heading: str) -> str:
    """GitHub's way of making an anchor of a heading."""
    text = re.sub(r"[`*_]|\[|\]\([^)]*\)", "", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def test_pages_are_seen() -> None:
    assert {"README.md", "CONTRIBUTING.md", "THREAT_MODEL.md", "CHANGELOG.md"} <= {p.name for p in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        if fragment and path.suffix == ".md":
            anchors = {anchor(h) for h in HEADING.findall(FENCE.sub("", path.read_text("utf-8")))}
            assert fragment in anchors, f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for name in re.findall(r"`make ([a-z-]+)`", page.read_text("utf-8")):
        assert name in targets, f"{page.name} names `make {name}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_that_are_named_exist(page: Path) -> None:
    """`tests/x/test_y.py` and `test_y.py::test_z` in prose are promises."""
    text = page.read_text("utf-8")
    for file, _, name in re.findall(r"`(tests/[\w/]+\.py)(::(\w+))?`", text):
        path = ROOT / file
        assert path.exists(), f"{page.name} names {file}"
        if name:
            assert re.search(rf"def {name}\b", path.read_text("utf-8")), f"{page.name} names {file}::{name}"
