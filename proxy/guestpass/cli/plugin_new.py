"""`guestpass plugin new`: a package of its own, with a plugin that works, its test, and a `make check` that passes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from guestpass.cli.output import Output
from guestpass.errors import UsageError

# As in PyPI's names, and what Python can import with "-" as "_".
NAME = re.compile(r"[a-z](?:[a-z0-9-]{0,38}[a-z0-9])?")

# kind → the entry-point group and section of edge.toml, and how a sentence calls it.
KINDS: Mapping[str, tuple[str, str, str]] = {
    "authenticator": ("guestpass.authenticate", "[[authenticate]]", "An Authenticator"),
    "revoker": ("guestpass.revoke", "[[revoke]]", "A Revoker"),
    "backend-chooser": ("guestpass.choose", "[choose]", "A BackendChooser"),
    "request-filter": ("guestpass.filter", "[[filter]]", "A RequestFilter"),
    "notifier": ("guestpass.notify", "[[notify]]", "A Notifier"),
    "observer": ("guestpass.observe", "[[observe]]", "An Observer"),
}


def new(args: argparse.Namespace, output: Output) -> int:
    name, kind = args.name, args.kind
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a package",
            hint='Use 1 to 40 of a-z, 0-9 and "-", beginning with a letter: office-hours.',
        )
    folder = Path(args.folder) / name
    if folder.exists():
        raise UsageError(f"{folder} exists already", hint="Choose another name, or another folder with --in.")
    written = write(folder, name, kind)
    data = {"folder": str(folder), "kind": kind, "files": [str(path) for path in written]}
    output.result(
        data,
        *(f"{path}" for path in written),
        "",
        f"Next: guestpass plugin check {folder}, then edit {written[0]}.",
    )
    return 0


def write(folder: Path, name: str, kind: str) -> list[Path]:
    """Writes the package; returns its files, the plugin first."""
    snake = name.replace("-", "_")
    group, section, article = KINDS[kind]
    words = {
        "DEMO_PACKAGE": f"guestpass-{name}",
        "DEMO_ARTICLE": article,
        "DEMO_GROUP": group,
        "DEMO_SECTION": section,
        "DEMO_NAME": name,
        "demo_module": f"guestpass_{snake}",
        "DemoClass": "".join(part.capitalize() for part in name.split("-")),
    }
    files = {
        f"src/guestpass_{snake}/__init__.py": f"{kind}.py.in",
        f"src/guestpass_{snake}/py.typed": None,
        f"tests/test_{snake}.py": f"test_{kind}.py.in",
        "pyproject.toml": "pyproject.toml.in",
        "Makefile": "Makefile.in",
        "README.md": "README.md.in",
    }
    written = []
    for target, source in files.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if source is None else filled(source, words), "utf-8")
        written.append(path)
    return written


def filled(source: str, words: Mapping[str, str]) -> str:
    """A file of the template with these words in place."""
    text = (resources.files("guestpass.cli") / "template" / source).read_text("utf-8")
    for word, value in words.items():
        text = text.replace(word, value)
    return text
