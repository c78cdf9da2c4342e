"""Calls from slabs on this machine's GPU, whose host plays the engine, or another process does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moeshm._claims import Claim
from moeshm._words import wait_for_word
from moeshm.backends import SlabCall
from moeshm.backends.gpu import slab_job, workspace
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.device import Device
from moeshm.backends.reference import reference_ffn
from moeshm.dtypes import Array, DType, narrow
from moeshm.transport.slab import DONE, GIVEN, REFUSED, SLOT_BYTES, Segment
from tests.checkpoints import random_layer
from tests.conformance.test_backends import TOLERANCE, assert_close, compute, draw_call
from tests.steps import AlwaysDue, NeverDue
from tests.unit.gpu_slabs import Engine, each_kind, table
from tests.unit.test_gpu_experts import part

from . import slab_engine

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
LAYER = random_layer(1, hidden_size=256, intermediate_size=192, weight_dtype=DType.BF16)


@pytest.fixture(scope="module")
def device() -> Device:
    """The first GPU."""
    from moeshm.backends.gpu.cupy_device import open_device

    with warnings.catch_warnings():
        # CuPy may warn of what is installed beside it.
        warnings.simplefilter("ignore")
        return open_device("auto")


class HostEngine(Engine):
    """The host copies, within the worker's process, which cannot open what it exports itself."""

    def write(self, offset: int, array: Array) -> None:
        """Into the slab's data."""
        if not self.slab.handle:
            super().write(offset, array)
            return
        from cupy.cuda import runtime

        source = np.ascontiguousarray(array)
        to = self.slab._where.data + offset
        runtime.memcpy(to, source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice)
        # It returns once the driver has a copy of its own.
        runtime.streamSynchronize(0)

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Out of the slab's data."""
        if not self.slab.handle:
            return super().read(offset, n_bytes)
        from cupy.cuda import runtime

        found = np.zeros(n_bytes, np.uint8)
        source = self.slab._where.data + offset
        runtime.memcpy(found.ctypes.data, source, n_bytes, runtime.memcpyDeviceToHost)
        return found.tobytes()

    def take(self, claim: Claim, hidden: Array) -> Array:
        """As `Engine.take`, once the device says that it is done."""
        at = claim.flag(DONE)
        memory, patience_ns = self.segment.memory, slab_engine.PATIENCE_NS
        assert wait_for_word(memory, at, claim.sequence, patience_ns, 0), "the call is not done"
        return super().take(claim, hidden)


@contextlib.contextmanager
def engine(backend: GpuBackend, kind: str) -> Iterator[HostEngine]:
    """One, with a slab that is closed afterwards."""
    made = HostEngine(backend, kind)
    with contextlib.closing(made.slab):
        yield made


@each_kind
@pytest.mark.parametrize("weight_dtype", DType)
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 16, 300])
def test_calls_give_what_the_reference_gives(
    device: Device, kind: str, weight_dtype: DType, dtype: DType, n_tokens: int
) -> None:
    """And the bits that `ffn` gives."""
    layer = random_layer(1, hidden_size=256, intermediate_size=192, weight_dtype=weight_dtype)
    backend = GpuBackend({0: layer}, device)
    with engine(backend, kind) as slab:
        for seed in range(3):
            hidden, ids, weights = draw_call(seed, layer, n_tokens, 2)
            hidden = narrow(hidden, dtype)
            found = slab.compute(hidden, ids, weights)
            expected = reference_ffn(layer, hidden, ids, weights)
            assert_close(found, expected, max(TOLERANCE[dtype], TOLERANCE[weight_dtype]))
            np.testing.assert_array_equal(found, compute(backend, hidden, ids, weights, dtype))


@each_kind
@pytest.mark.parametrize("in_place_bytes", [0, 1 << 20])
def test_many_calls_are_begun_before_any_is_waited_for(
    device: Device, monkeypatch: pytest.MonkeyPatch, kind: str, in_place_bytes: int
) -> None:
    """Of several sizes, one of them in parts, and with calls of `ffn` between them."""
    monkeypatch.setattr(slab_job, "IN_PLACE_BYTES", in_place_bytes)
    monkeypatch.setattr(workspace, "MAX_TOKENS", 150)
    backend = GpuBackend({0: LAYER}, device)
    backend.warm_up()
    with engine(backend, kind) as slab:
        for lap in range(20):
            calls = []
            for seed, n_tokens in enumerate((1, 4, 40, 1, 200, 3, 150, 1)):
                hidden, ids, weights = draw_call(lap * 100 + seed, LAYER, n_tokens, 2)
                call = narrow(hidden, DType.BF16), ids, weights
                calls.append((call, slab.begin(*call)))
            between = calls[2][0]
            found = compute(backend, *between, DType.BF16)
            assert_close(found, reference_ffn(LAYER, *between), TOLERANCE[DType.BF16])
            for call, claim in calls:
                found = slab.take(claim, call[0])
                assert slab.flag(claim, REFUSED) == 0
                assert_close(found, reference_ffn(LAYER, *call), TOLERANCE[DType.BF16])


