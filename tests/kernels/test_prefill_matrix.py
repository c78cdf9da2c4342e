"""The prefill kernels by matrix instructions, mma and wgmma: one suite for both."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest

from moeshm.backends import Ids, Weights
from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import ExpertLayer
from moeshm.dtypes import Array, DType, widen
from moeshm.layers import Activation
from tests.checkpoints import random_layer
from tests.kernels.harness import ORDERS, Problem, assert_close, draw, same_bits
from tests.simt import Order

FORMATS = (DType.BF16, DType.F16)


@dataclass(frozen=True)
class Variant:
    """How a source is compiled, and the bytes of dynamic shared memory that it asks for."""

    file: str
    tile_rows: int
    shared_bytes: int
    block: int = 256
    macros: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join(map(str, (self.file, self.tile_rows, *self.macros.values())))


def mma(tile_rows: int) -> Variant:
    return Variant("prefill_mma.cu", tile_rows, 3 * (tile_rows + 128) * 128 + 1024)


def wgmma(tile_rows: int, stages: int) -> Variant:
    shared_bytes = stages * (tile_rows + 256) * 128 + 11264
    return Variant("prefill_wgmma.cu", tile_rows, shared_bytes, 384, {"STAGES": stages})


#: With two stages a mistake of the ring shows soonest, and with few widths it compiles soonest.
VARIANTS = (mma(32), mma(64), mma(128), wgmma(64, 2))
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
one_of_each = pytest.mark.parametrize("variant", [mma(64), wgmma(64, 2)], ids=str)
#: Among them what choice.py takes.
tall_ones_too = pytest.mark.parametrize("variant", [*VARIANTS, wgmma(144, 4)], ids=str)


def run(
    variant: Variant,
    layer: ExpertLayer,
    call: tuple[Array, Ids, Weights],
    *,
    grid: int = 3,
    order: Order = "forward",
    out_dtype: DType = DType.F32,
) -> Array:
    """The answer of route, both products and combine."""
    kept = layer.info.weight_dtype
    problem = Problem(
        layer, *call, out_dtype=out_dtype, kept_dtype=kept, tile_rows=variant.tile_rows
    )
    problem.launch("route.cu", "route", 1, 512, TILE_ROWS=variant.tile_rows)
    for kernel in ("prefill_gate_up", "prefill_down"):
        problem.launch(
            variant.file,
            kernel,
            grid,
            variant.block,
            variant.shared_bytes,
            order=order,
            TILE_ROWS=variant.tile_rows,
            **variant.macros,
        )
    problem.launch("combine.cu", "combine", 2, 256, PARTIAL="WEIGHT")
    return problem.out


def check(variant: Variant, layer: ExpertLayer, call: tuple[Array, Ids, Weights]) -> None:
    found = run(variant, layer, call)
    assert_close(found, reference_ffn(layer, *call), layer.info.weight_dtype)


def one_expert(layer: ExpertLayer, seed: int, n_tokens: int) -> tuple[Array, Ids, Weights]:
    """A call whose tokens all want the last expert."""
    x, ids, weights = draw(seed, layer, n_tokens, 1, x_dtype=layer.info.weight_dtype, empty=0)
    ids[...] = len(layer) - 1
    return x, ids, weights


# --- numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "weight_dtype"), list(zip(Activation, FORMATS * 2, strict=True)), ids=str
)
@one_of_each
def test_activations_and_formats(
    variant: Variant, activation: Activation, weight_dtype: DType
) -> None:
    """Not each with each: what is activated are sums, in float32 whatever the weights' format."""
    has_bias = activation is Activation.SWIGLU_CLAMPED
    layer = random_layer(
        1,
        hidden_size=136,
        intermediate_size=72,
        weight_dtype=weight_dtype,
        activation=activation,
        has_bias=has_bias,
    )
    check(variant, layer, draw(2, layer, 70, 2, x_dtype=weight_dtype))


@pytest.mark.parametrize("out_dtype", DType)
def test_answer_in_another_format(out_dtype: DType) -> None:
    layer = random_layer(3, weight_dtype=DType.F16)
    call = draw(4, layer, 9, 2, x_dtype=DType.F16)
    found = run(mma(32), layer, call, out_dtype=out_dtype)
    assert_close(found, reference_ffn(layer, *call), max(out_dtype, DType.F16))


ODD_SHAPES = ((8, 8), (24, 136), (200, 64), (328, 200), (520, 264))


