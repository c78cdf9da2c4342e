"""The files that the model is held against, and their lines by method."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = Path(__file__).with_name("ring.pml")
ATOMICS = ROOT / "moeshm/_atomics.h"

_FUNCTION = re.compile(r"^(?:    )?(?:cdef|cpdef|def) (?!class\b).*?(\w+)\((?!.*\bcimport\b)")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


def lines_of(file: str) -> list[tuple[str, int, str]]:
    """Every line of code of every method and function: its name, the line's number, its text."""
    name = ""
    lines = []
    for number, text in enumerate((ROOT / file).read_text().splitlines(), 1):
        if match := _FUNCTION.match(text):
            name = match[1]
        elif text and not text.startswith((" ", ")")):
            name = ""
        if not text.lstrip().startswith("#"):
            lines.append((name, number, text))
    return lines


def code_of(path: Path) -> str:
    """C without its comments."""
    return _COMMENT.sub("", path.read_text())
