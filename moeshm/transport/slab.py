"""A slab: memory that both sides use for the arrays of calls, and who has which part of it.

Its flags, and its data where that is pinned memory of the host, are one segment, a sealed memfd
that both sides map. Device memory as data belongs to the worker's GPU, and is not in it.
docs/protocol.md draws it.
"""

from __future__ import annotations

import collections
import mmap
import os
from typing import NamedTuple

from .. import segment
from ..errors import SegmentError

#: Calls that may be on their way, each with a slot of flags.
SLOTS = 32
SLOT_BYTES = 512
FLAGS_BYTES = SLOTS * SLOT_BYTES
#: Of the flags in a slot: where each is, 32 bits wide, far enough apart that no two devices share
#: what they fetch.
GIVEN, DONE, REFUSED, TAKEN = 0, 128, 256, 384
#: In `refused`: a reply says why; it was sent before.
TOLD = 0xFFFFFFFF
#: Arrays in a slab start at multiples of it.
ALIGNMENT = 256
#: Of device memory: what drivers allocate, and export, is made of these.
PAGE_BYTES = 2 << 20
_SEQUENCES = 1 << 32
_UP = ALIGNMENT - 1


class Places(NamedTuple):
    """Where a call's arrays are in a slab's data, and the number of its slot."""

    slot: int
    hidden_states: int
    topk_ids: int
    topk_weights: int
    out: int


class Segment:
    """The mapping of a slab's segment; it stays mapped while views of `memory` are in use."""

    def __init__(self, fd: int) -> None:
        try:
            mapping = mmap.mmap(fd, os.fstat(fd).st_size)
        except OSError as error:
            raise SegmentError(error.errno, f"a slab cannot be mapped: {error.strerror}") from error
        #: The flags, then the data if it is pinned.
        self.memory = memoryview(mapping)

    @classmethod
    def create(cls, pinned_bytes: int) -> tuple[Segment, int]:
        """One with so much data; also its fd for the other side, which is the caller's to close.

        SegmentError: memory is short, with sizes.
        """
        fd = segment.create_anonymous(FLAGS_BYTES + pinned_bytes)
        try:
            return cls(fd), fd
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, pinned_bytes: int) -> Segment:
        """The one that the other side made; SegmentError when it is not that."""
        segment.check_received(fd)
        size = os.fstat(fd).st_size
        if size != FLAGS_BYTES + pinned_bytes:
            raise SegmentError(
                0, f"a slab's segment of {size} bytes; {FLAGS_BYTES + pinned_bytes} were announced"
            )
        return cls(fd)

    @property
    def data(self) -> memoryview:
        """Of a pinned slab."""
        return self.memory[FLAGS_BYTES:]

    def close(self) -> None:
        """Let go of it; it is unmapped when nobody has a view of it any more."""
        self.memory = memoryview(b"")


class Claim(NamedTuple):
    """What one call has of a slab until its output was taken."""

    sequence: int
    places: Places
    #: Where its part of the data ends, counted without wrapping.
    end: int

    def flag(self, which: int) -> int:
        """Where that flag of it is in the segment."""
        return self.places.slot * SLOT_BYTES + which


class Allocator:
    """Gives calls parts of a slab's data, one behind the other, and takes them back in that order.

    On the engine's side; one thread at a time.
    """

    def __init__(self, data_bytes: int) -> None:
        self._data_bytes = data_bytes
        #: Oldest first.
        self._claims: collections.deque[Claim] = collections.deque()
        self._sequence = 0
        #: Bytes given out and taken back since the beginning, the rests of laps included.
        self._end = self._begin = 0

    def claim(self, sizes: tuple[int, int, int, int]) -> Claim | None:
        """Room for arrays of these sizes, in the order of `Places`; None while there is none."""
        # Written out: this is on every call's way.
        hidden_bytes, ids_bytes, weights_bytes, out_bytes = sizes
        ids = hidden_bytes + _UP & ~_UP
        weights = ids + (ids_bytes + _UP & ~_UP)
        out = weights + (weights_bytes + _UP & ~_UP)
        size = out + (out_bytes + _UP & ~_UP)
        claims, data_bytes = self._claims, self._data_bytes
        if not claims:
            # Memory used last is in caches, and in translation buffers.
            self._begin = self._end = 0
        begin = self._end
        # In one piece: the rest of the lap stays unused.
        if begin % data_bytes + size > data_bytes:
            begin += -begin % data_bytes
        if len(claims) == SLOTS or begin + size - self._begin > data_bytes:
            return None
        at, slot = begin % data_bytes, self._sequence % SLOTS
        self._sequence = sequence = (self._sequence + 1) % _SEQUENCES
        self._end = end = begin + size
        claim = Claim(sequence, Places(slot, at, at + ids, at + weights, at + out), end)
        claims.append(claim)
        return claim

    def free_oldest(self) -> None:
        """Nothing uses the oldest claim any more."""
        self._begin = self._claims.popleft().end
