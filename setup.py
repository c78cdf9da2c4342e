"""Builds every .pyx in moeshm/ and finds the packages; everything else is in pyproject.toml.

MOESHM_SANITIZE=address|thread|undefined builds with that sanitizer, or with several, like
address,undefined.
MOESHM_CRASHPOINTS=1 builds with the crash points of moeshm/_crash_points.h, for tests: only the
modules that have any.
ONLY_MODULES="_ring _end" builds only those, by name.
"""

import os
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup

SANITIZERS = ("address", "thread", "undefined")

package = Path("moeshm")
sources = sorted(package.rglob("*.pyx"))
headers = sorted(str(path) for pattern in ("*.h", "*.pxd") for path in package.glob(pattern))
compile_args = ["-std=gnu11", "-O3", "-g1", "-Wall", "-Wextra", "-Wno-unused-parameter"]
link_args: list[str] = []
macros = [("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")]

sanitizer = os.environ.get("MOESHM_SANITIZE", "")
if sanitizer:
    if not set(sanitizer.split(",")) <= set(SANITIZERS):
        raise SystemExit(f"MOESHM_SANITIZE={sanitizer!r}; choose of {', '.join(SANITIZERS)}")
    flags = [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer"]
    if "undefined" in sanitizer:
        flags.append("-fno-sanitize-recover=undefined")
    compile_args += ["-O1", *flags]
    link_args += flags

crash_points = os.environ.get("MOESHM_CRASHPOINTS", "")
if crash_points:
    if crash_points != "1":
        raise SystemExit(f"MOESHM_CRASHPOINTS={crash_points!r}; choose 1, or leave it out")
    macros.append(("MOESHM_CRASHPOINTS", "1"))
    sources = [source for source in sources if "_crash_points" in source.read_text()]

if names := set(os.environ.get("ONLY_MODULES", "").split()):
    if unknown := names - {source.stem for source in sources}:
        known = ", ".join(source.stem for source in sources)
        raise SystemExit(f"ONLY_MODULES has {', '.join(sorted(unknown))}; choose of {known}")
    sources = [source for source in sources if source.stem in names]

setup(
    packages=[
        *find_packages(include=["moeshm", "moeshm.*"]),
        # Folders beside the package; pyproject.toml says which.
        "moeshm.kernels",
        "moeshm.bench",
    ],
    ext_modules=cythonize(
        [
            Extension(
                ".".join(source.with_suffix("").parts),
                [str(source)],
                depends=headers,
                include_dirs=["moeshm", np.get_include()],
                define_macros=macros,
                extra_compile_args=compile_args,
                extra_link_args=link_args,
            )
            for source in sources
        ],
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "embedsignature": False,
        },
    ),
    # A build is judged up to date by its sources alone, and the flags are not among them.
    options={
        "build_ext": {"force": bool(sanitizer or crash_points), "parallel": os.cpu_count() or 1}
    },
)
