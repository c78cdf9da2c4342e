"""A slab: memory that both sides use for the arrays of calls.

Its flags, and its data where that is pinned memory of the host, are one segment, a sealed memfd
that both sides map. Device memory as data belongs to the worker's GPU, and is not in it.
docs/protocol.md draws it.
"""

from __future__ import annotations

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
#: what they fetch. `DONE` is a call's sequence when the worker has passed it, and one more when the
#: engine went on before that.
GIVEN, DONE, REFUSED, TAKEN = 0, 128, 256, 384
#: In `refused`: a reply says why; it was sent before.
TOLD = 0xFFFFFFFF
#: Arrays in a slab start at multiples of it.
ALIGNMENT = 256
#: Of device memory: what drivers allocate, and export, is made of these.
PAGE_BYTES = 2 << 20


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
