"""Packages of npm that tests use, each set installed once into build/npm from a lock file under tests/."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALL_SECONDS = 300


def installed(source: Path, package: str, what_for: str) -> Path:
    """The folder with what `source`, a folder with package.json and its lock file, asks for; `package` is one of it.
    AssertionError with the next step."""
    files = [source / name for name in ("package.json", "package-lock.json")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in reversed(files))).hexdigest()[:16]
    folder = ROOT / "build" / "npm" / digest
    if not (folder / "node_modules" / package).exists():
        npm = shutil.which("npm")
        assert npm, f"{what_for}: apt-get install nodejs npm"
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, folder)
        done = subprocess.run(
            [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
        )
        assert done.returncode == 0, f"npm ci failed: {done.stderr[-2000:]}"
    return folder
