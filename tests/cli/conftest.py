"""Runs commands as people do: processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

COMMAND_SECONDS = 60.0


@dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on standard output."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        found = json.loads(lines[0])
        assert isinstance(found, dict)
        return found

    @property
    def code(self) -> str:
        """Of an error with --json."""
        error = self.json["error"]
        assert set(error) == {"code", "message", "hint"}
        return str(error["code"])


Guestpass = Callable[..., Result]


@pytest.fixture(scope="session")
def guestpass() -> Guestpass:
    """`guestpass("share", "list", input=…, env={…})`; the environment holds no settings of the person who tests."""

    def run(*arguments: str, input: str = "", env: dict[str, str] | None = None, cwd: Any = None) -> Result:
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith("GUESTPASS_") and "proxy" not in k.lower()
        }
        done = subprocess.run(
            [sys.executable, "-m", "guestpass", *arguments],
            input=input,
            capture_output=True,
            encoding="utf-8",
            timeout=COMMAND_SECONDS,
            env={**clean, **(env or {})},
            cwd=cwd,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    return run
