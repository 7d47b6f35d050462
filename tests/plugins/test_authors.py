"""What an author of plugins does, as an outsider: in an environment that has Guestpass installed, and nothing of this
repository on its path.

The short form makes and checks a plugin of every kind, and runs all of `make check` for one; the long form runs that
for each, and pyright besides.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from support.scoreboard import LONG, long_only, row

import guestpass
import guestpass_plugins
import guestpass_speedups
from guestpass.cli.plugin_new import KINDS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PACKAGES = ("guestpass-ldap", "guestpass-latency")


@pytest.fixture(scope="module")
def outsider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment; its python."""
    folder = tmp_path_factory.mktemp("outsider") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    # What is installed where the tests run is installed here: type checkers read the paths, Python the last lines.
    ours = [Path(p) for p in (*site.getsitepackages(), sysconfig.get_path("purelib"))]
    roots = [
        Path(m.__file__).parents[1] for m in (guestpass, guestpass_speedups, guestpass_plugins) if m.__file__
    ]
    tools = Path(pytest.__file__).parents[1]
    parts = [str(path) for path in dict.fromkeys((*roots, *ours, tools))]
    lines = [*parts, *(f"import site; site.addsitedir({p!r})" for p in parts)]
    (lib,) = folder.glob("lib/python3*/site-packages")
    (lib / "guestpass-of-the-tests.pth").write_text("\n".join(lines) + "\n")
    return python


