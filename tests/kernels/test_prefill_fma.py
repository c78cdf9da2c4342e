"""kernels/route.cu, prefill_fma.cu and combine.cu, one after the other, against the reference."""

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

CASES = [
    Case(8, 40, F32, SWIGLU, False, 32),
    Case(24, 64, F16, GEGLU, False, 64),
    Case(72, 128, BF16, GEGLU_TANH, False, 32),
    Case(136, 136, F32, CLAMPED, True, 64),
    Case(200, 64, BF16, CLAMPED, True, 32),
    Case(200, 192, F16, SWIGLU, True, 32),
    Case(264, 64, F32, GEGLU_TANH, False, 32),
]
TILE_ROWS = (16, 32, 64)
#: Of each case: all three with weights of 32 bits, and with those of 16.
CASES_TILE_ROWS = (16, 32, 64, 32, 16, 64, 64)


def run(
    layer: ExpertLayer,
    x: Array,
    ids: Ids,
    weights: Weights,
    *,
    out_dtype: DType = F32,
    warp: int = 32,
    tile_rows: int = 32,
    grid: int = 3,
    order: Order = "forward",
) -> Array:
    problem = Problem(
        layer,
        x,
        ids,
        weights,
        out_dtype=out_dtype,
        tile_rows=tile_rows,
        warp=warp,
    )
    macros = {"TILE_ROWS": tile_rows}
    problem.launch("route.cu", "route", 2, 512, order=order, **macros)
    for kernel in ("prefill_gate_up", "prefill_down"):
        problem.launch("prefill_fma.cu", kernel, grid, 256, order=order, **macros)
    problem.launch("combine.cu", "combine", grid, 256, order=order, PARTIAL="float")
    return problem.out


@pytest.mark.parametrize("x_dtype", DType)
@pytest.mark.parametrize(
    ("case", "tile_rows"), list(zip(CASES, CASES_TILE_ROWS, strict=True)), ids=str
)
def test_close_to_the_reference(case: Case, tile_rows: int, x_dtype: DType) -> None:
    """Sums are float32's, whatever the formats; only what is written is rounded."""
    layer = case.layer(1)
    for i, (n_tokens, top_k) in enumerate([(1, 1), (7, 16), (65, 3), (130, 2)]):
        out_dtype = tuple(DType)[(i + x_dtype) % 3]
        x, ids, weights = draw(i, layer, n_tokens, top_k, x_dtype=x_dtype)
        options = {"warp": case.warp, "tile_rows": tile_rows}
        out = run(layer, x, ids, weights, out_dtype=out_dtype, grid=5, order=ORDERS[i], **options)
        assert_close(out, reference_ffn(layer, x, ids, weights), out_dtype)


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
@pytest.mark.parametrize("n_tokens", [2, 3, 5, 15, 16, 17, 31, 33, 63, 64, 96, 129])
def test_tiles_that_are_not_full(n_tokens: int, tile_rows: int) -> None:
    """All on one expert, so that the last tile has what the others leave."""
    layer = CASES[0].layer(n_tokens)
    x, ids, weights = draw(n_tokens, layer, n_tokens, 1, empty=0)
    ids[...] = 3
    out = run(layer, x, ids, weights, tile_rows=tile_rows)
    assert_close(out, reference_ffn(layer, x, ids, weights), F32)


def test_more_experts_than_pairs() -> None:
    layer = CASES[2].layer(3, num_experts=70)
    x, ids, weights = draw(3, layer, 5, 8)
    out = run(layer, x, ids, weights)
    assert_close(out, reference_ffn(layer, x, ids, weights), F32)


def test_a_token_without_experts_gets_zeros() -> None:
    layer = CASES[4].layer(4)
    x, ids, weights = draw(4, layer, 33, 2, empty=0)
    ids[1], weights[1] = -1, np.nan
    out = run(layer, x, ids, weights)
    assert same_bits(out[1], np.zeros_like(out[1]))
    assert_close(out, reference_ffn(layer, x, ids, weights), F32)
    out = run(layer, x, np.full_like(ids, -1), np.full_like(weights, np.nan))
    assert same_bits(out, np.zeros_like(out))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_disturbs_no_other(bad: float) -> None:
    layer = CASES[5].layer(5)
    assert_disturbs_no_other(run, layer, draw(5, layer, 40, 4), bad)


def test_same_bits_whatever_the_grid_and_the_order() -> None:
    layer = CASES[5].layer(6, num_experts=4)
    call = draw(6, layer, 100, 4, x_dtype=BF16)
    assert_same_bits_of_any_grid(run, layer, call)


def test_a_token_has_the_same_bits_whoever_is_beside_it() -> None:
    """Where a pair is in its tile changes nothing."""
    layer = CASES[3].layer(7)
    x, ids, weights = draw(7, layer, 60, 3)
    out = run(layer, x, ids, weights)
    order = np.random.default_rng(0).permutation(60)
    mixed = run(layer, x[order], ids[order], weights[order])
    assert same_bits(mixed, out[order])


def test_what_lies_between_is_float32() -> None:
    """Activations out of float16's range, with weights in that format."""
    layer = CASES[5].layer(8)
    x, ids, weights = draw(8, layer, 33, 2)
    out = run(layer, x * 300, ids, weights)
    assert np.abs(out).max() > np.finfo(np.float16).max
    assert_close(out, reference_ffn(layer, x * 300, ids, weights), F32)
