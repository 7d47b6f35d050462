"""docs/bundled-plugins.md is whole and true: every plugin and every setting is there, and every example loads."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestpass.config import EdgeConfig, parse
from guestpass.edge.plugin_loader import KINDS, build, load_available, load_class

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "bundled-plugins.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^### ([a-z-]+)(?: \((\w+)\))?$", re.MULTILINE)
SETTING = re.compile(r"^\| ((?:`\w+`(?:, )?)+) \|", re.MULTILINE)

SECTION_OF_WORD = {
    "Authenticators": "authenticate",
    "Revokers": "revoke",
    "Choosers": "choose",
    "Filters": "filter",
    "Notifiers": "notify",
    "Observers": "observe",
}


def described() -> Iterator[tuple[str, str, str]]:
    """(section, plugin, text) of every heading."""
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        section = SECTION_OF_WORD[part.split("\n", 1)[0]]
        pieces = re.split(r"^### ", part, flags=re.MULTILINE)[1:]
        for piece in pieces:
            match = HEADING.match("### " + piece.split("\n", 1)[0])
            assert match is not None
            yield section, match[1], piece


def test_every_bundled_plugin_is_named() -> None:
    for plugin in load_available():
        if plugin.target.startswith("guestpass_plugins."):
            pages = [
                p.name for p in (ROOT / "docs").rglob("*.md") if f"`{plugin.name}`" in p.read_text("utf-8")
            ]
            assert pages, f"no page of docs/ names the {plugin.kind} {plugin.name}"


@pytest.mark.parametrize(
    ("section", "name", "text"),
    list(described()),
    ids=[f"{section}-{name}" for section, name, _ in described()],
)
def test_every_setting_is_described(section: str, name: str, text: str) -> None:
    settings = set(load_class(KINDS[section], name, ROOT).Config.model_fields)
    told = {key for row in SETTING.findall(text) for key in re.findall(r"`(\w+)`", row)}
    assert told == settings
    assert f'use = "{name}"' in text


@pytest.mark.parametrize("example", EXAMPLES, ids=[str(n) for n in range(len(EXAMPLES))])
def test_examples_load(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if example.startswith("# gateway.toml"):
        assert tomllib.loads(example)["gateway"]["labels"]
        return
    secret = "whsec_" + "A" * 43 + "="
    monkeypatch.setenv("WEBHOOK_SECRET", secret)
    monkeypatch.setenv("MAIL_URL", "smtp://mail.example.com:587?tls=starttls")
    (tmp_path / "webhook.secret").write_text(secret, "ascii")
    (tmp_path / "webhook.secret").chmod(0o600)
    found = 0
    config = parse(EdgeConfig, tomllib.loads(example), tmp_path / "edge.toml")
    named = tomllib.loads(example)
    for kind in KINDS.values():
        if kind.section in named:
            for position, section in enumerate(getattr(config, kind.section), 1):
                assert build(kind, section, position, config.file)
                found += 1
    assert found
