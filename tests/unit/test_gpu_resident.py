"""Calls to the kernel that stays on a GPU, which the shim runs beside the host."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from moeshm.backends.gpu import backend as gpu_backend
from moeshm.backends.gpu import resident
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.device import Features
from moeshm.backends.reference import reference_ffn
from moeshm.dtypes import Array, DType, narrow
from moeshm.errors import DeviceError
from tests.checkpoints import random_layer
from tests.conformance.test_backends import TOLERANCE, assert_close, compute
from tests.simt.device import FEATURES
from tests.simt.resident_device import ResidentDevice
from tests.steps import NeverDue
from tests.unit.test_gpu_backend import OnDevice, aligned
from tests.unit.test_gpu_experts import part
from tests.unit.test_gpu_registered import rings, serve
from tests.wire import meanwhile

from .gpu_residents import (
    LAYER,
    MANY,
    OTHER,
    Others,
    alone,
    begin,
    draw,
    finish,
    serving,
)
from .gpu_slabs import call_of, each_kind, engine

BF16, F16, F32 = DType.BF16, DType.F16, DType.F32


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    """None at first; and kernels stay until they are told to end."""
    return alone(monkeypatch)


# --- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight_dtype", "dtype"), [(BF16, BF16), (BF16, F32), (BF16, F16), (F16, F16)], ids=str
)
def test_calls_give_what_the_reference_gives(weight_dtype: DType, dtype: DType) -> None:
    """And the same bits when they are made again."""
    layer = random_layer(1, hidden_size=64, intermediate_size=72, weight_dtype=weight_dtype)
    first: dict[int, Array] = {}
    with serving({0: layer}) as served:
        sizes = range(1, 17) if dtype is BF16 else (1, 2, 7, 16)
        for n_tokens in (*sizes, 16, 1, 7, 1):
            hidden, ids, weights = draw(n_tokens, layer, n_tokens, dtype)
            weights[ids < 0] = np.nan
            found = compute(served.backend, hidden, ids, weights, dtype)
            expected = reference_ffn(layer, hidden, ids, np.nan_to_num(weights))
            assert_close(found, expected, TOLERANCE[weight_dtype])
            np.testing.assert_array_equal(found, first.setdefault(n_tokens, found))
        # A kernel for each kind of call that was new, as these have it end.
        assert served.counts == (len(sizes) + 4, len(sizes))


def test_calls_that_are_not_for_it() -> None:
    """Of formats that matrix instructions do not take, of too many tokens, of none."""
    layer = random_layer(1, hidden_size=64)
    with serving({0: layer, 1: LAYER}) as served:
        for n_tokens in (0, 1, 4):
            call = draw(n_tokens, layer, n_tokens, F32)
            assert_close(compute(served.backend, *call), reference_ffn(layer, *call), 1e-5)
        call = draw(1, LAYER, MANY)
        out = np.empty_like(call[0])
        served.backend.ffn(1, *call, out)
        assert_close(out, reference_ffn(LAYER, *call), TOLERANCE[BF16])
        assert served.counts == (0, 0)


def test_hidden_sizes_that_kernels_take_padded() -> None:
    layer = random_layer(3, hidden_size=33, intermediate_size=7, weight_dtype=BF16)
    with serving({0: layer}) as served:
        for seed in range(2):
            for n_tokens in (1, 3):
                call = draw(seed, layer, n_tokens)
                found = compute(served.backend, *call, BF16)
                assert_close(found, reference_ffn(layer, *call), TOLERANCE[BF16])
        assert served.resident.n_calls == 4


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("dtype", DType)
def test_arrays_in_device_memory(dtype: DType, n_tokens: int) -> None:
    with serving() as served:
        for seed in range(2):
            inputs = draw(seed, LAYER, n_tokens, dtype)
            out = OnDevice(aligned(narrow(np.full(inputs[0].shape, np.nan, np.float32), dtype)))
            given: list[Any] = [*(OnDevice(aligned(each)) for each in inputs), out]
            served.backend.ffn(0, *given)
            assert_close(out.array, reference_ffn(LAYER, *inputs), TOLERANCE[BF16])
        # Whoever made them finds no room on this GPU while the kernel stays.
        assert served.counts == (0, 0)


@pytest.mark.parametrize("dtype", DType)
def test_arrays_in_registered_rings(monkeypatch: pytest.MonkeyPatch, dtype: DType) -> None:
    monkeypatch.setattr(gpu_backend, "DIRECT_BYTES", 0)
    with serving() as served, rings(served.backend) as ends:
        for n_tokens in (1, 5, 5, 1):
            inputs = draw(n_tokens, LAYER, n_tokens, dtype)
            found = serve(ends, LAYER, served.backend, *inputs)
            assert_close(found, reference_ffn(LAYER, *inputs), TOLERANCE[BF16])
        assert served.resident.n_calls == 4
        served.end()


# --- how long it stays ------------------------------------------------------------------------


def test_one_kernel_computes_many_calls() -> None:
    """More than the mailbox has room for."""
    with serving() as served:
        for seed in range(40):
            served.call(seed)
        assert served.counts == (40, 1)


def test_calls_of_many_tokens_have_it_end() -> None:
    with serving() as served:
        for n_launched in (1, 2, 3):
            for seed in range(3):
                served.call(seed)
            assert served.resident.n_launched == n_launched
            served.call(7, MANY)
            # Ended, and not only asked to.
            assert served.resident._mailbox.n_ended == n_launched
        assert served.resident.n_calls == 9


@pytest.mark.parametrize("idle_ns", [0, 50_000])
def test_nothing_is_lost_when_it_ends_by_itself(
    monkeypatch: pytest.MonkeyPatch, idle_ns: int
) -> None:
    monkeypatch.setattr(resident, "IDLE_NS", idle_ns)
    with serving() as served:
        for seed in range(30):
            served.call(seed)
        assert served.resident.n_calls == 30
        n_launched = served.resident.n_launched
        served.device.wait()
        assert served.resident._mailbox.n_ended == served.resident.n_launched
        served.call(1)
        assert served.resident.n_launched > n_launched


def test_layers_of_two_shapes() -> None:
    """Each has a kernel of its own, and never finds what is for the other."""
    with serving({0: LAYER, 1: OTHER}) as served:
        for seed in range(3):
            for number in (0, 1, 1, 0):
                served.call(seed, number=number)
        # Of 0 1 1 0, three times.
        assert served.counts == (12, 7)


def test_it_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for the whole device has a turn."""
    with serving() as served:
        served.call(0)
        monkeypatch.setattr(resident, "_LONGEST_S", 0)
        for seed in range(3):
            served.call(seed)
        monkeypatch.setattr(resident, "_LONGEST_S", 1e9)
        served.call(3)
        assert served.counts == (5, 4)


def test_threads_with_calls_of_few_and_of_many_tokens() -> None:
    with serving() as served:
        served.call(0)

        def serve_small() -> None:
            for seed in range(12):
                served.call(seed, 1 + seed % 2)

        def serve_large() -> None:
            for seed in range(4):
                served.call(seed, MANY)

        with meanwhile(serve_small, serve_small, serve_large):
            pass
        assert served.resident.n_calls == 25


def test_after_warm_up_nothing_is_compiled_or_allocated() -> None:
    device = ResidentDevice()
    with serving(device=device) as served:
        served.backend.warm_up()
        assert "resident.cu" in device.compiled
        before = [*device.compiled], [*device.loaded], device.n_allocations
        n_launched = served.resident.n_launched
        for n_tokens in (1, 2, 9, 1):
            for dtype in DType:
                served.call(n_tokens, n_tokens, dtype=dtype)
        assert ([*device.compiled], [*device.loaded], device.n_allocations) == before
        # The last thing that it did was for the whole device.
        assert served.resident.n_launched == n_launched + 1


# --- what it uses changes ---------------------------------------------------------------------


def test_experts_come_and_go_while_it_is_there() -> None:
    """Others take the memory of those that went."""
    with serving({0: part(LAYER, [0, 1, 2])}) as served:
        held = {0: 0, 1: 1, 2: 2}

        def assert_right(seed: int) -> None:
            for n_tokens in (1, 3):
                hidden, ids, weights = draw(seed, LAYER, n_tokens)
                there, given = np.full_like(ids, -1), np.full_like(ids, -1)
                for slot, expert in held.items():
                    there[ids == expert], given[ids == expert] = expert, slot
                out = np.empty_like(hidden)
                served.backend.ffn(0, hidden, given, weights, out)
                expected = reference_ffn(LAYER, hidden, there, weights)
                assert_close(out, expected, TOLERANCE[BF16])

        assert_right(0)
        for seed, (gone, new) in enumerate(((1, 5), (2, 3), (0, 4)), 1):
            served.backend.remove(0, [gone])
            del held[gone]
            assert_right(seed)
            (slot,) = served.backend.add(0, part(LAYER, [new]))
            held[slot] = new
            assert_right(seed)


def test_calls_while_experts_come_and_go() -> None:
    with serving() as served:
        served.call(0)

        def come_and_go() -> None:
            for _ in range(4):
                slots = served.backend.add(0, LAYER)
                served.backend.remove(0, slots)

        with meanwhile(come_and_go):
            for seed in range(12):
                served.call(seed, 1 + seed % 2)
        assert served.resident.n_calls == 13


# --- other processes --------------------------------------------------------------------------


def test_it_steps_aside_for_others_and_comes_back(
    others: Others, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once each time; who comes with a session is seen then."""
    caplog.set_level(logging.INFO, resident.__name__)
    with serving() as served:
        served.call(0)
        n_jobs = len(served.backend._jobs)
        assert n_jobs
        others.n = 2
        with engine(served.backend):
            assert not served.backend._jobs
            for seed in range(3):
                served.call(seed)
                served.call(seed, 2)
            assert served.counts == (1, 1)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage() == (
            "the resident kernel on simt steps aside, calls are launched: "
            "2 other processes use simt"
        )
        others.n = 0
        served.call(4)
        assert served.counts == (1, 1)
        with engine(served.backend):
            served.call(5)
            served.call(6)
        assert served.counts == (3, 2)
        assert [each.levelno for each in caplog.records] == [logging.WARNING, logging.INFO]
        assert caplog.messages[1] == "the resident kernel on simt takes calls again"


@each_kind
def test_others_that_are_seen_by_a_launch(others: Others, kind: str) -> None:
    """What is begun with it is its last call, also of what was prepared before."""
    with serving() as served, engine(served.backend, kind) as slab:
        inputs = draw(1, LAYER, 1)
        for _ in range(2):
            finish(slab, begin(slab, inputs), inputs)
        served.call(1)
        claim = slab.give(*inputs)
        call = call_of(claim, *inputs[:2])
        slab.slab.prepare(call)
        served.call(0, MANY)
        others.n = 1
        n_calls = served.resident.n_calls
        served.call(2)
        assert served.resident.n_calls == n_calls + 1
        slab.slab.enqueue(call, NeverDue())
        finish(slab, claim, inputs)
        served.call(3)
        assert served.resident.n_calls == n_calls + 1


def test_nobody_can_tell_any_more(others: Others, caplog: pytest.LogCaptureFixture) -> None:
    with serving() as served:
        served.call(0)
        others.error = "NVML status 15"
        with engine(served.backend):
            served.call(1)
        assert served.counts == (1, 1)
        assert "steps aside, calls are launched: NVML status 15" in caplog.text


# --- refused at the start ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            FEATURES._replace(has_mma=False, arch="sm_75"),
            "no resident kernel on simt: it needs a CUDA GPU of sm_80 or later, and this is sm_75; "
            "leave out --resident",
        ),
        (
            FEATURES._replace(ends_long_kernels=True),
            "no resident kernel on simt: the driver ends kernels that run for seconds",
        ),
    ],
)
def test_devices_that_cannot_have_it(features: Features, message: str) -> None:
    device = ResidentDevice(features)
    with pytest.raises(DeviceError, match=message):
        GpuBackend({0: LAYER}, device, is_resident=True)
    assert (device.device_bytes, device.pinned_bytes) == (0, 0)


def test_a_device_that_others_use(others: Others) -> None:
    others.n = 3
    message = "no resident kernel: 3 other processes use simt; use another GPU"
    with pytest.raises(DeviceError, match=message):
        GpuBackend({0: LAYER}, ResidentDevice(), is_resident=True)
    others.error = "who else uses the GPU cannot be told: no library"
    with pytest.raises(DeviceError, match="no resident kernel: who else uses the GPU cannot be"):
        GpuBackend({0: LAYER}, ResidentDevice(), is_resident=True)
