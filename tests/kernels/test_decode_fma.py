"""kernels/decode_fma.cu against the reference."""

from __future__ import annotations

import numpy as np
import pytest

from moeshm.backends import Ids, Weights
from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import ExpertLayer
from moeshm.dtypes import Array, DType
from moeshm.layers import Activation
from tests.simt import Order

from .harness import (
    ORDERS,
    Case,
    Problem,
    assert_close,
    assert_disturbs_no_other,
    assert_same_bits_of_any_grid,
    draw,
    same_bits,
)

F32, F16, BF16 = DType.F32, DType.F16, DType.BF16
SWIGLU, GEGLU, GEGLU_TANH, CLAMPED = Activation

#: Rows shorter than a warp's step, longer than a batch of steps, and whole batches; each format of
#: weights with each way in which rows are read.
CASES = [
    Case(8, 40, F32, SWIGLU, False, 32),
    Case(24, 64, F16, GEGLU, False, 64),
    Case(72, 128, BF16, GEGLU_TANH, False, 32),
    Case(136, 136, F32, CLAMPED, True, 64),
    Case(200, 64, BF16, CLAMPED, True, 32),
    Case(200, 192, F16, SWIGLU, True, 32),
    Case(384, 512, F32, GEGLU, True, 32),
    Case(1032, 576, F32, CLAMPED, False, 32),
    Case(512, 1024, BF16, SWIGLU, False, 32),
    Case(1032, 576, BF16, SWIGLU, False, 64),
    Case(520, 256, F16, GEGLU_TANH, False, 32),
]


def run(
    layer: ExpertLayer,
    x: Array,
    ids: Ids,
    weights: Weights,
    *,
    out_dtype: DType = F32,
    warp: int = 32,
    grid: int = 3,
    order: Order = "forward",
) -> Array:
    problem = Problem(layer, x, ids, weights, out_dtype=out_dtype, warp=warp)
    run_problem(problem, grid, order)
    return problem.out


def _sizes(case: Case, x_dtype: DType) -> list[tuple[int, int]]:
    """Wide layers have few tokens: those are for what a row is cut into. Each size then has one
    format, and each format a size."""
    if case.hidden_size < 300:
        return [(1, 1), (2, 16), (5, 3), (17, 2)]
    return [[(1, 1), (3, 2)], [(2, 16)], [(5, 3)]][x_dtype]


def run_problem(problem: Problem, grid: int = 3, order: Order = "forward") -> None:
    shared = problem.call.n_tokens * problem.call.top_k * 32
    problem.launch("decode_fma.cu", "decode_gate_up", grid, 256, order=order)
    problem.launch("decode_fma.cu", "decode_down", grid, 256, shared, order=order)


@pytest.mark.parametrize("x_dtype", DType)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_the_reference(case: Case, x_dtype: DType) -> None:
    """Sums are float32's, whatever the formats; only what is written is rounded."""
    layer = case.layer(1)
    for i, (n_tokens, top_k) in enumerate(_sizes(case, x_dtype)):
        out_dtype = tuple(DType)[(i + x_dtype) % 3]
        x, ids, weights = draw(i, layer, n_tokens, top_k, x_dtype=x_dtype)
        out = run(
            layer, x, ids, weights, out_dtype=out_dtype, warp=case.warp, grid=4, order=ORDERS[i]
        )
        assert_close(out, reference_ffn(layer, x, ids, weights), out_dtype)


@pytest.mark.parametrize("top_k", range(1, 17))
def test_every_number_of_slots(top_k: int) -> None:
    n_tokens = (1, 3, 7, 32)[top_k % 4]
    layer = CASES[3].layer(2, num_experts=40)
    x, ids, weights = draw(top_k, layer, n_tokens, top_k)
    out = run(layer, x, ids, weights, warp=64, grid=5)
    assert_close(out, reference_ffn(layer, x, ids, weights), F32)


@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=str)
@pytest.mark.parametrize(("n_tokens", "top_k"), [(9, 1), (32, 1), (31, 3), (32, 16)])
def test_all_pairs_on_one_expert(case: Case, n_tokens: int, top_k: int) -> None:
    """Ids that repeat within a token included; the other experts have no pairs."""
    layer = case.layer(3)
    x, ids, weights = draw(3, layer, n_tokens, top_k)
    ids[...], weights = 4, np.nan_to_num(weights)
    out = run(layer, x, ids, weights, warp=case.warp)
    assert_close(out, reference_ffn(layer, x, ids, weights), F32)


@pytest.mark.parametrize("grid", [1, 4])
def test_a_token_without_experts_gets_zeros(grid: int) -> None:
    layer = CASES[4].layer(4)
    x, ids, weights = draw(4, layer, 3, 2, empty=0)
    ids[1], weights[1] = -1, np.nan
    out = run(layer, x, ids, weights, grid=grid)
    assert same_bits(out[1], np.zeros_like(out[1]))
    assert_close(out, reference_ffn(layer, x, ids, weights), F32)
    out = run(layer, x, np.full_like(ids, -1), np.full_like(weights, np.nan), grid=grid)
    assert same_bits(out, np.zeros_like(out))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_disturbs_no_other(bad: float) -> None:
    layer = CASES[5].layer(5)
    assert_disturbs_no_other(run, layer, draw(5, layer, 7, 4), bad)


@pytest.mark.parametrize("case", [CASES[7], CASES[9]], ids=str)
def test_same_bits_whatever_the_grid_and_the_order(case: Case) -> None:
    layer = case.layer(6, num_experts=4)
    call = draw(6, layer, 20, 4, x_dtype=BF16)
    assert_same_bits_of_any_grid(run, layer, call, warp=case.warp)


def test_what_lies_between_is_float32() -> None:
    """Activations out of float16's range, with weights in that format."""
    layer = CASES[5].layer(7)
    x, ids, weights = draw(7, layer, 2, 2)
    problem = Problem(layer, x * 300, ids, weights)
    run_problem(problem)
    assert np.nanmax(np.abs(problem.inner)) > np.finfo(np.float16).max
    assert_close(problem.out, reference_ffn(layer, x * 300, ids, weights), F32)
