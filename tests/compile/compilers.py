"""What the tests ask of a compiler of GPU code; nvrtc.py and hip.py have them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Protocol

from .usage import Usage

#: Names and values as `-D` takes them.
Macros = Mapping[str, object]


class CompilerMissing(Exception):
    """A compiler is not installed; the message says how to install it."""


class CompileError(Exception):
    """The message is what the compiler says."""


class Compiler(Protocol):
    """Compiles for several architectures; any thread may use it."""

    #: With what else has a say in the figures of a kernel.
    version: str

    def compile(self, source: str, macros: Macros, arch: str) -> list[Usage]:
        """What each kernel of `source` takes; warnings are errors. Raises CompileError."""
        ...


def wheel_file(package: str, name: str) -> Path:
    """A file of an installed wheel. Raises CompilerMissing."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise CompilerMissing(
            f"{package} is not installed; `make test EXTRAS=dev,compilers` brings it"
        ) from None
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise CompilerMissing(f"{package} {metadata.version(package)} has no {name}")
