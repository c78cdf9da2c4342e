"""Versions: Python, the kernel, moeshm with its compiled ring, and the packages around it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path
from typing import NamedTuple

from .finding import Finding, describe


class Package(NamedTuple):
    """A package that moeshm uses, the least version that works, and how to get it."""

    name: str
    minimum: str
    remedy: str
    is_essential: bool = False
    #: CuPy is one package under many names.
    distributions: tuple[str, ...] = ()


_TRANSFORMERS = "pip install 'moeshm[transformers]'; only models of transformers need it"

PACKAGES = (
    Package("numpy", "1.26", "pip install 'numpy>=1.26'", is_essential=True),
    Package("msgspec", "0.18", "pip install 'msgspec>=0.18'", is_essential=True),
    Package("threadpoolctl", "3.5", "pip install 'threadpoolctl>=3.5'", is_essential=True),
    Package("posix_ipc", "1.1", "pip install 'posix_ipc>=1.1'", is_essential=True),
    Package("safetensors", "0.4.3", "pip install 'safetensors>=0.4.3'", is_essential=True),
    Package(
        "cupy",
        "14",
        "pip install 'moeshm[cuda13]', or [cuda12] or [rocm]; only GPUs need it",
        distributions=("cupy-cuda13x", "cupy-cuda12x", "cupy-rocm-7-0", "cupy"),
    ),
    Package("torch", "2.4", _TRANSFORMERS),
    Package("transformers", "5", _TRANSFORMERS),
)


def check_python() -> Finding:
    """The interpreter."""
    version = platform.python_version()
    if _numbers(version)[:2] < [3, 10]:
        return Finding("python", "missing", version, "moeshm needs Python 3.10 or newer")
    return Finding("python", "ok", f"{version} ({platform.python_implementation()})")


def check_moeshm() -> Finding:
    """moeshm itself, as it is installed."""
    version = _version_of("moeshm")
    if version is None:
        return Finding("moeshm", "degraded", "a source tree, not installed", "pip install .")
    return Finding("moeshm", "ok", version)


def check_extension() -> Finding:
    """The compiled ring."""
    try:
        from .. import _ring
    except ImportError as error:
        return Finding(
            "extension",
            "missing",
            f"extension not built ({describe(error)})",
            "pip install . (in a source tree: python setup.py build_ext --inplace)",
        )
    return Finding("extension", "ok", Path(str(_ring.__file__)).name)


def check_kernel() -> Finding:
    """The running kernel; pidfd_open is the newest call that moeshm makes."""
    release = platform.release()
    if platform.system() != "Linux":
        return Finding("kernel", "missing", platform.platform(), "moeshm needs Linux")
    value = f"Linux {release} ({platform.machine()})"
    if _numbers(release)[:2] < [5, 3]:
        return Finding("kernel", "degraded", value, "Linux 5.3 or newer has pidfd_open")
    return Finding("kernel", "ok", value)


def check_package(package: Package) -> Finding:
    """The version of a package, against the least that moeshm works with."""
    for distribution in package.distributions or (package.name,):
        version = _version_of(distribution)
        if version is not None:
            break
    else:
        if importlib.util.find_spec(package.name) is not None:
            return Finding(package.name, "ok", "present, of unknown version")
        return Finding(package.name, "missing", "not installed", package.remedy)
    value = version if distribution == package.name else f"{version} ({distribution})"
    if _numbers(version) < _numbers(package.minimum):
        remedy = f"pip install --upgrade '{distribution}>={package.minimum}'"
        return Finding(package.name, "degraded", value, remedy)
    return Finding(package.name, "ok", value)


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    """`"2.13.0+cpu"` as `[2, 13, 0]`."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in leading[0].split(".")] if leading else []
