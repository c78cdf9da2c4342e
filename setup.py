"""Builds the Cython extension; everything else is in pyproject.toml.

MOESHM_SANITIZE=address|thread|undefined builds it with that sanitizer.
"""

import os

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup

SANITIZERS = ("address", "thread", "undefined")

compile_args = ["-std=gnu11", "-O3", "-g1", "-Wall", "-Wextra", "-Wno-unused-parameter"]
link_args: list[str] = []

sanitizer = os.environ.get("MOESHM_SANITIZE", "")
if sanitizer:
    if sanitizer not in SANITIZERS:
        raise SystemExit(f"MOESHM_SANITIZE={sanitizer!r}; choose one of {', '.join(SANITIZERS)}")
    flags = [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer"]
    if sanitizer == "undefined":
        flags.append("-fno-sanitize-recover=undefined")
    compile_args += ["-O1", *flags]
    link_args += flags

setup(
    ext_modules=cythonize(
        [
            Extension(
                "moeshm._ring",
                ["moeshm/_ring.pyx"],
                depends=["moeshm/_atomics.h", "moeshm/_ring.pxd"],
                include_dirs=["moeshm", np.get_include()],
                define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
                extra_compile_args=compile_args,
                extra_link_args=link_args,
            )
        ],
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "embedsignature": False,
        },
    )
)
