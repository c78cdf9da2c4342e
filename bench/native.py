"""Builds the C programs on demand, into a cache keyed by what they are made of."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from moeshm.errors import UnsupportedPlatform

FLAGS = ("-std=gnu11", "-O2")
_SOURCES = Path(__file__).parent
_HEADERS = ("bench.h",)


def cache_folder() -> Path:
    """Where built programs are kept: $XDG_CACHE_HOME/moeshm, by default ~/.cache/moeshm."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moeshm"


def find_compiler() -> str:
    """The path of `cc`; UnsupportedPlatform when there is none."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise UnsupportedPlatform(
            "no C compiler: `cc` is not on PATH; install one (Debian, Ubuntu: apt install gcc)"
        )
    return compiler


def compiler_version() -> str | None:
    """The first line of `cc --version`, or None without a compiler."""
    try:
        compiler = find_compiler()
    except UnsupportedPlatform:
        return None
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return next(iter(done.stdout.splitlines()), None)


def build(program: str) -> Path:
    """The built `program` (the stem of a .c file here); compiled unless the cache has it.

    UnsupportedPlatform when there is no compiler, or with the compiler's words when it fails.
    """
    compiler = find_compiler()
    sources = [_SOURCES / f"{program}.c", *(_SOURCES / header for header in _HEADERS)]
    digest = hashlib.sha256("\0".join((compiler, *FLAGS)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    target = cache_folder() / f"bench-{program}-{digest.hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, sources[0], target)
    return target


def _compile(compiler: str, source: Path, target: Path) -> None:
    # Renamed into place: another run must never start a half-written program.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        output = Path(folder) / target.name
        done = subprocess.run(
            [compiler, *FLAGS, str(source), "-o", str(output)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise UnsupportedPlatform(f"{compiler} cannot build {source.name}: {done.stderr}")
        output.replace(target)
