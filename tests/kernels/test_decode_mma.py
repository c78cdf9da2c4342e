"""kernels/decode_mma.cu against the reference."""

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

F16, BF16 = DType.F16, DType.BF16
SWIGLU, GEGLU, GEGLU_TANH, CLAMPED = Activation

#: Rows of one chunk of 64 and less, of batches that are not full, and of several batches a warp.
CASES = [
    Case(8, 40, F16, SWIGLU, False, 32),
    Case(24, 64, BF16, GEGLU, False, 32),
    Case(72, 128, F16, GEGLU_TANH, False, 32),
    Case(136, 136, BF16, CLAMPED, True, 32),
    Case(200, 192, F16, CLAMPED, True, 32),
    Case(520, 320, BF16, SWIGLU, True, 32),
    Case(1096, 576, F16, GEGLU, False, 32),
]
#: DOWN_WARPS, DOWN_SPLIT and DOWN_ROWS.
DOWNS = [(16, 1, 16), (16, 2, 16), (16, 16, 8), (8, 8, 8), (8, 1, 8), (8, 4, 16)]


def run(
    layer: ExpertLayer,
    x: Array,
    ids: Ids,
    weights: Weights,
    *,
    out_dtype: DType = DType.F32,
    down: tuple[int, int, int] = (16, 2, 16),
    grid: int = 3,
    order: Order = "forward",
) -> Array:
    problem = Problem(
        layer,
        x,
        ids,
        weights,
        out_dtype=out_dtype,
        kept_dtype=layer.info.weight_dtype,
    )
    warps, split, rows = down
    macros = {"GATE_UP_WARPS": 8, "DOWN_WARPS": warps, "DOWN_SPLIT": split, "DOWN_ROWS": rows}
    shared = split * ids.size * rows * 4
    problem.launch("decode_mma.cu", "decode_gate_up", grid, 256, order=order, **macros)
    problem.launch("decode_mma.cu", "decode_down", grid, warps * 32, shared, order=order, **macros)
    return problem.out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_the_reference(case: Case) -> None:
    layer = case.layer(1)
    for i, (n_tokens, top_k) in enumerate([(1, 1), (2, 16), (5, 3), (17, 2)]):
        out_dtype = tuple(DType)[(i + case.hidden_size // 8) % 3]
        x, ids, weights = draw(i, layer, n_tokens, top_k, x_dtype=case.weight_dtype)
        # Two for a case; the next test has all of them.
        down = DOWNS[(i // 2 + case.hidden_size // 8) % len(DOWNS)]
        out = run(layer, x, ids, weights, out_dtype=out_dtype, down=down, grid=4, order=ORDERS[i])
        expected = reference_ffn(layer, x, ids, weights)
        assert_close(out, expected, max(out_dtype, case.weight_dtype))


@pytest.mark.parametrize("down", DOWNS)
def test_every_way_to_share_out_the_rows(down: tuple[int, int, int]) -> None:
    layer = CASES[5].layer(2, num_experts=20)
    for n_tokens, top_k in [(1, 4), (9, 5)]:
        x, ids, weights = draw(n_tokens, layer, n_tokens, top_k, x_dtype=BF16)
        out = run(layer, x, ids, weights, down=down)
        assert_close(out, reference_ffn(layer, x, ids, weights), BF16)


@pytest.mark.parametrize("top_k", range(1, 17))
def test_every_number_of_slots(top_k: int) -> None:
    n_tokens = (1, 3, 7, 32)[top_k % 4]
    layer = CASES[4].layer(2, num_experts=40)
    x, ids, weights = draw(top_k, layer, n_tokens, top_k, x_dtype=F16)
    out = run(layer, x, ids, weights, grid=5)
    assert_close(out, reference_ffn(layer, x, ids, weights), F16)


@pytest.mark.parametrize(
    ("n_tokens", "top_k"), [(7, 1), (8, 1), (9, 1), (16, 1), (25, 1), (32, 1), (11, 3), (32, 16)]
)
def test_all_pairs_on_one_expert(n_tokens: int, top_k: int) -> None:
    """Ids that repeat within a token included; the other experts have no pairs."""
    layer = CASES[2].layer(3)
    x, ids, weights = draw(3, layer, n_tokens, top_k, x_dtype=F16)
    ids[...], weights = 4, np.nan_to_num(weights)
    out = run(layer, x, ids, weights)
    assert_close(out, reference_ffn(layer, x, ids, weights), F16)


@pytest.mark.parametrize("order", [*ORDERS, 3, 4])
@pytest.mark.parametrize(("n_tokens", "top_k"), [(40, 1), (115, 4)])
def test_an_expert_that_several_blocks_visit(n_tokens: int, top_k: int, order: Order) -> None:
    """Each block lists its pairs for itself: what one leaves to another, that must have."""
    layer = CASES[2].layer(3)
    x, ids, weights = draw(5, layer, n_tokens, top_k, x_dtype=F16)
    ids[:, 0], weights = 4, np.nan_to_num(weights)
    out = run(layer, x, ids, weights, grid=7, order=order)
    assert_close(out, reference_ffn(layer, x, ids, weights), F16)


def test_an_expert_named_twice_by_the_only_token() -> None:
    layer = CASES[2].layer(3)
    x, _ids, weights = draw(3, layer, 1, 5, x_dtype=F16)
    ids = np.array([[2, -1, 2, 0, 2]], np.int32)
    weights[...] = [[0.5, np.nan, 0.25, 1, 2]]
    assert_close(run(layer, x, ids, weights), reference_ffn(layer, x, ids, weights), F16)


@pytest.mark.parametrize("grid", [1, 4])
def test_a_token_without_experts_gets_zeros(grid: int) -> None:
    layer = CASES[3].layer(4)
    x, ids, weights = draw(4, layer, 3, 2, x_dtype=BF16, empty=0)
    ids[1], weights[1] = -1, np.nan
    out = run(layer, x, ids, weights, grid=grid)
    assert same_bits(out[1], np.zeros_like(out[1]))
    assert_close(out, reference_ffn(layer, x, ids, weights), BF16)
    for n_tokens in (1, 3):
        none = np.full_like(ids[:n_tokens], -1)
        out = run(layer, x[:n_tokens], none, weights[:n_tokens], grid=grid)
        assert same_bits(out, np.zeros_like(out))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_token_that_is_not_finite_disturbs_no_other(bad: float) -> None:
    layer = CASES[4].layer(5)
    assert_disturbs_no_other(run, layer, draw(5, layer, 7, 4, x_dtype=F16), bad)


def test_same_bits_whatever_the_grid_and_the_order() -> None:
    layer = CASES[6].layer(6, num_experts=4)
    call = draw(6, layer, 20, 4, x_dtype=F16)
    assert_same_bits_of_any_grid(run, layer, call)
