"""docs/command-line.md is whole and true: every command, option and variable is there, and nothing else."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpass import config
from guestpass.cli import build_parser, share, up
from guestpass.shares import rules

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "command-line.md").read_text("utf-8")
ROW = re.compile(r"^\| (`[^|]*) \| [^|]* \|([^|]*)\|$", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")

EVERYWHERE = {"-h", "--help", "--json"}
MANAGEMENT = {"--edge", "--api-key-file", "--api-key", "--ca"}
# One row for both, and the option is of one of them.
ONLY = {("keys list", "--compromised")}


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, set[str]]]:
    """Each that does something, with its own options."""
    options = {
        o for action in parser._actions for o in action.option_strings if o.startswith("--")
    } - EVERYWHERE
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if name and (not nested or parser.get_default("run")):
        yield name, options
    for action in nested:
        for word, sub in action.choices.items():
            yield from commands(sub, f"{name} {word}".strip())


def described() -> dict[str, set[str]]:
    found = {}
    for names, options in ROW.findall(PAGE):
        told = {option for option in CODE.findall(options) if option.startswith("--")}
        if "management" in options:
            told |= MANAGEMENT
        for command in CODE.findall(names):
            words = " ".join(word for word in command.split() if word.islower())
            found[words] = {option for option in told if (words, option) not in ONLY}
    return found


def test_every_command_and_option_is_described() -> None:
    there = dict(commands(build_parser()))
    assert len(there) > 20
    assert described() == there


@pytest.mark.parametrize("folder", ["proxy/guestpass/cli"])
def test_every_variable_is_described(folder: str) -> None:
    used = {
        name
        for path in (ROOT / folder).glob("*.py")
        for name in re.findall(r"\bGUESTPASS_[A-Z_]+\b", path.read_text("utf-8"))
    }
    assert used
    assert used == set(re.findall(r"^\| `(GUESTPASS_\w+)`", PAGE, re.MULTILINE))


def test_limits_are_the_edges_own() -> None:
    """Repeated, for whoever parses a command line does not import all of an edge."""
    assert up.MAX_WORKERS == config.MAX_WORKERS
    assert share.MAX_SESSIONS == rules.MAX_SESSIONS
