"""Calls whose arrays lie in a slab, on a GPU made of the host: results, flags, order."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
import pytest

from moeshm._claims import Allocator
from moeshm._words import load_word
from moeshm.backends import Ids
from moeshm.backends.gpu import slab_calls, slab_job, tables, workspace
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.reference import reference_ffn
from moeshm.dtypes import DType, narrow
from moeshm.transport.slab import DONE, FLAGS_BYTES, REFUSED
from tests.checkpoints import random_layer
from tests.conformance.test_backends import TOLERANCE, assert_close, compute, draw_call
from tests.simt.device import FEATURES, IdleDevice, LazyDevice, SimtDevice
from tests.unit.test_gpu_experts import part
from tests.wire import meanwhile

from .gpu_slabs import DATA_BYTES, LAYER, Noted, each_kind, engine, table

# --- results --------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("weight_dtype", DType)
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 5, 140])
def test_calls_give_what_the_reference_gives(
    kind: str, weight_dtype: DType, dtype: DType, n_tokens: int
) -> None:
    """With empty slots among the ids; the second call of a kind like the first."""
    layer = random_layer(1, hidden_size=64, weight_dtype=weight_dtype)
    backend = GpuBackend({0: layer}, SimtDevice())
    with engine(backend, kind) as slab:
        for seed in range(2):
            hidden, ids, weights = draw_call(seed, layer, n_tokens, 2)
            weights[ids < 0] = np.nan
            hidden = narrow(hidden, dtype)
            found = slab.compute(hidden, ids, weights)
            expected = reference_ffn(layer, hidden, ids, np.nan_to_num(weights))
            assert_close(found, expected, max(TOLERANCE[dtype], TOLERANCE[weight_dtype]))
            np.testing.assert_array_equal(
                found, compute(backend, hidden, ids, weights, dtype), "the bits of ffn"
            )


@each_kind
@pytest.mark.parametrize("in_place_bytes", [0, 1 << 20])
def test_results_are_copied_or_written_in_place(
    monkeypatch: pytest.MonkeyPatch, kind: str, in_place_bytes: int
) -> None:
    monkeypatch.setattr(slab_job, "IN_PLACE_BYTES", in_place_bytes)
    call = draw_call(1, LAYER, 7, 2)
    with engine(GpuBackend({0: LAYER}, SimtDevice()), kind) as slab:
        assert_close(slab.compute(*call), reference_ffn(LAYER, *call), 1e-5)


@each_kind
def test_wavefronts_of_64(kind: str) -> None:
    device = SimtDevice(FEATURES._replace(arch="gfx90a", warp=64, has_mma=False))
    with engine(GpuBackend({0: LAYER}, device), kind) as slab:
        for n_tokens in (1, 40):
            call = draw_call(n_tokens, LAYER, n_tokens, 3)
            assert_close(slab.compute(*call), reference_ffn(LAYER, *call), 1e-5)


@each_kind
@pytest.mark.parametrize("n_tokens", [40, 41, 95])
def test_long_calls_are_begun_in_parts(
    monkeypatch: pytest.MonkeyPatch, kind: str, n_tokens: int
) -> None:
    """Done once, after the last."""
    monkeypatch.setattr(workspace, "MAX_TOKENS", 40)
    device = SimtDevice()
    call = draw_call(13, LAYER, n_tokens, 2)
    with engine(GpuBackend({0: LAYER}, device), kind) as slab:
        noted = Noted(device, monkeypatch)
        assert_close(slab.compute(*call), reference_ffn(LAYER, *call), 1e-5)
    assert noted.seen.count("admit") == -(-n_tokens // 40)
    assert noted.seen.count("write_value") == 1
    assert noted.seen[-2:] == ["write_value", "wait"]


@each_kind
def test_a_call_without_tokens(kind: str) -> None:
    with engine(GpuBackend({0: LAYER}, SimtDevice()), kind) as slab:
        call = draw_call(1, LAYER, 0, 2)
        assert slab.compute(*call).shape == (0, 24)


def test_a_layer_without_experts() -> None:
    with engine(GpuBackend({0: part(LAYER, [])}, SimtDevice())) as slab:
        hidden, ids, weights = draw_call(19, LAYER, 3, 2)
        assert not slab.compute(hidden, np.full_like(ids, -1), weights, n_ids=0).any()


def test_sequences_begin_anew() -> None:
    call = draw_call(1, LAYER, 2, 2)
    with engine(GpuBackend({0: LAYER}, SimtDevice())) as slab:
        slab.allocator = Allocator(slab.segment.memory, DATA_BYTES, (1 << 32) - 3)
        claims = []
        for _ in range(3):
            claims.append(slab.begin(*call))
            assert_close(slab.take(claims[-1], call[0]), reference_ffn(LAYER, *call), 1e-5)
        assert [claim.sequence for claim in claims] == [(1 << 32) - 2, 1, 2]


# --- ids ------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("n_tokens", [1, 95])
@pytest.mark.parametrize("wrong", [6, -2, (1 << 31) - 1])
def test_ids_that_are_wrong(
    monkeypatch: pytest.MonkeyPatch, kind: str, n_tokens: int, wrong: int
) -> None:
    """The others are computed, as if it were empty; its pair is told of before the call is done."""
    monkeypatch.setattr(workspace, "MAX_TOKENS", 40)
    device = SimtDevice()
    hidden, ids, weights = draw_call(5, LAYER, n_tokens, 2)
    ids[-1, 1] = wrong
    with engine(GpuBackend({0: LAYER}, device), kind) as slab:
        write_value = device.write_value
        told: list[int] = []

        def write(address: int, value: int) -> None:
            told.append(load_word(slab.segment.memory, REFUSED))
            write_value(address, value)

        monkeypatch.setattr(device, "write_value", write)
        claim = slab.begin(hidden, ids, weights)
        assert told == [2 * n_tokens]
        assert slab.flag(claim, REFUSED) == 2 * n_tokens
        ids[-1, 1] = -1
        expected = reference_ffn(LAYER, hidden, ids, weights)
        assert_close(slab.take(claim, hidden), expected, 1e-5)
        assert slab.compute(hidden, ids, weights).shape == hidden.shape


@each_kind
def test_a_client_that_changes_ids_and_weights_later(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    device = SimtDevice()
    hidden, ids, weights = draw_call(5, LAYER, 3, 2)
    with engine(GpuBackend({0: LAYER}, device), kind) as slab:
        launch = device.launch

        def change(kernel: Any, *how: Any) -> None:
            launch(kernel, *how)
            if kernel.name == "admit":
                places = slab.claims[-1].places
                slab.write(places.topk_ids, np.full_like(ids, 1 << 30))
                slab.write(places.topk_weights, np.full_like(weights, np.nan))

        monkeypatch.setattr(device, "launch", change)
        found = slab.compute(hidden, ids, weights)
        assert_close(found, reference_ffn(LAYER, hidden, ids, weights), 1e-5)


@each_kind
def test_ids_that_stand_for_slots(kind: str) -> None:
    backend = GpuBackend({0: part(LAYER, [2, 4, 5])}, SimtDevice())
    hidden, ids, weights = draw_call(5, LAYER, 9, 2)
    there = np.where(np.isin(ids, (2, 4, 5)), ids, -1)
    with engine(backend, kind) as slab:
        slots = table(-1, -1, 0, -1, 1, 2)
        found = slab.compute(hidden, there, weights, slots=slots)
        assert_close(found, reference_ffn(LAYER, hidden, there, weights), 1e-5)
        # Local ids, in another order.
        local = np.array([0, 0, 2, 0, 0, 1, -1], np.int32)[there]
        found = slab.compute(hidden, local, weights, slots=table(0, 2, 0), n_ids=3)
        expected = np.where(local == 2, 2, np.where(local == 1, 5, np.where(local == 0, 2, -1)))
        assert_close(found, reference_ffn(LAYER, hidden, expected.astype(np.int32), weights), 1e-5)
        claim = slab.begin(hidden, ids, weights, slots=slots)
        refused = slab.flag(claim, REFUSED)
        assert refused
        assert ids.ravel()[refused - 1] in (0, 1, 3)
        expected = reference_ffn(LAYER, hidden, there, weights)
        assert_close(slab.take(claim, hidden), expected, 1e-5)


def test_tables_are_uploaded_once_and_their_number_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tables, "MAX_TABLES", 2)
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    hidden, ids, weights = draw_call(5, LAYER, 3, 2)
    every = [table(*(np.roll(np.arange(6), shift))) for shift in range(3)]
    with engine(backend) as slab:
        slab.begin(hidden, ids, weights, slots=every[0])
        slab.begin(hidden, ids, weights, slots=every[1])
        device.wait()
        before = device.device_bytes
        noted = Noted(device, monkeypatch)
        claims = [slab.begin(hidden, ids, weights, slots=every[0].copy()) for _ in range(3)]
        assert "copy_in" not in noted.seen
        assert "wait" not in noted.seen
        # Takes the place of a table that these calls still need.
        claims.append(slab.begin(hidden, ids, weights, slots=every[2]))
        assert (device.device_bytes, device.n_freed_early) == (before, 0)
        device.wait()
        for claim, slots in zip(claims, [every[0]] * 3 + [every[2]], strict=True):
            expected = reference_ffn(LAYER, hidden, slots[ids], weights)
            assert_close(slab.take(claim, hidden), expected, 1e-5)


# --- the order of things --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "weight_dtype", "n_tokens", "expected"),
    [
        ("device", DType.F32, 1, "admit decode_gate_up decode_down"),
        ("device", DType.BF16, 1, "admit decode_gate_up decode_down"),
        ("pinned", DType.F32, 1, "admit decode_gate_up decode_down"),
        ("device", DType.F32, 200, "admit route prefill_gate_up prefill_down combine"),
        ("pinned", DType.BF16, 200, "admit route prefill_gate_up prefill_down combine copy_out"),
    ],
)
def test_a_call_is_enqueued_in_order_and_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, kind: str, weight_dtype: DType, n_tokens: int, expected: str
) -> None:
    layer = random_layer(2, weight_dtype=weight_dtype)
    device = IdleDevice()
    backend = GpuBackend({0: layer}, device)
    with engine(backend, kind) as slab:
        noted = Noted(device, monkeypatch)
        for _ in range(2):
            slab.begin(*draw_call(3, layer, n_tokens, 2))
        assert noted.seen == [*expected.split(), "write_value"] * 2
    kernels = [name for name in expected.split() if name != "copy_out"]
    # The kernels that read ids at once must not overlap with the one that writes them.
    assert [device.overlapping[name] for name in kernels[:2]] == [False, False]
    assert all(device.overlapping[name] for name in kernels[2:])


def test_kernels_get_the_devices_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of registered memory; copies get the host's."""
    monkeypatch.setattr(slab_job, "IN_PLACE_BYTES", 0)
    device = IdleDevice()
    device.shift = 1 << 40
    seen: dict[str, Any] = {}
    copies: list[int] = []
    device.on_launch = lambda name, first: seen.update({name: type(first).from_buffer_copy(first)})
    with engine(GpuBackend({0: LAYER}, device)) as slab:
        monkeypatch.setattr(device, "copy_out", lambda to, *_: copies.append(to))
        claim = slab.begin(*draw_call(3, LAYER, 2, 2))
        start = next(iter(device.registered)) + FLAGS_BYTES
        places = claim.places
        assert seen["admit"].ids == start + places.topk_ids + device.shift
        assert seen["admit"].weights == start + places.topk_weights + device.shift
        assert seen["admit"].x == start + places.hidden_states + device.shift
        assert copies == [start + places.out]
        assert slab.flag(claim, DONE) == claim.sequence
        monkeypatch.setattr(slab_job, "IN_PLACE_BYTES", 1 << 20)
        claim = slab.begin(*draw_call(3, LAYER, 3, 2))
        assert seen["decode_down"].out == start + claim.places.out + device.shift


