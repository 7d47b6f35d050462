"""Only the compiled extensions; everything else is declared in pyproject.toml."""

from Cython.Build import cythonize
from setuptools import Extension, setup

MODULES = ("frames", "http1", "relay", "session", "splice", "upstream", "websocket", "wire")

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"guestpass_speedups.{name}",
                [f"_speedups/guestpass_speedups/{name}.pyx"],
                extra_compile_args=["-O3", "-fno-strict-aliasing"],
            )
            for name in MODULES
        ],
        build_dir="build/cython",
        include_path=["_speedups"],
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "auto_pickle": False,  # nothing here can leave its process
        },
    )
)
