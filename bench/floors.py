"""What this machine allows at best (floors.c), measured as one more contender among the others."""

from __future__ import annotations

from collections.abc import Sequence

from . import harness
from .harness import Job, Samples
from .schema import Floor

#: A word and what shares its line: the floor of payloads up to this size.
_CACHE_LINE_BYTES = 64
_WORD_BYTES = 4
_JOB = "floors"


def job(sizes: Sequence[int]) -> Job:
    """The floors as one more job among the contenders."""
    return Job(_JOB, harness.c_program("floors"), [cell for cell, *_ in _cells(sizes)])


def _cells(sizes: Sequence[int]) -> list[tuple[str, str, int]]:
    named = [
        ("cache_line_ping_pong", _CACHE_LINE_BYTES),
        ("futex_ping_pong", _WORD_BYTES),
        *(("spin_echo", size) for size in sizes),
        *(("memcpy", size) for size in sizes),
    ]
    return [(f"{floor}:{size}", floor, size) for floor, size in named]


def rows(sizes: Sequence[int], samples: Samples) -> list[Floor]:
    """What the floors' samples say."""
    found = []
    for cell, floor, size in _cells(sizes):
        row = Floor(floor=floor, size_bytes=size, **harness.summarise(samples[_JOB, cell]))
        if floor == "memcpy":
            row.gb_per_s = harness.gb_per_s(size, row.p50_us)
        elif floor == "spin_echo":
            row.gb_per_s = harness.gb_per_s(2 * size, row.p50_us)
        found.append(row)
    return found


def find(floor_rows: Sequence[Floor], name: str, size: int) -> Floor | None:
    """The floor of that name and size."""
    return next((row for row in floor_rows if (row.floor, row.size_bytes) == (name, size)), None)


def of_round_trip(floor_rows: Sequence[Floor], size: int) -> Floor | None:
    """What a round trip is held against: a cache line's for payloads that fit one."""
    if size <= _CACHE_LINE_BYTES:
        return find(floor_rows, "cache_line_ping_pong", _CACHE_LINE_BYTES)
    return find(floor_rows, "spin_echo", size)
