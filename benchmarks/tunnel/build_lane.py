"""Compiles lane.pyx into a folder of your choice: python build_lane.py FOLDER"""

from __future__ import annotations

import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Distribution, Extension

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "_speedups"


def build(folder: Path) -> None:
    """Nothing is done when it is newer than its source and the C interfaces that it includes."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in (HERE / "lane.pyx", *SOURCES.glob("*/*.pxd")))
    if any(made.stat().st_mtime > newest for made in folder.glob("lane.*.so")):
        return
    extension = Extension(
        "lane", [str(HERE / "lane.pyx")], extra_compile_args=["-O3", "-fno-strict-aliasing"]
    )
    modules = cythonize(
        [extension],
        build_dir=str(folder / "c"),
        include_path=[str(SOURCES)],
        compiler_directives={"language_level": "3", "boundscheck": False, "wraparound": False},
        force=True,
        quiet=True,
    )
    distribution = Distribution({"name": "lane", "ext_modules": modules})
    command = distribution.get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(folder), str(folder / "temp")
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    build(Path(sys.argv[1]))
