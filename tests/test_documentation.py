"""What the documentation says about settings, metrics and plugins is compared with the code."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from pydantic import BaseModel

from guestpass.config import (
    AcmeSection,
    EdgeConfig,
    EdgeSection,
    GatewayConfig,
    GatewaySection,
    Limits,
    Mail,
    PluginSection,
    Service,
    parse,
)
from guestpass.edge.metrics import Metrics
from guestpass.edge.plugins import KINDS, PluginSet, load_available
from guestpass_plugins.authenticate.email_code import EmailCode
from guestpass_plugins.authenticate.oidc import Oidc
from guestpass_plugins.authenticate.oidc.presets import PRESETS

DOCS = Path(__file__).parent.parent / "docs"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def section(page: str, heading: str) -> str:
    """What stands below a heading of the second level."""
    found = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[1]


def rows(table: str) -> dict[str, list[str]]:
    """The rows of the tables in a text, by the name in their first cell."""
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if name := re.match(r"`([a-z_]+)`$", cells[0]):
            found[name[1]] = cells
    return found


def keys(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.mark.parametrize(
    ("page", "heading", "model"),
    [
        ("edge.md", "`[edge]`", EdgeSection),
        ("edge.md", "`[limits]`", Limits),
        ("edge.md", "`[mail]`", Mail),
        ("edge.md", "`[acme]`", AcmeSection),
        ("gateway.md", "`[gateway]`", GatewaySection),
        ("gateway.md", "`[services.NAME]`", Service),
    ],
)
def test_every_key_is_documented_and_no_other(page: str, heading: str, model: type[BaseModel]) -> None:
    assert set(rows(section(text(page), heading))) == keys(model)


@pytest.mark.parametrize(
    ("page", "heading", "model"),
    [
        ("edge.md", "`[edge]`", EdgeSection),
        ("edge.md", "`[acme]`", AcmeSection),
        ("edge.md", "`[limits]`", Limits),
        ("gateway.md", "`[gateway]`", GatewaySection),
        ("gateway.md", "`[services.NAME]`", Service),
    ],
)
def test_defaults_are_those_of_the_code(page: str, heading: str, model: type[BaseModel]) -> None:
    for name, (_, default, *_) in rows(section(text(page), heading)).items():
        literal = re.fullmatch(r"`(.+)`", default)
        if literal is None:
            continue
        value = tomllib.loads(f"x = {literal[1]}")["x"]
        actual = model.model_fields[name].default
        actual = (
            list(actual) if isinstance(actual, tuple) else str(actual) if isinstance(actual, Path) else actual
        )
        assert value == actual, name


def listings(language: str) -> Iterable[tuple[str, str]]:
    for path in sorted(DOCS.glob("*.md")):
        for kind, content in FENCE.findall(path.read_text("utf-8")):
            if kind == language:
                yield path.name, content


@pytest.mark.parametrize(("page", "listing"), [*listings("toml")])
def test_configurations_are_valid(page: str, listing: str, tmp_path: Path) -> None:
    data = tomllib.loads(listing)
    if "gateway" in data:
        parse(GatewayConfig, data, tmp_path / "gateway.toml")
    else:
        parse(EdgeConfig, data, tmp_path / "edge.toml")


def test_the_plugin_of_the_page_loads(tmp_path: Path) -> None:
    page = text("plugins.md")
    source = next(content for kind, content in FENCE.findall(page) if kind == "python")
    (tmp_path / "office_hours.py").write_text(source, "utf-8")
    (tmp_path / "office_hours.py").chmod(0o600)
    tmp_path.chmod(0o700)
    settings = tomllib.loads(next(content for kind, content in FENCE.findall(page) if kind == "toml"))
    outbox = {"notify": [{"use": "outbox", "folder": str(tmp_path / "outbox")}]}
    plugins = PluginSet.load(parse(EdgeConfig, {**settings, **outbox}, tmp_path / "edge.toml"))
    assert [plugin.config.zone for plugin in plugins.filters] == ["Europe/Zurich"]


def test_the_bundled_plugins_are_named() -> None:
    page = text("plugins.md")
    for plugin in load_available():
        assert f"`{plugin.name}`" in page
    for kind in KINDS.values():
        assert f"`{kind.base.__name__}`" in page


def test_plugin_sections_and_their_defaults() -> None:
    page = section(text("edge.md"), "Plugins")
    config = EdgeConfig()
    for name in KINDS:
        line = next(line for line in page.splitlines() if re.match(rf"\| `\[+{name}\]+`", line))
        defaults: tuple[PluginSection, ...] = getattr(config, name)
        assert all(f"`{plugin.use}`" in line for plugin in defaults)


def test_every_metric_is_documented() -> None:
    metrics = Metrics()
    metrics.watch_access_log(lambda: 0)
    metrics.watch(
        grants=lambda: 0,
        streams=lambda: 0,
        tunnels=lambda: [("s", "g", 1, 0.1)],
        tunnel_bytes=lambda: (0, 0),
        certificates=lambda: [("share.example.com", 1.0)],
    )
    page = text("operations.md")
    for family in metrics.registry.collect():
        if family.name.startswith("guestpass_"):
            suffix = "_total" if family.type == "counter" else ""
            assert f"`{family.name}{suffix}" in page, family.name


def test_the_ways_of_signing_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting stands in a table; every example is one that an edge takes."""
    page = text("signing-in.md")
    for heading, model in (("Email codes", EmailCode.Config), ("Providers", Oidc.Config)):
        documented = {name for cell in re.findall(r"^\| (`.*?) \|", section(page, heading), re.MULTILINE)
                      for name in re.findall(r"`([a-z_]+)`", cell)}  # fmt: skip
        assert documented == keys(model), heading
    for preset in PRESETS:
        assert f"`{preset}`" in section(page, "Providers"), preset
    examples = [code for language, code in FENCE.findall(page) if language == "toml"]
    for name in re.findall(r'env = "(\w+)"', page):
        monkeypatch.setenv(name, "secret")
    for name in re.findall(r'file = "([\w.]+)"', page):
        (tmp_path / name).write_text("secret")
        (tmp_path / name).chmod(0o600)
    head = {"edge": {"public_url": "http://localhost:8080", "share_domain": "localhost:8080"}}
    for example in examples:
        settings = tomllib.loads(example)
        if "amazon" in example:
            settings["authenticate"].append({"use": "email-code"})
        config = parse(EdgeConfig, {**head, **settings}, tmp_path / "edge.toml")
        assert PluginSet.load(config).interactive
    assert len(examples) == 8
