"""The systemd units of docs/operations.md, as systemd itself reads and rates them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
UNIT = re.compile(r"`/etc/systemd/system/(guestpass-\w+\.service)`:\n\n```ini\n(.*?)```", re.DOTALL)

# systemd's scale goes from 0 to 10; docs/hardening.md promises this.
MOST_EXPOSED = 2.0


@pytest.fixture
def analyze() -> str:
    found = shutil.which("systemd-analyze")
    if found is None:
        reason = "systemd-analyze is missing: apt-get install systemd"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def units() -> dict[str, str]:
    return dict(UNIT.findall(OPERATIONS.read_text("utf-8")))


def test_there_are_two() -> None:
    assert set(units()) == {"guestpass-edge.service", "guestpass-gateway.service"}


@pytest.mark.parametrize("name", ["guestpass-edge.service", "guestpass-gateway.service"])
def test_systemd_understands_every_line(analyze: str, name: str, tmp_path: Path) -> None:
    unit = tmp_path / name
    unit.write_text(units()[name].replace("/opt/guestpass/bin/guestpass", "/bin/true"))
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, encoding="utf-8", timeout=60)
    assert name not in done.stderr, done.stderr
    # And it would say so: the same with a key that there is none of.
    unit.write_text(unit.read_text().replace("ProtectHome=", "ProtectHouse="))
    done = subprocess.run([analyze, "verify", str(unit)], capture_output=True, encoding="utf-8", timeout=60)
    assert "ProtectHouse" in done.stderr


@pytest.mark.parametrize("name", ["guestpass-edge.service", "guestpass-gateway.service"])
def test_systemd_rates_it_well(analyze: str, name: str, tmp_path: Path) -> None:
    unit = tmp_path / name
    unit.write_text(units()[name])
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--no-pager", str(unit)],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) < MOST_EXPOSED
