"""Build compiled modules with AddressSanitizer and run a program against them.

    python tests/fuzz/asan.py frames session websocket -- tests/fuzz/tunnel.py --seconds 60

Builds each `_speedups/guestpass_speedups/NAME.pyx` with `gcc -fsanitize=address -fsanitize-coverage=trace-pc` into
`build/asan`, which nothing else uses, and runs the program with that folder first on its path, libasan preloaded, and
every object of Python in a malloc block of its own, so that each byte beyond one is seen. Its exit status is the
program's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "_speedups" / "guestpass_speedups"
FOLDER = ROOT / "build" / "asan"
PACKAGE = FOLDER / "lib" / "guestpass_speedups"
COVERAGE = FOLDER / "libcoverage.so"

SANITIZE = ["-fsanitize=address", "-fsanitize-address-use-after-scope", "-fno-omit-frame-pointer"]
# The rest as in setup.py; -O1 keeps what the source does, and line numbers true.
COMPILE = ["-O1", "-g", "-fno-strict-aliasing", "-fsanitize-coverage=trace-pc", *SANITIZE]

OPTIONS = {
    "detect_leaks": "0",  # the interpreter keeps what it allocates at its start; engine.py counts
    "detect_stack_use_after_return": "1",
    "allocator_may_return_null": "1",
    "quarantine_size_mb": "32",
    "abort_on_error": "0",
    "exitcode": "99",
}


def compiler() -> str:
    gcc = shutil.which(os.environ.get("CC", "gcc"))
    if gcc is None:
        sys.exit("fuzz-asan needs gcc (Debian: apt-get install gcc)")
    return gcc


def library(name: str) -> str:
    """Where gcc keeps one of its run-time libraries."""
    path = subprocess.run(
        [compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if "/" not in path:
        sys.exit(f"fuzz-asan needs {name} (Debian: apt-get install gcc libc6-dev)")
    return os.path.realpath(path)


def build(names: list[str]) -> None:
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension
    from setuptools.command.build_ext import build_ext

    PACKAGE.mkdir(parents=True, exist_ok=True)
    shutil.copy(SOURCES / "__init__.py", PACKAGE)
    os.chdir(ROOT)
    os.environ.pop("CFLAGS", None)
    extensions = cythonize(
        [
            Extension(
                f"guestpass_speedups.{name}",
                [f"_speedups/guestpass_speedups/{name}.pyx"],
                extra_compile_args=COMPILE,
                extra_link_args=["-fsanitize=address"],
            )
            for name in names
        ],
        build_dir="build/asan/cython",
        include_path=["_speedups"],
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
        },
        quiet=True,
    )
    command = build_ext(Distribution({"ext_modules": extensions}))
    command.build_lib = str(FOLDER / "lib")
    command.build_temp = str(FOLDER / "temp")
    command.ensure_finalized()
    command.run()
    subprocess.run(
        [compiler(), "-O2", "-shared", "-fPIC", "-o", COVERAGE, ROOT / "tests" / "fuzz" / "coverage.c"],
        check=True,
    )


def environment() -> dict[str, str]:
    path = [str(FOLDER / "lib"), str(ROOT / "tests")]
    return {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {COVERAGE}",
        "ASAN_OPTIONS": ":".join(f"{name}={value}" for name, value in OPTIONS.items()),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def main() -> int:
    names, _, program = " ".join(sys.argv[1:]).partition(" -- ")
    if not names.split() or not program.split():
        sys.exit(__doc__)
    build(names.split())
    return subprocess.run([sys.executable, *program.split()], cwd=ROOT, env=environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
