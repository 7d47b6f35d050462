"""The layout in docs/architecture.md names every module that there is, and none that there is not."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/architecture.md").read_text("utf-8")
LAYOUT = TEXT.partition("## Layout")[2].partition("```\n")[2].partition("```")[0]
NAMED = set(re.findall(r"[\w*]+\.pyx?\b", LAYOUT))

# Told of as a whole: `cli/` and the kinds of plugins; `store/`; what every package has.
SUMMED_UP = ("proxy/guestpass/cli/*", "proxy/guestpass/shares/store/*", "plugins/guestpass_plugins/*/*")
EVERYWHERE = ("__init__.py", "__main__.py", "_version.py")


def modules() -> dict[str, str]:
    """Name → path below the root."""
    roots = ("proxy", "plugins", "_speedups")
    paths = [p.relative_to(ROOT) for root in roots for p in (ROOT / root).rglob("*.py*")]
    return {
        path.name: str(path)
        for path in paths
        if path.suffix in (".py", ".pyx")
        and path.name not in EVERYWHERE
        and not any(fnmatchcase(str(path), pattern) for pattern in SUMMED_UP)
    }


def test_every_module_is_named() -> None:
    found = modules()
    assert len(found) > 80
    missing = [path for name, path in found.items() if not any(fnmatchcase(name, n) for n in NAMED)]
    assert missing == [], "name them in the layout of docs/architecture.md"


def test_every_name_is_a_module() -> None:
    everywhere = {p.name for root in ("proxy", "plugins", "_speedups") for p in (ROOT / root).rglob("*.py*")}
    wrong = [name for name in sorted(NAMED) if not any(fnmatchcase(found, name) for found in everywhere)]
    assert wrong == [], "the layout of docs/architecture.md names what is not there"
