"""Which line of the ring each step of ring.pml stands for, and what the model leaves out."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from . import orders, source
from .source import MODEL

END = "moeshm/_end.pyx"
RING = "moeshm/_ring.pyx"

#: A switch of the model that breaks it.
MISTAKE = re.compile(r"\bBROKEN_[A-Z_]*[A-Z]\b")
_TAG = re.compile(r"/\* \[(\d+)\] \*/")


class Moved(Exception):
    """A step's line is no longer in its function; the message says what to look at."""


@dataclass(frozen=True)
class Step:
    """One step: the line of `function` that has `snippet`, the `nth` of those that have it."""

    number: int
    what: str
    file: str
    function: str
    snippet: str
    nth: int = 1

    def line(self) -> int:
        """Where it is now, from 1. Raises Moved."""
        found = _lines_with(self.file, self.function, self.snippet)
        if len(found) < self.nth:
            raise Moved(
                f"step {self.number} of tests/models/ring.pml ({self.what}): {self.file}, "
                f"{self.function} has no {self.snippet!r}. If the code says the same in other "
                "words, change tests/models/steps.py; if it does something else, the model first"
            )
        return found[self.nth - 1]

    def operation(self) -> str:
        """The function of _atomics.h that its line calls; empty for none."""
        line = self.line()
        (text,) = (text for _, number, text in source.lines_of(self.file) if number == line)
        found = [name for name in orders.orders() if f"{name}(" in text]
        return found[0] if found else ""


def _step(number: int, file: str, function: str, snippet: str, what: str, *, nth: int = 1) -> Step:
    return Step(number, what, file, function, snippet, nth)


STEPS = [
    _step(1, END, "_publish", "moeshm_exchange(self.own, word)", "publish: exchange the word"),
    _step(2, END, "_publish", "moeshm_futex_wake(self.own)", "wake, where it was armed"),
    _step(3, END, "_load_peer", "moeshm_load_acquire(self.peer)", "load the other's word"),
    _step(4, END, "_load_peer", "> self.area", "it moved on by no more than the area"),
    _step(5, END, "_wait_slice", "moeshm_load_acquire(self.peer)", "park: has it moved?"),
    _step(6, END, "_wait_slice", "load_acquire(self.peer_state)", "is the other end closed?"),
    _step(7, END, "_wait_slice", "moeshm_compare_exchange(", "arm"),
    _step(8, END, "_wait_slice", "load_acquire(self.peer_state)", "look again, armed", nth=2),
    _step(9, END, "_wait_slice", "load_acquire(self.own_state)", "closed by a thread of our own?"),
    _step(10, END, "_wait_slice", "moeshm_futex_wait(", "sleep while it is the armed word"),
    _step(11, END, "_wait_slice", "return CHANGED if", "has it moved now?"),
    _step(12, END, "_wait", "if self.is_closed:", "closed by a thread of our own, with the GIL"),
    _step(13, END, "_drain", "moeshm_load_acquire(self.peer)", "drain: a last look at the word"),
    _step(14, END, "_end", "moeshm_store_release(self.own_state, CLOSED)", "close: the state"),
    _step(15, END, "_end", "self._publish()", "the same position again"),
    _step(16, END, "_end", "moeshm_clear_bits(self.peer, ARMED)", "disarm a thread of our own"),
    _step(17, END, "_end", "moeshm_futex_wake(self.peer)", "wake a thread of our own"),
    _step(18, RING, "_check_peer", "self.seen & REBASED", "a consumer never rebases"),
    _step(19, RING, "_make_room", "== self.next_position", "rebase: only where it is empty"),
    _step(20, RING, "_make_room", "while ahead(", "room, by the position that was seen last"),
    _step(21, RING, "_make_room", "moeshm_load_relaxed(self.peer_state)", "a hint"),
    _step(22, RING, "_begin", "header.length = length", "write the header"),
    _step(23, RING, "write", "copy_parts(at, views, count)", "write the payload", nth=2),
    _step(24, END, "_hold", "self.next_offset += size", "move on in the area"),
    _step(25, END, "_finish", "self.published +=", "what is to be published"),
    _step(26, RING, "_has_record", "self._load_peer()", "look, where all that was seen is read"),
    _step(27, RING, "_has_record", "& REBASED", "follow a rebase"),
    _step(28, RING, "acquire", "memcpy(&header", "read the header"),
    _step(29, RING, "copy_to", "moeshm_copy(", "read the payload"),
    _step(30, RING, "_release", "self.ring._finish(self.slot)", "free"),
    _step(31, END, "_wait", "self._peer_is_dead()", "is the other process dead?"),
    _step(32, END, "_wait", "with nogil:", "without the GIL until the slice ends"),
]

#: Atomics that decide nothing between the two ends: each by file, function and snippet, and why.
LEFT_OUT = {
    (END, "peer_closed", "load_acquire(self.peer_state)"): "tells Python; decides nothing",
    (END, "counters", "load_relaxed(&self.sleeps)"): "a statistic",
    (END, "_wait_slice", "store_release(&self.sleeps,"): "a statistic",
    (END, "_drain", "load_acquire(self.peer_state)"): "only which of two errors is raised",
    (END, "_peer_identity", "load_acquire(&at.pid)"): "written once, before anybody waits",
    (END, "_peer_identity", "load_relaxed(&at.ticks)"): "written once, before anybody waits",
}


def tags() -> list[int]:
    """The numbers of the steps that the model has, as they come."""
    return [int(number) for number in _TAG.findall(MODEL.read_text())]


def unaccounted() -> list[str]:
    """Lines of the ring with more atomics than steps that stand for one and entries of LEFT_OUT.
    Raises Moved."""
    known = Counter((step.file, step.line()) for step in STEPS if step.operation())
    for file, function, snippet in LEFT_OUT:
        found = _lines_with(file, function, snippet)
        if len(found) != 1:
            raise Moved(
                f"LEFT_OUT has {snippet!r}, which {file}, {function} has {len(found)} times"
            )
        known[file, found[0]] += 1
    atomic = re.compile(rf"\b(?:{'|'.join(orders.orders())})\(")
    return [
        f"{file}:{number}: {text.strip()}"
        for file in (END, RING)
        for _, number, text in source.lines_of(file)
        if len(atomic.findall(text)) != known[file, number]
    ]


def _lines_with(file: str, function: str, snippet: str) -> list[int]:
    return [
        number
        for name, number, text in source.lines_of(file)
        if name == function and snippet in text
    ]
