"""One line of the report, and the words that checks share."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

Status = Literal["ok", "degraded", "missing"]


class Finding(msgspec.Struct, frozen=True):
    """What one check found.

    `ok`: works. `degraded`: works with a loss that `value` or `remedy` names. `missing`: absent,
    or does not work here.
    """

    name: str
    status: Status
    value: str
    remedy: str = ""


def describe(error: BaseException) -> str:
    """The error in one line, with its kind where the text alone would say little."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read(path: str) -> str | None:
    """The text of a file, or None where it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return None


def size(size_bytes: int) -> str:
    """A number of bytes for people: `"1.5 GiB"`."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} bytes"
