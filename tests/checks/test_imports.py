"""Dependencies point one way: `_speedups` → nothing of ours; `mux` → `_speedups`; `gateway`, `edge` → `mux`, `model`;
`shares` → `model`; plugins → `guestpass.plugin` and `guestpass.model` only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for root in ("proxy", "_speedups", "plugins") for p in (ROOT / root).rglob("*.py"))

# Small modules that know no other part: anybody inside guestpass may use them.
BASE = {
    "errors",
    "model",
    "plugin",
    "tokens",
    "scope",
    "addresses",
    "moments",
    "config",
    "hosts",
    "loop",
    "_version",
}

# part of guestpass → parts it may import besides BASE and itself. `app` and `agent` wire their own side together.
ALLOWED: dict[str, set[str]] = {
    "mux": {"guestpass_speedups"},
    "gateway": {"mux", "guestpass_speedups"},
    "shares": set(),
    "edge": {"mux", "shares", "daemon", "guestpass_speedups"},
    "cli": {"edge", "gateway", "shares", "daemon", "local_ca", "testing", "guestpass_speedups"},
    "daemon": set(),
    "local_ca": set(),
    "testing": {"edge", "gateway", "shares", "daemon", "local_ca"},
    "__main__": {"cli"},
    "__init__": set(),
}
ALLOWED |= {name: set() for name in BASE}

PLUGIN_MAY = {"guestpass.plugin", "guestpass.model", "guestpass_plugins"}


def imported(path: Path) -> set[str]:
    """Dotted names of ours that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names |= {
                f"{node.module}.{alias.name}" if node.module == "guestpass" else str(node.module)
                for alias in node.names
            }
    return {
        name
        for name in names
        if name.split(".")[0] in ("guestpass", "guestpass_speedups", "guestpass_plugins")
    }


def test_all_sources_are_seen() -> None:
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path: Path) -> None:
    relative = path.relative_to(ROOT)
    names = imported(path)
    if relative.parts[0] == "_speedups":
        assert all(name.startswith("guestpass_speedups") for name in names)
        return
    if relative.parts[0] == "plugins":
        wrong = {n for n in names if not any(n == may or n.startswith(may + ".") for may in PLUGIN_MAY)}
        assert not wrong, f"a plugin imports guestpass.plugin and guestpass.model only, not {sorted(wrong)}"
        return
    part = relative.parts[2].removesuffix(".py")
    assert part in ALLOWED, f"{part} is new: say in ALLOWED what it may import"
    allowed = ALLOWED[part] | BASE | {part}
    for name in names:
        parts = name.split(".")
        target = parts[0] if parts[0] != "guestpass" else (parts[1] if len(parts) > 1 else "__init__")
        if target in ("VERSION", "__version__", "__init__"):
            continue
        assert target in allowed, f"{part} may not import {name}"


def test_only_the_compositions_wire_parts_together() -> None:
    """Inside the edge, only app.py builds the parts; the others get them."""
    for path in SOURCES:
        relative = path.relative_to(ROOT)
        if relative.parts[0] == "proxy" and relative.parts[2:3] == ("edge",) and relative.name != "app.py":
            assert "guestpass.edge.app" not in imported(path), f"{relative} imports the composition"
