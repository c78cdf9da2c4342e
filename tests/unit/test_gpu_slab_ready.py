"""Calls that are made ready before their arrays are there, on a GPU made of the host.

What they rest on may go until they are begun.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pytest

from moeshm._claims import Claim
from moeshm.backends import Ids, SlabCall, Weights
from moeshm.backends.gpu import slab_calls, tables
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.reference import reference_ffn
from moeshm.dtypes import Array
from moeshm.errors import DeviceError, InvalidCall, OutOfDeviceMemory
from moeshm.transport.slab import REFUSED
from tests.checkpoints import random_layer
from tests.conformance.test_backends import assert_close, draw_call
from tests.simt.device import LazyDevice, SimtDevice
from tests.steps import NeverDue

from .gpu_slabs import LAYER, Engine, call_of, each_kind, engine, table

Inputs = tuple[Array, Ids, Weights]


class Prepared:
    """A call that was prepared when only its places were known."""

    def __init__(self, slab: Engine, inputs: Inputs, **how: Any) -> None:
        self.inputs = inputs
        hidden, ids, weights = inputs
        self._slab = slab
        self.claim: Claim = slab.give(np.full_like(hidden, np.nan), ids, weights)
        self.call: SlabCall = call_of(self.claim, hidden, ids, **how)
        slab.slab.prepare(self.call)

    def enqueue(self) -> None:
        """Its arrays are there now."""
        self._slab.write(self.claim.places.hidden_states, self.inputs[0])
        self._slab.slab.enqueue(self.call, NeverDue())

    def assert_right(self, slots: npt.NDArray[np.int32] | None = None) -> None:
        """The device is done with it."""
        hidden, ids, weights = self.inputs
        expected = reference_ffn(LAYER, hidden, ids if slots is None else slots[ids], weights)
        assert_close(self._slab.take(self.claim, hidden), expected, 1e-5)
        assert self._slab.flag(self.claim, REFUSED) == 0


def n_jobs(backend: GpuBackend) -> int:
    """That nobody uses."""
    return sum(len(free) for free in backend._slab_calls._jobs.values())


@each_kind
@pytest.mark.parametrize("n_tokens", [1, 95])
def test_nothing_is_enqueued_before_its_turn(kind: str, n_tokens: int) -> None:
    device = SimtDevice()
    with engine(GpuBackend({0: LAYER}, device), kind) as slab:
        for seed in range(3):
            n_before = len(device.used_streams)
            each = Prepared(slab, draw_call(seed, LAYER, n_tokens, 2))
            assert len(device.used_streams) == n_before
            each.enqueue()
            # Everything in one list, the flag included.
            assert len(device.used_streams) == n_before + 1
            each.assert_right()


@each_kind
def test_sessions_prepare_calls_of_one_kind(kind: str) -> None:
    """None fills in what another one is to begin."""
    backend = GpuBackend({0: LAYER}, SimtDevice())
    with engine(backend, kind) as first, engine(backend, kind) as second:
        for _ in range(2):
            calls = [
                Prepared(slab, draw_call(seed, LAYER, 3, 2))
                for seed, slab in enumerate((first, second))
            ]
            for call in calls:
                call.enqueue()
                call.assert_right()
        assert n_jobs(backend) == 2


@each_kind
def test_another_workspace_comes_in_between(kind: str) -> None:
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    wide = random_layer(7, hidden_size=200, intermediate_size=136, top_k=6)
    with engine(backend, kind) as slab:
        call = Prepared(slab, draw_call(8, LAYER, 5, 2))
        backend.add(1, wide)
        assert not backend._slab_calls._jobs
        call.enqueue()
        # It was begun by a job for this workspace, which others can have now.
        assert [len(jobs) for jobs in backend._slab_calls._jobs.values()] == [1]
        device.wait()
        call.assert_right()
        assert device.n_freed_early == 0


@each_kind
def test_another_table_of_experts_comes_in_between(kind: str) -> None:
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    with engine(backend, kind) as slab:
        call = Prepared(slab, draw_call(8, LAYER, 5, 2))
        before = backend._experts.layers[0].table
        backend.add(0, LAYER)
        assert backend._experts.layers[0].table is not before
        call.enqueue()
        device.wait()
        call.assert_right()


def test_a_table_that_there_is_no_room_for_replaces_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls find the others where they were."""
    monkeypatch.setattr(tables, "MAX_TABLES", 2)
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    every = [table(*np.roll(np.arange(6), shift)) for shift in range(3)]

    def refuse(_nbytes: int) -> NoReturn:
        raise OutOfDeviceMemory("none is left")

    with engine(backend) as slab:
        for each in every[:2]:
            Prepared(slab, draw_call(5, LAYER, 3, 2), slots=each).enqueue()
        n_bytes = device.device_bytes
        with monkeypatch.context() as patch:
            patch.setattr(device, "allocate", refuse)
            with pytest.raises(OutOfDeviceMemory):
                Prepared(slab, draw_call(5, LAYER, 3, 2), slots=every[2])
        assert device.device_bytes == n_bytes
        call = Prepared(slab, draw_call(6, LAYER, 3, 2), slots=every[0])
        call.enqueue()
        device.wait()
        call.assert_right(every[0])
        assert device.n_freed_early == 0


