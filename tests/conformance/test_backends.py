"""What every backend must do, against the float64 reference; a new one is one line in BACKENDS."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from moeshm.backends import Backend, Ids, Weights, cpu
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.reference import ReferenceBackend, reference_ffn
from moeshm.checkpoint import ExpertLayer
from moeshm.dtypes import Array, DType, narrow, widen
from moeshm.layers import Activation
from tests.checkpoints import STORAGES, random_layer
from tests.simt.device import SimtDevice

Layers = Mapping[int, ExpertLayer]
Build = Callable[[Layers], Backend]


def streamed_cpu(layers: Layers) -> Backend:
    """The way that models too large to be widened take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "SMALL_MODEL_BYTES", 0)
        return cpu.CpuBackend(layers, threads=1)


def threaded_cpu(layers: Layers) -> Backend:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "SMALL_MODEL_BYTES", 0)
        return cpu.CpuBackend(layers, threads=3)


def simt_gpu(layers: Layers) -> Backend:
    """The GPU's kernels, run on the host."""
    return GpuBackend(layers, SimtDevice())


def real_gpu(layers: Layers) -> Backend:
    from moeshm.backends.gpu.cupy_device import open_device

    return GpuBackend(layers, open_device("auto"))


BACKENDS: dict[str, Build] = {
    "reference": ReferenceBackend,
    "cpu": cpu.CpuBackend,
    "cpu-streamed": streamed_cpu,
    "cpu-threaded": threaded_cpu,
    "gpu-simt": simt_gpu,
    "gpu": real_gpu,
}
_PARAMETERS = [
    pytest.param(name, marks=[pytest.mark.gpu] if name == "gpu" else []) for name in BACKENDS
]

#: Relative Frobenius error by the coarser of the weights' and the activations' format.
TOLERANCE = {DType.F32: 1e-5, DType.F16: 3e-3, DType.BF16: 1e-2}


