"""The pages about plugins are current: the reference is generated, every listing is a file that is tested, and every
hook is written about."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import guestpass.plugin as api
from guestpass.cli.plugin_check import hooks_of
from guestpass.cli.plugin_new import filled
from guestpass.edge.isolation_wire import HOOKS
from guestpass.edge.plugin_loader import BLOCKING_HOOKS, KINDS

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "plugins"
EXAMPLES = ROOT / "examples" / "plugins"

# The examples are what `plugin new` writes: kind → name.
NAMES = {
    "authenticator": "pass-phrase",
    "revoker": "half-day",
    "backend-chooser": "near-gateways",
    "request-filter": "office-hours",
    "notifier": "chat",
    "observer": "count-events",
}

spec = importlib.util.spec_from_file_location("render", PAGES / "render.py")
assert spec is not None
assert spec.loader is not None
render = importlib.util.module_from_spec(spec)
spec.loader.exec_module(render)

REFERENCE = render.reference()


def test_pages_are_current() -> None:
    for path, text in render.pages().items():
        assert path.read_text("utf-8") == text, f"{path.name} is not current: python docs/plugins/render.py"


def test_everything_public_is_in_the_reference() -> None:
    headings = set(re.findall(r"^### (\w+)$", REFERENCE, re.MULTILINE))
    assert set(api.__all__) <= headings


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda k: k.name)
def test_every_hook_is_documented_with_its_signature(kind: object) -> None:
    base = kind.base  # type: ignore[attr-defined]
    page = (PAGES / f"howto-{base.kind}.md").read_text("utf-8")
    assert hooks_of(base)
    for hook in hooks_of(base):
        function = getattr(base, hook)
        assert function.__doc__, f"{base.__name__}.{hook} has no docstring"
        parameters = [p for p in inspect.signature(function).parameters if p != "self"]
        shown = re.search(rf"^`(?:async )?{hook}\((.*)\) -> .*`", section(base.__name__), re.MULTILINE)
        assert shown, f"{base.__name__}.{hook} is not in the reference"
        assert re.findall(r"(?:^|, )(\w+):", shown[1]) == parameters
        assert f"`{hook}`" in page or f"**`{hook}`**" in page, (
            f"{base.__name__}.{hook} is not in {base.kind}'s how-to"
        )
    # What the edge knows of hooks elsewhere is the same.
    assert set(HOOKS[base.kind]) == set(hooks_of(base))
    assert set(BLOCKING_HOOKS[base.kind]) == set(hooks_of(base)) - {"watch"}


def section(name: str) -> str:
    found = re.search(rf"^### {name}$(.*?)(?=^##)", REFERENCE, re.MULTILINE | re.DOTALL)
    assert found, name
    return found[1]


def test_listings_of_python_are_files() -> None:
    for path in PAGES.glob("*.md"):
        text = path.read_text("utf-8")
        fences = len(re.findall(r"^```python$", text, re.MULTILINE))
        assert fences == len(re.findall(r"^<!-- file: \S+ -->\n\n```python$", text, re.MULTILINE)), path.name


@pytest.mark.parametrize("kind", NAMES)
def test_examples_are_what_new_writes(kind: str) -> None:
    name = NAMES[kind]
    snake = name.replace("-", "_")
    words = {
        "DEMO_NAME": name,
        "demo_module": snake,
        "DemoClass": "".join(part.capitalize() for part in name.split("-")),
    }
    for prefix in ("", "test_"):
        path = EXAMPLES / f"{prefix}{snake}.py"
        assert path.read_text("utf-8") == filled(f"{prefix}{kind}.py.in", words), path.name


def test_examples_pass_their_tests() -> None:
    options = (
        "-o",
        "asyncio_mode=auto",
        "-o",
        "asyncio_default_fixture_loop_scope=function",
        "-o",
        "pythonpath=.",
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", *options, "."],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout


def test_the_type_checker_agrees() -> None:
    sources = [str(path) for path in sorted(EXAMPLES.glob("*.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", *sources],
        cwd=ROOT,
        env={
            "MYPYPATH": "proxy:_speedups:examples/plugins",
            "PATH": "/usr/bin:/bin",
            "HOME": str(ROOT / "build"),
        },
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout
