"""A crash plan: which point fires, and how often each was reached; `moeshm/_crash_points.h`.

It lies in memory that a test shares with the processes it forks, so that the counts outlive them.
"""

from __future__ import annotations

import ctypes
import mmap

from moeshm import _end, _ring

#: As in the header.
MAX_POINTS = 256

_LIBRARIES = [ctypes.CDLL(module.__file__) for module in (_end, _ring)]
#: False in a normal build.
IS_BUILT_IN = hasattr(_LIBRARIES[0], "moeshm_crash_plan")
WHY_NOT = "built without crash points; tools/crash_matrix.sh builds with them and runs this"


class _Layout(ctypes.Structure):
    _fields_ = (
        ("point", ctypes.c_int32),
        ("signal", ctypes.c_int32),
        ("nth", ctypes.c_uint64),
        ("notify_fd", ctypes.c_int32),
        ("has_fired", ctypes.c_int32),
        ("counts", ctypes.c_uint64 * MAX_POINTS),
    )


class Plan:
    """Made before the processes that follow it are forked."""

    def __init__(self) -> None:
        self._layout = _Layout.from_buffer(mmap.mmap(-1, ctypes.sizeof(_Layout)))
        self.count_only()

    def count_only(self) -> None:
        """No point fires; counts begin anew."""
        ctypes.memset(ctypes.byref(self._layout), 0, ctypes.sizeof(_Layout))
        self._layout.point = -1

    def arm(self, point: int, nth: int, signal: int, notify_fd: int) -> None:
        """Let the point fire at its n-th reaching, from 1 on: a byte to the fd, then the signal to
        the thread that is there."""
        self.count_only()
        self._layout.signal, self._layout.nth = signal, nth
        self._layout.notify_fd = notify_fd
        self._layout.point = point

    def give_up(self) -> None:
        """It shall not fire any more, if it has not."""
        self._layout.point = -1

    @property
    def has_fired(self) -> bool:
        """True once it did."""
        return bool(self._layout.has_fired)

    def count(self, point: int) -> int:
        """How often it was reached."""
        return int(self._layout.counts[point])

    def follow(self) -> None:
        """Let this process follow it."""
        for library in _LIBRARIES:
            pointer = ctypes.c_void_p.in_dll(library, "moeshm_crash_plan")
            pointer.value = ctypes.addressof(self._layout)


def reach(point: int) -> None:
    """Pass a point of the Python layers."""
    _LIBRARIES[0].moeshm_crash_reach(point)


def native_steps() -> list[str]:
    """What the header names, in its order: a producer's points, and once more a consumer's."""
    names: list[str] = []
    pointers = (ctypes.c_char_p * MAX_POINTS).in_dll(_LIBRARIES[0], "moeshm_crash_steps")
    for name in pointers:
        if name is None:
            break
        names.append(name.decode())
    return [f"{role}.{name}" for role in ("producer", "consumer") for name in names]