@pytest.fixture(params=_PARAMETERS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Build:
    monkeypatch.setattr(cpu, "PARALLEL_MIN", 0)
    return BACKENDS[request.param]


def draw_call(
    seed: int, layer: ExpertLayer, n_tokens: int, top_k: int, *, empty: float = 0.2
) -> tuple[Array, Ids, Weights]:
    """Hidden states in float32, ids with a share of empty slots, weights."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((n_tokens, layer.info.hidden_size), np.float32)
    ids = rng.integers(0, len(layer), (n_tokens, top_k), np.int32)
    ids[rng.random(ids.shape) < empty] = -1
    return hidden, ids, rng.random((n_tokens, top_k), np.float32)


def compute(
    backend: Backend, hidden: Array, ids: Ids, weights: Weights, dtype: DType = DType.F32
) -> Array:
    """The answer in `dtype`, written over NaN."""
    out = narrow(np.full(hidden.shape, np.nan, np.float32), dtype)
    backend.ffn(0, hidden, ids, weights, out)
    return out


def assert_close(found: Array, expected: Array, tolerance: float) -> None:
    error = float(np.linalg.norm(widen(found) - expected))
    assert error <= tolerance * float(np.linalg.norm(expected)), error


def check(
    build: Build, layer: ExpertLayer, call: tuple[Array, Ids, Weights], tolerance: float = 1e-5
) -> None:
    assert_close(compute(build({0: layer}), *call), reference_ffn(layer, *call), tolerance)


# --- numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("weight_dtype", DType)
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 13])
def test_activations_and_formats(
    build: Build, activation: Activation, weight_dtype: DType, dtype: DType, n_tokens: int
) -> None:
    layer = random_layer(
        1,
        hidden_size=48,
        intermediate_size=20,
        activation=activation,
        weight_dtype=weight_dtype,
        has_bias=activation is Activation.SWIGLU_CLAMPED,
    )
    hidden, ids, weights = draw_call(2, layer, n_tokens, 3)
    hidden = narrow(hidden * 3, dtype)
    found = compute(build({0: layer}), hidden, ids, weights, dtype)
    tolerance = max(TOLERANCE[weight_dtype], TOLERANCE[dtype])
    assert_close(found, reference_ffn(layer, hidden, ids, weights), tolerance)


@pytest.mark.parametrize("weight_dtype", DType)
@pytest.mark.parametrize("dtype", DType)
def test_many_tokens_in_every_format(build: Build, weight_dtype: DType, dtype: DType) -> None:
    """By the coarser format: kernels may round activations to that of the weights."""
    layer = random_layer(1, hidden_size=48, intermediate_size=20, weight_dtype=weight_dtype)
    hidden, ids, weights = draw_call(2, layer, 140, 3)
    hidden = narrow(hidden * 3, dtype)
    found = compute(build({0: layer}), hidden, ids, weights, dtype)
    tolerance = max(TOLERANCE[weight_dtype], TOLERANCE[dtype])
    assert_close(found, reference_ffn(layer, hidden, ids, weights), tolerance)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("weight_dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 12])
def test_ways_to_store_an_expert(
    build: Build, storage: str, weight_dtype: DType, n_tokens: int
) -> None:
    layer = random_layer(3, storage=storage, weight_dtype=weight_dtype, has_bias=True)
    check(build, layer, draw_call(4, layer, n_tokens, 2), TOLERANCE[weight_dtype])


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size"), [(1, 1), (3, 2), (33, 7), (64, 129), (130, 65)]
)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("weight_dtype", DType)
def test_odd_shapes(
    build: Build, hidden_size: int, intermediate_size: int, storage: str, weight_dtype: DType
) -> None:
    layer = random_layer(
        5,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        storage=storage,
        weight_dtype=weight_dtype,
    )
    check(build, layer, draw_call(6, layer, 11, 2), TOLERANCE[weight_dtype])


@pytest.mark.parametrize("n_tokens", [0, 1, 2, 9, 64, 515])
@pytest.mark.parametrize("top_k", [1, 4, 16])
def test_token_counts_and_top_k(build: Build, n_tokens: int, top_k: int) -> None:
    layer = random_layer(7, num_experts=18, top_k=top_k)
    check(build, layer, draw_call(8, layer, n_tokens, top_k))


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("out_dtype", DType)
def test_answer_in_another_format(build: Build, dtype: DType, out_dtype: DType) -> None:
    layer = random_layer(9)
    hidden, ids, weights = draw_call(10, layer, 5, 2)
    hidden = narrow(hidden, dtype)
    found = compute(build({0: layer}), hidden, ids, weights, out_dtype)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[out_dtype])
    assert_close(found, reference_ffn(layer, hidden, ids, weights), tolerance)


@pytest.mark.parametrize("activation", Activation)
def test_large_values_overflow_without_a_warning(build: Build, activation: Activation) -> None:
    layer = random_layer(11, activation=activation)
    hidden, ids, weights = draw_call(12, layer, 9, 2)
    backend = build({0: layer})
    found = compute(backend, hidden * np.float32(1e4), ids, weights)
    expected = reference_ffn(layer, hidden * np.float32(1e4), ids, weights)
    assert_close(found, expected, 1e-5)
    as_f16 = compute(backend, hidden * np.float32(1e4), ids, weights, DType.F16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(np.isinf(as_f16), np.isinf(found.astype(np.float16)))


# --- routing ----------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [1, 6, 40])
def test_all_rows_on_one_expert(build: Build, n_tokens: int) -> None:
    layer = random_layer(13)
    hidden, ids, weights = draw_call(14, layer, n_tokens, 1)
    check(build, layer, (hidden, np.full_like(ids, 3), weights))


@pytest.mark.parametrize("n_tokens", [1, 6, 40])
def test_the_same_expert_twice_in_a_row(build: Build, n_tokens: int) -> None:
    layer = random_layer(15)
    hidden, ids, weights = draw_call(16, layer, n_tokens, 4)
    ids[:, 1] = ids[:, 3] = ids[:, 0]
    check(build, layer, (hidden, ids, weights))


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 7, 40])
def test_rows_without_an_expert_are_zero(build: Build, dtype: DType, n_tokens: int) -> None:
    layer = random_layer(17)
    hidden, ids, weights = draw_call(18, layer, n_tokens, 2)
    ids[::2] = -1
    hidden = narrow(hidden, dtype)
    found = compute(build({0: layer}), hidden, ids, weights, dtype)
    assert not found[::2].any()
    assert_close(found, reference_ffn(layer, hidden, ids, weights), TOLERANCE[dtype])
    assert not compute(build({0: layer}), hidden, np.full_like(ids, -1), weights, dtype).any()


@pytest.mark.parametrize("n_tokens", [1, 12])
def test_the_weight_of_an_empty_slot_is_ignored(build: Build, n_tokens: int) -> None:
    layer = random_layer(19)
    hidden, ids, weights = draw_call(20, layer, n_tokens, 3)
    ids[:, 1] = -1
    expected = reference_ffn(layer, hidden, ids, weights)
    weights[:, 1] = np.nan
    assert_close(compute(build({0: layer}), hidden, ids, weights), expected, 1e-5)


def test_a_weight_of_zero_or_below(build: Build) -> None:
    layer = random_layer(21)
    hidden, ids, weights = draw_call(22, layer, 10, 2)
    weights[0] = 0
    weights[1:5] *= -1
    check(build, layer, (hidden, ids, weights))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [4, 30])
def test_a_poisoned_token_stays_alone(
    build: Build, poison: float, dtype: DType, n_tokens: int
) -> None:
    layer = random_layer(23, weight_dtype=DType.BF16)
    hidden, ids, weights = draw_call(24, layer, n_tokens, 2, empty=0)
    ids[:, 0] = 0
    hidden[1, 5] = poison
    hidden = narrow(hidden, dtype)
    found = widen(compute(build({0: layer}), hidden, ids, weights, dtype))
    clean = np.arange(n_tokens) != 1
    assert np.isnan(found[1]).any()
    assert np.isfinite(found[clean]).all()
    expected = reference_ffn(layer, hidden, ids, weights)
    assert_close(found[clean], expected[clean], TOLERANCE[DType.BF16])


# --- arrays and threads -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 10])
def test_inputs_need_not_be_contiguous(build: Build, dtype: DType, n_tokens: int) -> None:
    layer = random_layer(25, weight_dtype=dtype)
    hidden, ids, weights = draw_call(26, layer, n_tokens * 2, 6)
    hidden = narrow(np.repeat(hidden, 2, axis=1), dtype)[::2, ::2]
    call = (hidden, np.asfortranarray(ids)[::2, ::3], weights[::2, ::3])
    check(build, layer, call, TOLERANCE[dtype])


def test_inputs_may_be_read_only_and_stay_as_they_are(build: Build) -> None:
    layer = random_layer(27)
    call = draw_call(28, layer, 9, 2)
    copies = [array.copy() for array in call]
    for array in call:
        array.setflags(write=False)
    check(build, layer, call)
    for array, copy in zip(call, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 8, 50])
def test_every_run_gives_the_same_bits(build: Build, dtype: DType, n_tokens: int) -> None:
    layer = random_layer(29, hidden_size=96, intermediate_size=64, weight_dtype=dtype)
    call = draw_call(30, layer, n_tokens, 4)
    first = compute(build({0: layer}), *call)
    backend = build({0: layer})
    for _ in range(3):
        np.testing.assert_array_equal(compute(backend, *call), first)


def test_several_threads_at_once(build: Build) -> None:
    layers = {0: random_layer(31, weight_dtype=DType.BF16)}
    backend = build(layers)
    calls = [draw_call(seed, layers[0], n, 2) for seed, n in enumerate((1, 3, 9, 40) * 2)]
    expected = [compute(backend, *call) for call in calls]
    wrong: list[int] = []
    barrier = threading.Barrier(len(calls))

    def run(number: int) -> None:
        barrier.wait()
        for _ in range(5):
            if not np.array_equal(compute(backend, *calls[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_layers_and_name(build: Build) -> None:
    first, second = random_layer(32), random_layer(33, hidden_size=12)
    backend = build({3: first, 7: second})
    assert dict(backend.layers) == {3: first.info, 7: second.info}
    assert backend.name in {"reference", "cpu", "gpu"}
    hidden, ids, weights = draw_call(34, second, 2, 2)
    out = np.full_like(hidden, np.nan)
    backend.ffn(7, hidden, ids, weights, out)
    assert_close(out, reference_ffn(second, hidden, ids, weights), 1e-5)


def test_nothing_refers_to_the_arrays_after_the_call(build: Build) -> None:
    """In a worker they are shared memory, which is given back at once."""
    layer = random_layer(3)
    backend = build({0: layer})
    hidden, ids, weights = draw_call(3, layer, 40, 2)
    out = np.empty_like(hidden)
    for _ in range(200):
        before = [sys.getrefcount(array) for array in (hidden, ids, weights, out)]
        backend.ffn(0, hidden, ids, weights, out)
        assert [sys.getrefcount(array) for array in (hidden, ids, weights, out)] == before
