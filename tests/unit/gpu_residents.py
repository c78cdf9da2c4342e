"""GPU backends with a kernel that stays, which the shim runs beside the host, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from moeshm._claims import Claim
from moeshm._words import wait_for_word
from moeshm.backends import Ids, Weights
from moeshm.backends.gpu import resident
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.resident import Resident
from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import ExpertLayer
from moeshm.dtypes import Array, DType, narrow
from moeshm.errors import DeviceError
from moeshm.transport.slab import DONE
from tests.checkpoints import random_layer
from tests.conformance.test_backends import TOLERANCE, assert_close, draw_call
from tests.simt.device import SimtDevice
from tests.simt.resident_device import ResidentDevice

from .gpu_slabs import Engine

BF16 = DType.BF16
Inputs = tuple[Array, Ids, Weights]

LAYER = random_layer(1, hidden_size=64, intermediate_size=72, weight_dtype=BF16)
OTHER = random_layer(2, hidden_size=72, intermediate_size=64, top_k=4, weight_dtype=BF16)
#: More tokens than the kernel takes, of the same kernels otherwise.
MANY = 70
PATIENCE_NS = 30 * 10**9


class Others:
    """Processes that use the GPU, as a driver tells of them."""

    def __init__(self) -> None:
        self.n = 0
        self.error = ""

    def count(self) -> int:
        """As `Neighbours.count`."""
        if self.error:
            raise DeviceError(self.error)
        return self.n


def alone(monkeypatch: pytest.MonkeyPatch) -> Others:
    """For a test: nobody else is there at first, and kernels stay until they are told to end."""
    made = Others()
    monkeypatch.setattr(resident, "Neighbours", lambda _bus_id: made)
    monkeypatch.setattr(resident, "IDLE_NS", PATIENCE_NS)
    monkeypatch.setattr(resident, "_LONGEST_S", 1e9)
    monkeypatch.setattr(resident, "_LOOK_S", 0)
    return made


class Served:
    """A backend with a kernel that stays."""

    def __init__(self, layers: Mapping[int, ExpertLayer], device: SimtDevice) -> None:
        self.device = device
        self.backend = GpuBackend(layers, device, is_resident=True)
        assert self.backend._resident is not None
        self.resident: Resident = self.backend._resident

    @property
    def counts(self) -> tuple[int, int]:
        """Of calls, and of launches."""
        return self.resident.n_calls, self.resident.n_launched

    def call(self, seed: int, n_tokens: int = 1, number: int = 0, dtype: DType = BF16) -> None:
        """One that is right."""
        layer = {0: LAYER, 1: OTHER}[number]
        inputs = draw(seed, layer, n_tokens, dtype)
        out = narrow(np.full(inputs[0].shape, np.nan, np.float32), dtype)
        self.backend.ffn(number, *inputs, out)
        assert_close(out, reference_ffn(layer, *inputs), TOLERANCE[BF16])

    def end(self) -> None:
        """No kernel is there any more."""
        with self.backend._turn:
            self.device.wait()


@contextlib.contextmanager
def serving(
    layers: Mapping[int, ExpertLayer] | None = None, device: SimtDevice | None = None
) -> Iterator[Served]:
    """One that is ended afterwards."""
    made = Served(layers or {0: LAYER}, device or ResidentDevice())
    try:
        yield made
    finally:
        made.end()


def draw(seed: int, layer: ExpertLayer, n_tokens: int, dtype: DType = BF16) -> Inputs:
    """A call of the layer."""
    hidden, ids, weights = draw_call(seed, layer, n_tokens, layer.info.top_k)
    return narrow(hidden, dtype), ids, weights


def begin(slab: Engine, inputs: Inputs, number: int = 0, **how: Any) -> Claim:
    """A call, enqueued."""
    return slab.begin(*inputs, layer=number, n_ids=how.pop("n_ids", 6), **how)


def finish(slab: Engine, claim: Claim, inputs: Inputs, layer: ExpertLayer = LAYER) -> None:
    """It comes, and is right."""
    memory = slab.segment.memory
    assert wait_for_word(memory, claim.flag(DONE), claim.sequence, PATIENCE_NS, 0)
    found = slab.take(claim, inputs[0])
    assert_close(found, reference_ffn(layer, *inputs), TOLERANCE[BF16])