@each_kind
def test_calls_are_begun_before_others_are_done(kind: str) -> None:
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    with engine(backend, kind) as slab:
        calls = [draw_call(seed, LAYER, 1 + seed % 3, 2) for seed in range(20)]
        claims = [slab.begin(*call) for call in calls]
        assert not any(slab.flag(claim, DONE) for claim in claims)
        # Another call meanwhile, which uses the same workspace.
        between = draw_call(99, LAYER, 5, 2)
        assert_close(compute(backend, *between), reference_ffn(LAYER, *between), 1e-5)
        for claim, call in zip(claims, calls, strict=True):
            assert_close(slab.take(claim, call[0]), reference_ffn(LAYER, *call), 1e-5)


def test_sessions_side_by_side() -> None:
    """Each has a slab, and a thread."""
    backend = GpuBackend({0: LAYER}, SimtDevice())

    def serve(kind: str, seed: int) -> None:
        with engine(backend, kind) as slab:
            for n_tokens in (1, 4, 40, 2, 1):
                call = draw_call(seed, LAYER, n_tokens, 2)
                assert_close(slab.compute(*call), reference_ffn(LAYER, *call), 1e-5)

    with contextlib.ExitStack() as stack:
        for seed, kind in enumerate(("pinned", "device", "pinned")):
            stack.enter_context(meanwhile(functools.partial(serve, kind, seed)))
        call = draw_call(9, LAYER, 3, 2)
        for _ in range(5):
            assert_close(compute(backend, *call), reference_ffn(LAYER, *call), 1e-5)


