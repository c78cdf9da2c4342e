"""Interrupts of the main thread, at a chosen moment or at any: for tests that try every one."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
from collections.abc import Callable, Iterator
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


def interrupt_often(
    n_interrupts: int, go_on: Callable[[], object], after: Callable[[], object] = lambda: None
) -> None:
    """Call `go_on` again and again, until signals came so often in its midst; `after` each."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    n_left = n_interrupts
    # What a handler raises as garbage is collected, where some have a look, nobody hears.
    gc.disable()
    timeout_of_the_test = signal.getitimer(signal.ITIMER_REAL)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while n_left > 0:
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-4)
                # Not for ever: nor does anybody hear it in a finalizer.
                for _ in range(1000):
                    go_on()
            except KeyboardInterrupt:
                n_left -= 1
                after()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timeout_of_the_test)
        gc.enable()