@each_kind
@pytest.mark.parametrize("dtype", DType)
def test_a_long_call_is_computed_in_steps(
    device: Device, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: DType
) -> None:
    """Of the bits that it has at once; another session's short call is done in its middle."""
    layer = random_layer(1, hidden_size=256, intermediate_size=192, weight_dtype=dtype)
    hidden, ids, weights = draw_call(3, layer, 1000, 2)
    long = narrow(hidden, dtype), ids, weights
    short = draw_call(4, layer, 2, 2)
    with engine(GpuBackend({0: layer}, device), kind) as slab:
        monkeypatch.setattr(workspace, "_STEP_ROWS", 1000)
        expected, expected_short = slab.compute(*long), slab.compute(*short)
    assert_close(expected, reference_ffn(layer, *long), TOLERANCE[dtype])
    monkeypatch.setattr(workspace, "_STEP_MULTIPLY_ADDS", 1)
    monkeypatch.setattr(workspace, "_STEP_ROWS", 1)
    backend = GpuBackend({0: layer}, device)
    with engine(backend, kind) as slab, engine(backend, kind) as other:

        def pause() -> None:
            np.testing.assert_array_equal(other.compute(*short), expected_short)
            claim = slab.claims[-1]
            assert slab.flag(claim, DONE) != claim.sequence

        for _ in range(5):
            due = AlwaysDue(pause)
            claim = slab.begin(*long, between_steps=due)
            np.testing.assert_array_equal(slab.take(claim, long[0]), expected)
            assert due.n == 3
            assert slab.flag(claim, REFUSED) == 0
        np.testing.assert_array_equal(slab.compute(*long), expected)


@each_kind
def test_ids_that_are_wrong_and_ids_that_stand_for_slots(device: Device, kind: str) -> None:
    backend = GpuBackend({0: part(LAYER, [2, 4, 5])}, device)
    hidden, ids, weights = draw_call(5, LAYER, 9, 2)
    hidden = narrow(hidden, DType.BF16)
    there = np.where(np.isin(ids, (2, 4, 5)), ids, -1)
    there[3, 1] = -1
    with engine(backend, kind) as slab:
        given = there.copy()
        given[3, 1] = 1 << 30
        claim = slab.begin(hidden, given, weights, slots=table(-1, -1, 0, -1, 1, 2))
        found = slab.take(claim, hidden)
        assert slab.flag(claim, REFUSED) == 8
        expected = reference_ffn(LAYER, hidden, there, weights)
        assert_close(found, expected, TOLERANCE[DType.BF16])


@each_kind
def test_memory_and_experts_go_while_calls_are_on_their_way(device: Device, kind: str) -> None:
    backend = GpuBackend({0: part(LAYER, [0])}, device)
    hidden, _, weights = draw_call(8, LAYER, 300, 2)
    hidden = narrow(hidden, DType.BF16)
    ids = np.tile(np.array([[1, 2]], np.int32), (300, 1))
    expected = reference_ffn(LAYER, hidden, ids, weights)
    wide = random_layer(7, hidden_size=512, intermediate_size=512, top_k=6)
    with engine(backend, kind) as slab:
        for lap in range(10):
            slots = backend.add(0, part(LAYER, [1, 2]))
            claims = [slab.begin(hidden, ids, weights) for _ in range(3)]
            backend.remove(0, slots)
            if lap == 5:
                backend.add(1, wide)
            for claim in claims:
                assert_close(slab.take(claim, hidden), expected, TOLERANCE[DType.BF16])


@each_kind
def test_memory_is_given_back(device: Device, kind: str) -> None:
    backend = GpuBackend({0: LAYER}, device)
    with engine(backend, kind) as slab:
        call = draw_call(8, LAYER, 5, 2)
        slab.compute(*call)
    before = device.free_bytes()
    for _ in range(20):
        with engine(backend, kind) as slab:
            slab.compute(*call)
    assert device.free_bytes() == before


def test_another_process_gives_the_arrays(device: Device) -> None:
    """To device memory that it opens by the handle."""
    backend = GpuBackend({0: slab_engine.LAYER}, device)
    hidden, ids, weights = slab_engine.draw()
    places = slab_engine.claim(hidden, ids)
    segment, fd = Segment.create(0)
    slab = backend.open_slab(segment.memory, slab_engine.DATA_BYTES)
    arguments = [sys.executable, "-m", "tests.gpu.slab_engine", str(fd), slab.handle.hex()]
    with (
        contextlib.closing(slab),
        subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, pass_fds=(fd,)) as child,
    ):
        os.close(fd)
        at = places.slot * SLOT_BYTES + GIVEN
        sequence, patience_ns = slab_engine.SEQUENCE, slab_engine.PATIENCE_NS
        try:
            assert wait_for_word(segment.memory, at, sequence, patience_ns, 0), "nothing is given"
            slab.enqueue(
                SlabCall(0, len(ids), hidden.shape[1], 2, DType.BF16, places, sequence, 6, None),
                NeverDue(),
            )
            answer, _ = child.communicate(timeout=60)
        finally:
            child.kill()
        found = np.frombuffer(bytes.fromhex(answer.decode()), hidden.dtype).reshape(hidden.shape)
    assert_close(
        found, reference_ffn(slab_engine.LAYER, hidden, ids, weights), TOLERANCE[DType.BF16]
    )
