"""Runs a Promela model through SPIN and reads what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
#: Deeper than any run goes; a search that needs more is refused by `SearchError`.
_MAX_DEPTH = 20_000
_LIMIT_S = 150
_COMPILERS = "clang", "clang-19"
_ERROR = re.compile(r"^pan:\d+: (.*?) \(at depth \d+\)$", re.MULTILINE)
_UNREACHED = re.compile(r"^unreached in proctype (\w+)\n((?:\t.*\n)*)", re.MULTILINE)
_CLAIM = re.compile(r"assert\((\d+)\)")


class SearchError(Exception):
    """SPIN or the compiler failed, or the search was not complete."""


@dataclass(frozen=True)
class Verdict:
    """What an exhaustive search found."""

    #: "invalid end state", "non-progress cycle", "assertion violated ..."; None if nothing.
    error: str | None
    states: int
    #: Of a search without errors: by process, the numbers of `reached` in it that it came by.
    reached: dict[str, set[int]]


def why_none() -> str | None:
    """Why no model can run on this machine."""
    missing = [name for name in ("spin", _compiler()) if shutil.which(name) is None]
    return f"no {' and no '.join(missing)}; tools/install_compilers.sh has it" if missing else None


def check(model: str, defines: Sequence[str], folder: Path, *, progress: bool = False) -> Verdict:
    """Search all states of a model, in an empty folder.

    `progress` looks for executions without an end instead of an end that is none.
    Raises SearchError.
    """
    for file in FOLDER.glob("*.pml"):
        shutil.copy(file, folder)
    # -o3: a statement that is merged with the one before it is never said to be unreached.
    said = _run(folder, "spin", *(f"-D{each}" for each in defines), "-o3", "-a", model)
    if re.search("error|warning", said, re.IGNORECASE):
        raise SearchError(said)
    # Partial-order reduction does not know of `timeout`, which a SLICE waits for.
    options = ["-DNP" if progress else "-DSAFETY", *(["-DNOREDUCE"] if "SLICE" in defines else [])]
    # To optimise takes longer than what it saves, and so does to compress states.
    _run(folder, _compiler(), "-O0", "-w", *options, "-o", "pan", "pan.c")
    # A table for 2^20 states is quicker to make than the default, and others share its slots.
    said = _run(folder, "./pan", "-w20", f"-m{_MAX_DEPTH}", *(["-l"] if progress else []))
    compiled = _run(folder, "./pan", "-d", "-d")
    return _verdict(said, compiled, progress)


def _compiler() -> str:
    """clang, where it is: it takes half of gcc's time, which is most of what a search takes."""
    return next((name for name in _COMPILERS if shutil.which(name)), "cc")


def _verdict(said: str, compiled: str, progress: bool) -> Verdict:
    if "max search depth too small" in said or "Full statespace search" not in said:
        raise SearchError(said)
    looked_for = ["assertion violations"] + (
        ["non-progress cycles"] if progress else ["invalid end states"]
    )
    # The rest of pan's list is of what it was told to leave out.
    for what in looked_for:
        if not re.search(rf"^\t{what}\s+\+", said, re.MULTILINE):
            raise SearchError(said)
    states = re.search(r"(\d+) states, stored", said)
    errors = re.search(r"errors: (\d+)$", said, re.MULTILINE)
    if states is None or errors is None:
        raise SearchError(said)
    found = _ERROR.search(said)
    if (errors[1] == "0") != (found is None):
        raise SearchError(said)
    if found:
        return Verdict(found[1], int(states[1]), {})
    if "Search not completed" in said:
        raise SearchError(said)
    return Verdict(None, int(states[1]), _reached(said, compiled))


def _reached(said: str, compiled: str) -> dict[str, set[int]]:
    missed = {name: Counter(_CLAIM.findall(text)) for name, text in _UNREACHED.findall(said)}
    reached: dict[str, set[int]] = {}
    for text in re.split(r"^STEP \d+ ", compiled, flags=re.MULTILINE)[1:]:
        name = text.split(maxsplit=1)[0]
        places = Counter(_CLAIM.findall(text)) - missed.get(name, Counter())
        reached[name] = {int(claim) for claim in places}
    return reached


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise SearchError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}")
    return done.stdout