@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        *itertools.product((mma(64), wgmma(64, 2)), ODD_SHAPES),
        # The heights of tiles have no part in how rows of weights are cut.
        *itertools.product((mma(32), mma(128)), ODD_SHAPES[-1:]),
    ],
    ids=str,
)
def test_odd_shapes(variant: Variant, shape: tuple[int, int]) -> None:
    hidden_size, intermediate_size = shape
    layer = random_layer(
        5,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=3,
        weight_dtype=DType.BF16,
        has_bias=True,
    )
    check(variant, layer, draw(6, layer, 41, 2, x_dtype=DType.BF16))


@pytest.mark.parametrize("n_tokens", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200])
@tall_ones_too
def test_tiles_that_are_not_full(variant: Variant, n_tokens: int) -> None:
    layer = random_layer(7, weight_dtype=DType.F16)
    check(variant, layer, one_expert(layer, n_tokens, n_tokens))


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 8, 13, 16])
@one_of_each
def test_top_k(variant: Variant, top_k: int) -> None:
    layer = random_layer(9, num_experts=19, top_k=top_k, weight_dtype=DType.F16)
    check(variant, layer, draw(top_k, layer, 33, top_k, x_dtype=DType.F16))


@every_variant
def test_the_same_expert_twice_for_a_token(variant: Variant) -> None:
    layer = random_layer(11, weight_dtype=DType.F16)
    x, ids, weights = draw(12, layer, 20, 4, x_dtype=DType.F16, empty=0)
    ids[:, 2] = ids[:, 0]
    check(variant, layer, (x, ids, weights))


@every_variant
def test_no_expert_at_all(variant: Variant) -> None:
    layer = random_layer(13, weight_dtype=DType.F16)
    x, ids, weights = draw(14, layer, 5, 2, x_dtype=DType.F16)
    ids[...] = -1
    assert not run(variant, layer, (x, ids, weights)).any()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@every_variant
def test_a_poisoned_token_stays_alone(variant: Variant, poison: float) -> None:
    layer = random_layer(15, hidden_size=72, weight_dtype=DType.F16)
    x, ids, weights = draw(16, layer, 40, 2, x_dtype=DType.F16, empty=0)
    x[7] = poison
    found = run(variant, layer, (x, ids, weights))
    assert np.isnan(widen(found[7])).all()
    others = np.arange(40) != 7
    expected = reference_ffn(layer, x, ids, weights)
    assert_close(found[others], expected[others], DType.F16)


# --- who does what ----------------------------------------------------------------------


@every_variant
def test_more_tasks_than_a_block_lists_at_once(variant: Variant) -> None:
    layer = random_layer(
        17, hidden_size=136, intermediate_size=8, num_experts=70, weight_dtype=DType.F16
    )
    call = draw(18, layer, 150, 1, x_dtype=DType.F16, empty=0)
    found = run(variant, layer, call, grid=1, order="reverse")
    assert_close(found, reference_ffn(layer, *call), DType.F16)


@tall_ones_too
def test_more_tiles_than_share_a_strip_of_weights(variant: Variant) -> None:
    layer = random_layer(
        19, hidden_size=264, intermediate_size=8, num_experts=2, weight_dtype=DType.F16
    )
    n_tokens = 9 * variant.tile_rows + 1
    x, ids, weights = one_expert(layer, 20, n_tokens)
    ids[: n_tokens // 50] = 0
    check(variant, layer, (x, ids, weights))


@every_variant
def test_any_grid_gives_the_same_bits(variant: Variant) -> None:
    layer = random_layer(21, hidden_size=264, intermediate_size=136, weight_dtype=DType.F16)
    call = draw(22, layer, 60, 2, x_dtype=DType.F16)
    first = run(variant, layer, call, grid=1)
    for grid in (7, 100):
        assert same_bits(run(variant, layer, call, grid=grid), first), grid


@tall_ones_too
def test_any_order_gives_the_same_bits(variant: Variant) -> None:
    layer = random_layer(23, hidden_size=264, intermediate_size=136, weight_dtype=DType.F16)
    call = draw(24, layer, 70, 2, x_dtype=DType.F16)
    orders = ORDERS[:3]
    answers = [run(variant, layer, call, order=order) for order in orders]
    assert_close(answers[0], reference_ffn(layer, *call), DType.F16)
    for order, answer in zip(orders, answers, strict=True):
        assert same_bits(answer, answers[0]), order
