"""Slabs that a GPU computes in, whose engine the host plays, for tests of the GPU backend."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moeshm._claims import Allocator, Claim
from moeshm._words import load_word
from moeshm.backends import BetweenSteps, Ids, SlabCall, Weights
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.slab import GpuSlab
from moeshm.dtypes import Array, dtype_of
from moeshm.transport.slab import DONE, REFUSED, Segment
from tests.checkpoints import random_layer
from tests.simt.device import SimtDevice
from tests.steps import NeverDue

LAYER = random_layer(1)
DATA_BYTES = 4 << 20
#: What kinds of data a slab can have.
each_kind = pytest.mark.parametrize("kind", ["pinned", "device"])
_UNWRITTEN = 0xFF


class Engine:
    """An engine's side of a slab, played by the host; a worker's GPU has the other."""

    def __init__(self, backend: GpuBackend, kind: str) -> None:
        is_pinned = kind == "pinned"
        self.segment, fd = Segment.create(DATA_BYTES if is_pinned else 0)
        os.close(fd)
        self.slab: GpuSlab = backend.open_slab(self.segment.memory, 0 if is_pinned else DATA_BYTES)
        self.allocator = Allocator(self.segment.memory, DATA_BYTES)
        #: Those that the allocator has given out, the oldest first.
        self.claims: list[Claim] = []
        self._taken: set[Claim] = set()

    def write(self, offset: int, array: Array) -> None:
        """Into the slab's data."""
        source = np.ascontiguousarray(array)
        ctypes.memmove(self._address + offset, source.ctypes.data, source.nbytes)

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Out of the slab's data."""
        return ctypes.string_at(self._address + offset, n_bytes)

    @property
    def _address(self) -> int:
        """Of a device's memory, what the shim's handle says."""
        if self.slab.handle:
            return int.from_bytes(self.slab.handle, "little")
        return int(np.frombuffer(self.segment.data, np.uint8).ctypes.data)

    def give(self, hidden: Array, ids: Ids, weights: Weights) -> Claim:
        """The arrays are in the slab, and what is to be written is not yet."""
        n_tokens, top_k = ids.shape
        claim = self.allocator.claim(n_tokens, hidden.shape[1], top_k, dtype_of(hidden))
        assert claim is not None
        self.claims.append(claim)
        places = claim.places
        self.write(places.hidden_states, hidden)
        self.write(places.topk_ids, ids)
        self.write(places.topk_weights, weights)
        self.write(places.out, np.full(hidden.nbytes, _UNWRITTEN, np.uint8))
        return claim

    def begin(
        self,
        hidden: Array,
        ids: Ids,
        weights: Weights,
        *,
        layer: int = 0,
        n_ids: int = 6,
        slots: npt.NDArray[np.int32] | None = None,
        between_steps: BetweenSteps | None = None,
    ) -> Claim:
        """A call, enqueued."""
        claim = self.give(hidden, ids, weights)
        call = call_of(claim, hidden, ids, layer=layer, n_ids=n_ids, slots=slots)
        self.slab.enqueue(call, between_steps or NeverDue())
        return claim

    def flag(self, claim: Claim, which: int) -> int:
        """Of that call."""
        return load_word(self.segment.memory, claim.flag(which))

    def take(self, claim: Claim, hidden: Array) -> Array:
        """The result of a call that is done, which is like `hidden`; its part is free again."""
        assert self.flag(claim, DONE) == claim.sequence
        found: Array = np.frombuffer(self.read(claim.places.out, hidden.nbytes), hidden.dtype)
        self._taken.add(claim)
        while self.claims and self.claims[0] in self._taken:
            self._taken.remove(self.claims.pop(0))
            self.allocator.free_oldest()
        return found.reshape(hidden.shape)

    def compute(self, hidden: Array, ids: Ids, weights: Weights, **how: Any) -> Array:
        """A call whose ids are right."""
        claim = self.begin(hidden, ids, weights, **how)
        found = self.take(claim, hidden)
        assert self.flag(claim, REFUSED) == 0
        return found


def call_of(
    claim: Claim,
    hidden: Array,
    ids: Ids,
    *,
    layer: int = 0,
    n_ids: int = 6,
    slots: npt.NDArray[np.int32] | None = None,
) -> SlabCall:
    """Whose arrays are where the claim says."""
    n_tokens, top_k = ids.shape
    return SlabCall(
        layer,
        n_tokens,
        hidden.shape[1],
        top_k,
        dtype_of(hidden),
        claim.places,
        claim.sequence,
        n_ids,
        slots,
    )


@contextlib.contextmanager
def engine(backend: GpuBackend, kind: str = "pinned") -> Iterator[Engine]:
    """One, with a slab that is closed afterwards."""
    made = Engine(backend, kind)
    with contextlib.closing(made.slab):
        yield made


class Noted:
    """What a device does, in order: kernels, copies, values and waits."""

    def __init__(self, device: SimtDevice, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        for name in ("copy_in", "copy_out", "write_value", "wait"):
            patch.setattr(device, name, self._noted(name, getattr(device, name)))
        launch = device.launch

        def note_launch(kernel: Any, *how: Any) -> None:
            self.seen.append(kernel.name)
            launch(kernel, *how)

        patch.setattr(device, "launch", note_launch)

    def _noted(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            self.seen.append(name)
            function(*arguments)

        return call


def table(*slots: int) -> npt.NDArray[np.int32]:
    """As `SlabCall.slots`."""
    return np.array([*slots, -1], np.int32)
