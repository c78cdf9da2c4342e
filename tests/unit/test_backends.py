"""The reference against numbers worked out by hand, and what only one backend promises."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moeshm import checkpoint
from moeshm.backends import (
    Ids,
    Weights,
    cpu,
    cpu_activation,
    cpu_layer,
    cpu_matmul,
    reference,
)
from moeshm.backends.null import NullBackend
from moeshm.backends.reference import ReferenceBackend, reference_ffn
from moeshm.checkpoint import ExpertLayer, ExpertWeights
from moeshm.dtypes import Array, DType, FloatArray, narrow, widen
from moeshm.layers import Activation, LayerInfo
from tests.checkpoints import STORAGES, random_layer, write_model


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def scalar_layer(activation: Activation) -> ExpertLayer:
    """One expert of sizes 1: gate 2 x + 0.5, up 3 x - 1, down 4 a + 0.25."""
    info = LayerInfo(
        hidden_size=1,
        intermediate_size=1,
        num_experts=1,
        top_k=1,
        experts=(0,),
        activation=activation,
    )
    matrices = [np.array([[value]], np.float32) for value in (2, 3, 4)]
    biases = [np.array([value], np.float32) for value in (0.5, -1, 0.25)]
    return ExpertLayer(info, [ExpertWeights(*matrices, *biases)])


def run(backend: cpu.CpuBackend, hidden: Array, ids: Ids, weights: Weights) -> FloatArray:
    out = np.full(hidden.shape, np.nan, np.float32)
    backend.ffn(0, hidden, ids, weights, out)
    return out


def draw(layer: ExpertLayer, n_tokens: int, top_k: int) -> tuple[Array, Ids, Weights]:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((n_tokens, layer.info.hidden_size), np.float32)
    ids = rng.integers(0, len(layer), (n_tokens, top_k), np.int32)
    return hidden, ids, rng.random((n_tokens, top_k), np.float32)


# --- reference --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        (Activation.SWIGLU, lambda g, u: g * sigmoid(g) * u),
        (Activation.GEGLU, lambda g, u: g * 0.5 * (1 + math.erf(g / math.sqrt(2))) * u),
        (
            Activation.GEGLU_TANH,
            lambda g, u: g * sigmoid(2 * math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)) * u,
        ),
        (
            Activation.SWIGLU_CLAMPED,
            lambda g, u: min(g, 7) * sigmoid(1.702 * min(g, 7)) * (max(-7, min(u, 7)) + 1),
        ),
    ],
)
@pytest.mark.parametrize("x", [-5.0, -0.25, 0.0, 0.5, 6.0])
def test_reference_by_hand(
    activation: Activation, formula: Callable[[float, float], float], x: float
) -> None:
    hidden, ids = np.array([[x]], np.float32), np.array([[0, -1, 0]], np.int32)
    weights = np.array([[0.5, 99, 0.25]], np.float32)
    found = reference_ffn(scalar_layer(activation), hidden, ids, weights)
    expected = 0.75 * (4 * formula(2 * x + 0.5, 3 * x - 1) + 0.25)
    assert found.dtype == np.float64
    assert found[0, 0] == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_reference_sums_the_experts_of_a_row() -> None:
    layer = random_layer(0)
    hidden, _, _ = draw(layer, 1, 1)
    each = [
        reference_ffn(layer, hidden, np.array([[expert]], np.int32), np.ones((1, 1), np.float32))
        for expert in range(len(layer))
    ]
    ids, weights = np.array([[4, 0]], np.int32), np.array([[0.25, -2]], np.float32)
    found = reference_ffn(layer, hidden, ids, weights)
    np.testing.assert_allclose(found, 0.25 * each[4] - 2 * each[0], rtol=1e-12)


def test_reference_rounds_once_to_the_format_of_the_answer() -> None:
    layer = random_layer(0)
    call = draw(layer, 3, 2)
    out = np.zeros(call[0].shape, np.uint16)
    ReferenceBackend({0: layer}).ffn(0, *call, out)
    expected = narrow(reference_ffn(layer, *call).astype(np.float32), DType.BF16)
    np.testing.assert_array_equal(out, expected)


# --- cpu --------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0, 1e4, 1e30])
def test_activations_are_accurate(activation: Activation, scale: float) -> None:
    info = scalar_layer(activation).info
    gate = np.linspace(-scale, scale, 4001, dtype=np.float32)
    up = np.full_like(gate, 0.75)
    with np.errstate(all="ignore"):
        found = cpu_activation.activate(info, gate, up)
        expected = reference.activate(info, gate.astype(np.float64), up.astype(np.float64))
    error = np.abs(found - expected) / np.maximum(np.abs(gate), np.finfo(np.float32).tiny)
    assert error.max() < 5e-7


def test_threads_below_one() -> None:
    with pytest.raises(ValueError, match="threads=0; it must be at least 1"):
        cpu.CpuBackend({0: random_layer(0)}, threads=0)


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small experts take the way of large ones."""
    monkeypatch.setattr(cpu, "SMALL_MODEL_BYTES", 0)
    monkeypatch.setattr(cpu, "PARALLEL_MIN", 0)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("n_tokens", [1, 5, 60])
def test_threads_do_not_change_a_bit(n_tokens: int) -> None:
    layer = random_layer(1, hidden_size=64, intermediate_size=48, weight_dtype=DType.BF16)
    call = draw(layer, n_tokens, 4)
    alone = run(cpu.CpuBackend({0: layer}, threads=1), *call)
    for threads in (2, 5):
        np.testing.assert_array_equal(run(cpu.CpuBackend({0: layer}, threads), *call), alone)


@pytest.mark.usefixtures("streamed")
def test_an_error_on_a_helper_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(2)
    backend = cpu.CpuBackend({0: layer}, threads=3)

    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(cpu_layer, "multiply", fail)
    with pytest.raises(MemoryError, match="no room"):
        run(backend, *draw(layer, 20, 4))


@pytest.mark.usefixtures("streamed")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_starts_threads_of_its_own() -> None:
    layer = random_layer(3)
    call = draw(layer, 20, 4)
    backend = cpu.CpuBackend({0: layer}, threads=2)
    expected = run(backend, *call)
    parents_pool = backend._team._pool
    assert parents_pool is not None
    child = os.fork()
    if child == 0:
        is_same = np.array_equal(run(backend, *call), expected)
        os._exit(0 if is_same and backend._team._pool is not parents_pool else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_long_calls_are_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(4)
    hidden, ids, weights = draw(layer, 50, 3)
    expected = reference_ffn(layer, hidden, ids, weights)
    monkeypatch.setattr(cpu, "MAX_ROWS", 24)
    found = run(cpu.CpuBackend({0: layer}), hidden, ids, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DType)
def test_multiply_over_several_blocks(
    monkeypatch: pytest.MonkeyPatch, storage: str, dtype: DType
) -> None:
    monkeypatch.setattr(cpu_matmul, "BLOCK_ELEMENTS", 100)
    expert = random_layer(5, weight_dtype=dtype, storage=storage).expert(0)
    rng = np.random.default_rng(6)
    for weights in (expert.gate_proj, expert.down_proj):
        for shape in ((weights.shape[1],), (weights.shape[1], 7)):
            x = rng.standard_normal(shape).astype(np.float32)
            out = np.full((len(weights), *shape[1:]), np.nan, np.float32)
            assert sum(cpu_matmul.multiply(weights, [x], [out])) > 0
            np.testing.assert_allclose(out, widen(weights) @ x, rtol=1e-5, atol=1e-5)


def test_mapped_weights_are_used_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither loading nor preparing copies a matrix, fused or not."""
    monkeypatch.setattr(cpu, "SMALL_MODEL_BYTES", 0)
    for model_type, stacked in (("qwen3_moe", False), ("qwen3_moe", True), ("gpt_oss", True)):
        path = tmp_path / f"{model_type}{stacked}"
        write_model(path, model_type, stacked=stacked)
        layer = checkpoint.load(path).layers[0]
        backend = cpu.CpuBackend({0: layer})
        weights = layer.expert(1)
        matrices = backend._layers[0].experts[1].gate_up
        assert sum(matrix.nbytes for matrix in matrices) == 2 * weights.gate_proj.nbytes
        assert np.shares_memory(matrices[0], weights.gate_proj)
        assert np.shares_memory(matrices[-1], weights.up_proj)
        assert not matrices[0].flags.writeable


# --- null -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("out_dtype", DType)
def test_null_answers_every_row_with_itself(dtype: DType, out_dtype: DType) -> None:
    layer = random_layer(7)
    hidden, ids, weights = draw(layer, 4, 2)
    stored = narrow(hidden, dtype)
    out = np.zeros(hidden.shape, out_dtype.numpy)
    backend = NullBackend({0: layer.info})
    backend.ffn(0, stored, ids, weights, out)
    assert backend.layers[0] is layer.info
    assert backend.name == "null"
    expected = stored if dtype is out_dtype else narrow(widen(stored), out_dtype)
    np.testing.assert_array_equal(out, expected)