def run(python: Path, *args: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    env = {
        "PATH": f"{python.parent}:{os.environ.get('PATH', '')}:/usr/sbin",
        "HOME": str(cwd),
        "LANG": "C.UTF-8",
    }
    done = subprocess.run(args, cwd=cwd, env=env, capture_output=True, text=True, timeout=110)
    assert not ok or done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done


def guestpass_says(python: Path, *args: str, cwd: Path, ok: bool = True) -> Any:
    done = run(python, str(python), "-m", "guestpass", *args, "--json", cwd=cwd, ok=ok)
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_of_each_kind_fits(kind: str, tmp_path: Path, outsider: Path) -> None:
    made = guestpass_says(outsider, "plugin", "new", "demo", "--kind", kind, cwd=tmp_path)
    assert all((tmp_path / path).is_file() for path in made["files"])
    found = guestpass_says(outsider, "plugin", "check", "demo", cwd=tmp_path)
    assert found["ok"], found
    assert found["kind"] == kind
    assert [step["step"] for step in found["steps"]] == [
        "load",
        "class",
        "docstring",
        "hooks",
        "settings",
        "run",
    ]
    if kind == "request-filter" or LONG:
        run(outsider, "make", "check", f"PYTHON={outsider}", cwd=tmp_path / "demo")
        row(
            f"plugin new --kind {kind}",
            "new, check, and its own make check: ruff, mypy, pytest",
            "passes",
            "passes",
            ok=True,
        )


@long_only
def test_pyright_agrees(tmp_path: Path, outsider: Path) -> None:
    """With the plugins of every kind, as `plugin new` writes them, and the examples."""
    assert shutil.which("node"), "pyright needs node: apt-get install nodejs"
    for kind in KINDS:
        guestpass_says(outsider, "plugin", "new", f"a-{kind}", "--kind", kind, cwd=tmp_path)
    for name in PACKAGES:
        shutil.copytree(EXAMPLES / name / "src", tmp_path / name / "src")
    folders = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/src"))
    assert len(folders) == len(KINDS) + len(PACKAGES)
    settings = {
        "include": folders,
        "typeCheckingMode": "standard",
        "pythonVersion": "3.11",
        "reportMissingModuleSource": False,
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", str(outsider), "-p", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout
    row(
        "types of plugins",
        f"pyright over {len(folders)} packages of plugins",
        "no error",
        "no error",
        ok=True,
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_the_examples_are_installed_and_pass_their_tests(
    package: str, tmp_path: Path, outsider: Path
) -> None:
    copy = tmp_path / package
    shutil.copytree(
        EXAMPLES / package,
        copy,
        ignore=shutil.ignore_patterns("__pycache__", ".*_cache", "*.egg-info", "build"),
    )
    (lib,) = outsider.parents[1].glob("lib/python3*/site-packages")
    flags = ["--no-build-isolation"] if _has_setuptools() else []
    pip = [
        "-m",
        "pip",
        "-q",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
        *flags,
        "--target",
        str(lib),
    ]
    subprocess.run([sys.executable, *pip, str(copy)], check=True, timeout=110)
    name = {"guestpass-ldap": "ldap", "guestpass-latency": "latency"}[package]
    listed = guestpass_says(outsider, "plugin", "list", cwd=tmp_path)
    assert name in [plugin["name"] for plugin in listed["plugins"]]
    shown = guestpass_says(outsider, "plugin", "show", name, cwd=tmp_path)
    assert shown["package"] == package
    if name == "latency":
        assert guestpass_says(outsider, "plugin", "check", name, cwd=tmp_path)["ok"]
    else:
        settings = tmp_path / "ldap.toml"
        settings.write_text('url = "ldap://127.0.0.1:1"\nbase = "dc=example,dc=org"\ninsecure = true\n')
        found = guestpass_says(
            outsider, "plugin", "check", name, "--settings", str(settings), cwd=tmp_path, ok=False
        )
        assert [step["ok"] for step in found["steps"]] == [True] * 6, found
    shutil.rmtree(copy / "src")  # what is tested is what was installed
    run(outsider, str(outsider), "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=copy)
    row(f"example {package}", "installed by pip and tested by its own tests", "passes", "passes", ok=True)


def _has_setuptools() -> bool:
    try:
        from importlib.metadata import version

        return int(version("setuptools").partition(".")[0]) >= 77
    except Exception:
        return False


# ── what the check finds ─────────────────────────────────────────────────────────────────────────────────────────

WRONG = {
    "a syntax error": ("class X(", "cannot be read"),
    "no plugin": ("class X: pass", "no plugin classes"),
    "a missing hook": ("class X(Revoker):\n    'Doc.'", "lacks check"),
    "another parameter": (
        "class X(Revoker):\n    'Doc.'\n    def check(self, share): return None",
        "check(self, share) should be check(self, share, session)",
    ),
    "another type": (
        "class X(Revoker):\n    'Doc.'\n    def check(self, share: int, session: Session) -> None: return None",
        "share is Share, not int",
    ),
    "a mistyped hook": (
        "class X(RequestFilter):\n    'Doc.'\n    def compile(self, share, session): return None\n"
        "    def on_requests(self, request): return None",
        "did you mean on_request?",
    ),
    "no docstring": (
        "class X(RequestFilter):\n    def compile(self, share, session): return None",
        "has none",
    ),
    "a required setting": (
        "class X(RequestFilter):\n    'Doc.'\n    class Config(PluginConfig):\n        words: list[str]\n"
        "    def compile(self, share, session): return None",
        "it needs words",
    ),
    "a hook that raises": (
        "class X(RequestFilter):\n    'Doc.'\n    def compile(self, share, session): return {}['x']",
        "KeyError",
    ),
    "a start that raises": (
        "class X(RequestFilter):\n    'Doc.'\n    def compile(self, share, session): return None\n"
        "    async def start(self, host): raise OSError('no route')",
        "cannot start: OSError: no route",
    ),
    "another version": (
        "class X(RequestFilter):\n    api_version = 9\n    def compile(self, *a): pass",
        "written for version 9",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from guestpass.cli import main

    tmp_path.chmod(0o755)
    source, said = WRONG[case]
    file = tmp_path / "x.py"
    file.write_text(f"from guestpass.plugin import *\n\n{source}\n")
    file.chmod(0o644)
    assert main(["plugin", "check", str(file), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert any(said in step["detail"] for step in found["steps"] if not step["ok"]), found["steps"]


def test_new_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from guestpass.cli import main

    (tmp_path / "demo").mkdir()
    for name, said in (("demo", "exists already"), ("Demo!", "cannot name a package")):
        assert main(["plugin", "new", name, "--kind", "observer", "--in", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
