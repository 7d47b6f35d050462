"""`guestpass version`."""

from __future__ import annotations

import argparse
import platform
from typing import TYPE_CHECKING

from guestpass import __version__
from guestpass.cli.output import Output
from guestpass.cli.parser import add_command

if TYPE_CHECKING:
    from guestpass.cli.parser import Commands


def add(commands: Commands) -> None:
    add_command(commands, "version", "print the version", example="guestpass version", run=run)


def run(args: argparse.Namespace, output: Output) -> int:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    output.result({"version": __version__, "python": python}, f"guestpass {__version__} ({python})")
    return 0