# --- what is made ready ---------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("weight_dtype", DType)
def test_after_warm_up_nothing_is_compiled_or_allocated(kind: str, weight_dtype: DType) -> None:
    layer = random_layer(2, weight_dtype=weight_dtype, num_experts=20, top_k=8)
    device = IdleDevice()
    backend = GpuBackend({0: layer}, device)
    backend.warm_up()
    assert "admit.cu" in device.compiled
    with engine(backend, kind) as slab:
        before = [*device.compiled], [*device.loaded], device.n_allocations
        for n_tokens in (*range(1, 40), 64, 128, 129, 300, 700, 3000):
            for top_k in (1, 5, 8):
                for dtype in DType:
                    hidden = np.zeros((n_tokens, layer.info.hidden_size), dtype.numpy)
                    ids: Ids = np.zeros((n_tokens, top_k), np.int32)
                    slab.compute(hidden, ids, np.ones(ids.shape, np.float32), n_ids=20)
        assert ([*device.compiled], [*device.loaded], device.n_allocations) == before


def test_kinds_of_calls_that_stay_made_ready_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slab_calls, "_MAX_JOBS", 3)
    backend = GpuBackend({0: LAYER}, SimtDevice())
    with engine(backend) as slab:
        for n_tokens in (1, 2, 3, 4, 5, 1, 2):
            call = draw_call(n_tokens, LAYER, n_tokens, 2)
            assert_close(slab.compute(*call), reference_ffn(LAYER, *call), 1e-5)
            assert len(backend._slab_calls._jobs) <= 3


def test_modules_of_no_layer_are_compiled_once() -> None:
    device = IdleDevice()
    other = random_layer(3, hidden_size=48)
    backend = GpuBackend({0: LAYER, 1: other}, device)
    backend.warm_up()
    assert device.compiled.count("admit.cu") == 1
    assert device.compiled.count("convert.cu") == 2
