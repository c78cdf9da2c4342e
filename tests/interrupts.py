"""Interrupts at a chosen moment of the main thread, for tests that try every moment there is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def interrupted_at(moment: int, files: tuple[str, ...]) -> Iterator[None]:
    """At that one of the moments, in these files, at which handlers of signals may run: a function
    is entered, or one that is called there has returned."""
    n_left = moment

    def look(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal n_left
        code, caller = frame.f_code, frame.f_back and frame.f_back.f_code
        if (event in ("call", "c_return") and code.co_filename in files) or (
            event == "return" and caller and caller.co_filename in files
        ):
            # What a finalizer raises nobody hears.
            if "__del__" in (code.co_name, caller and caller.co_name):
                return
            n_left -= 1
            if n_left < 0:
                raise KeyboardInterrupt  # once: the interpreter calls it no more

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)