def test_a_table_of_slots_goes_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another session's takes its place."""
    monkeypatch.setattr(tables, "MAX_TABLES", 2)
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    every = [table(*np.roll(np.arange(6), shift)) for shift in range(3)]
    with engine(backend) as slab, engine(backend) as other:
        for _ in range(6):
            call = Prepared(slab, draw_call(5, LAYER, 3, 2), slots=every[0])
            others = [Prepared(other, draw_call(6, LAYER, 3, 2), slots=each) for each in every[1:]]
            for each in (others[1], call):
                each.enqueue()
            device.wait()
            call.assert_right(every[0])
            others[1].assert_right(every[2])
            # Next, one that has gone since it was found.
            every.append(every.pop(0))
        assert device.n_freed_early == 0


@each_kind
def test_a_call_that_is_never_begun(kind: str) -> None:
    """As its arrays did not come: others use what was made ready for it."""
    backend = GpuBackend({0: LAYER}, SimtDevice())
    with engine(backend, kind) as slab:
        for seed in range(3):
            Prepared(slab, draw_call(seed, LAYER, 3, 2))
        call = Prepared(slab, draw_call(9, LAYER, 3, 2))
        assert n_jobs(backend) == 0
        call.enqueue()
        call.assert_right()
        assert n_jobs(backend) == 1
        Prepared(slab, draw_call(4, LAYER, 3, 2))
        assert n_jobs(backend) == 0
    assert n_jobs(backend) == 1


def test_another_call_than_was_prepared() -> None:
    with engine(GpuBackend({0: LAYER}, SimtDevice())) as slab:
        Prepared(slab, draw_call(1, LAYER, 3, 2))
        inputs = draw_call(2, LAYER, 3, 2)
        assert_close(slab.compute(*inputs), reference_ffn(LAYER, *inputs), 1e-5)


def test_what_cannot_be_is_told_beforehand() -> None:
    layer = random_layer(16, hidden_size=33)
    with (
        engine(GpuBackend({0: layer}, SimtDevice())) as slab,
        pytest.raises(InvalidCall, match="hidden_size=33 is no multiple of 8"),
    ):
        Prepared(slab, draw_call(17, layer, 2, 2))


def test_after_an_error_its_job_is_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimtDevice()
    backend = GpuBackend({0: LAYER}, device)

    def fail(*_how: Any) -> None:
        raise DeviceError("refused")

    with engine(backend) as slab:
        call = Prepared(slab, draw_call(1, LAYER, 3, 2))
        with monkeypatch.context() as patch:
            patch.setattr(device, "launch", fail)
            with pytest.raises(DeviceError, match="refused"):
                call.enqueue()
        assert n_jobs(backend) == 1
        call = Prepared(slab, draw_call(1, LAYER, 3, 2))
        assert n_jobs(backend) == 0
        call.enqueue()
        call.assert_right()


def test_what_is_found_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds of calls, and tables of slots."""
    monkeypatch.setattr(slab_calls, "_MAX_KNOWN", 3)
    backend = GpuBackend({0: LAYER}, SimtDevice())
    slots = table(*range(6))
    with engine(backend) as slab:
        for n_tokens in (1, 2, 3, 4, 5, 1, 2):
            call = Prepared(slab, draw_call(n_tokens, LAYER, n_tokens, 2), slots=slots.copy())
            call.enqueue()
            call.assert_right(slots)
            calls = backend._slab_calls
            assert max(len(calls._known), len(calls._addresses)) <= 3
