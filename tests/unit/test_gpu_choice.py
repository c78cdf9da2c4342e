"""Which kernels the GPU backend chooses, and that every launch is one that a card can make."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from moeshm.backends.gpu import choice
from moeshm.backends.gpu.choice import Plan, Shape, Size
from moeshm.backends.gpu.device import Features
from moeshm.dtypes import DType
from moeshm.errors import SettingError
from moeshm.layers import Activation, LayerInfo
from moeshm.settings import KERNELS


def card(arch: str, multiprocessors: int, shared_kib: int, *has: str, warp: int = 32) -> Features:
    """What such a card is."""
    return Features(
        name=f"a card of {arch}",
        arch=arch,
        warp=warp,
        multiprocessors=multiprocessors,
        shared_bytes=shared_kib << 10,
        total_bytes=16 << 30,
        has_mma="mma" in has,
        has_overlap="overlap" in has,
        has_wgmma="wgmma" in has,
    )


PASCAL = card("sm_61", 28, 48)
AMPERE = card("sm_86", 84, 99, "mma")
HOPPER = card("sm_90", 132, 227, "mma", "overlap", "wgmma")
AMD = card("gfx90a", 104, 64, warp=64)
CARDS = {features.arch: features for features in (PASCAL, AMPERE, HOPPER, AMD)}

QWEN = Shape(2048, 768, DType.BF16, Activation.SWIGLU, False)
#: hidden_size, intermediate_size, experts of the shapes that are measured, and odd ones.
MODELS = [(2048, 768, 128), (2048, 512, 256), (4096, 14336, 8), (2880, 2880, 128), (8, 64, 1)]
SIZES = [
    Size(n_tokens, top_k, n_slots)
    for n_tokens in (1, 2, 7, 32, 33, 128, 129, 512, 4096)
    for top_k in (1, 2, 8, 16)
    for n_slots in (1, 8, 256, 1025)
]


def plans(features: Features, **wanted: str) -> Iterator[tuple[Shape, Size, Plan]]:
    """Of many shapes and sizes, in every pair of formats."""
    for (hidden, inner, _), dtype, x_dtype in itertools.product(MODELS, DType, DType):
        shape = Shape(hidden, inner, dtype, Activation.SWIGLU, False)
        for size in SIZES:
            yield shape, size, choice.plan(shape, size, x_dtype, features, wanted)


def kernels_of(
    features: Features, x_dtype: DType, weight_dtype: DType, n_tokens: int, **wanted: str
) -> str:
    """The name of the file that multiplies."""
    shape = QWEN._replace(weight_dtype=weight_dtype)
    plan = choice.plan(shape, Size(n_tokens, 8, 128), x_dtype, features, wanted)
    return next(step.file for step in plan.steps if step.file != "route.cu").partition(".")[0]


# --- what is chosen -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "n_tokens", "expected"),
    [
        (PASCAL, 1, "decode_fma"),
        (PASCAL, 33, "prefill_fma"),
        (AMPERE, 128, "decode_mma"),
        (AMPERE, 129, "prefill_mma"),
        (HOPPER, 1, "decode_mma"),
        (HOPPER, 4096, "prefill_wgmma"),
        (AMD, 4, "decode_fma"),
        (AMD, 400, "prefill_fma"),
    ],
)
def test_kernels_of_a_card(features: Features, n_tokens: int, expected: str) -> None:
    assert kernels_of(features, DType.BF16, DType.BF16, n_tokens) == expected


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "uses_mma"),
    [
        (DType.BF16, DType.BF16, True),
        (DType.F16, DType.F16, True),
        # Are rounded, within bfloat16's range and tolerance.
        (DType.F32, DType.BF16, True),
        (DType.F16, DType.BF16, True),
        # Would overflow.
        (DType.F32, DType.F16, False),
        (DType.BF16, DType.F16, False),
        (DType.F32, DType.F32, False),
        (DType.BF16, DType.F32, False),
        (DType.F16, DType.F32, False),
    ],
)
@pytest.mark.parametrize("n_tokens", [1, 100])
def test_formats_that_matrix_instructions_take(
    x_dtype: DType, weight_dtype: DType, uses_mma: bool, n_tokens: int
) -> None:
    found = kernels_of(AMPERE, x_dtype, weight_dtype, n_tokens)
    assert found.endswith("mma") and not found.endswith("fma") if uses_mma else "fma" in found


def test_formats_in_between() -> None:
    for shape, _, plan in plans(HOPPER):
        uses_fma = any("fma" in step.file for step in plan.steps)
        assert plan.kept_dtype is (DType.F32 if uses_fma else shape.weight_dtype)
        if not uses_fma:
            assert plan.x_dtype is shape.weight_dtype


@pytest.mark.parametrize(
    ("size", "few"),
    [
        (Size(128, 8, 1024), {"mma"}),
        (Size(129, 1, 8), set()),
        (Size(128, 9, 64), set()),
        (Size(1, 8, 1025), set()),
        (Size(32, 16, 1024), {"mma", "fma"}),
        (Size(33, 1, 8), {"mma"}),
        (Size(32, 17, 64), {"mma"}),
    ],
)
def test_what_is_too_much_for_decode_kernels(size: Size, few: set[str]) -> None:
    for kernels in ("mma", "fma"):
        plan = choice.plan(QWEN, size, DType.BF16, AMPERE, {"decode": kernels})
        assert plan.steps[-1].file.startswith("decode") == (kernels in few)


# --- overrides ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KERNELS)
def test_every_kernel_can_be_asked_for(kind: str) -> None:
    n_tokens = 1 if kind == "decode" else 1000
    for kernels in KERNELS[kind]:
        found = kernels_of(HOPPER, DType.BF16, DType.BF16, n_tokens, **{kind: kernels})
        assert found == f"{kind}_{kernels}"
        other = kernels_of(HOPPER, DType.BF16, DType.BF16, 1001 - n_tokens, **{kind: kernels})
        assert other.startswith("prefill" if kind == "decode" else "decode")
        # What cannot multiply these is not forced to.
        found = kernels_of(HOPPER, DType.F32, DType.F32, n_tokens, **{kind: kernels})
        assert found == f"{kind}_fma"


def test_kernels_that_the_card_has_not() -> None:
    choice.check_wanted({"decode": "fma", "prefill": "fma"}, PASCAL)
    choice.check_wanted({"decode": "mma", "prefill": "wgmma"}, HOPPER)
    with pytest.raises(
        SettingError, match=r"prefill=wgmma, which .*sm_86.* cannot run; choose mma, fma"
    ):
        choice.check_wanted({"prefill": "wgmma"}, AMPERE)


# --- launches -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", CARDS)
def test_launches_fit_the_card(arch: str) -> None:
    features = CARDS[arch]
    for shape, size, plan in plans(features):
        for step in plan.steps:
            what = (shape, size, step)
            assert 1 <= step.grid <= 8 * features.multiprocessors, what
            assert step.block % features.warp == 0, what
            assert step.block <= 1024, what
            assert step.shared_bytes <= features.shared_bytes - 1024, what


def test_only_decode_goes_without_a_route() -> None:
    for _, _, plan in plans(HOPPER):
        routes = [step for step in plan.steps if step.kernel == "route"]
        assert bool(routes) == (plan.tile_rows > 0) == (not plan.steps[0].file.startswith("decode"))
        if routes:
            assert plan.steps[0] is routes[0]
            assert plan.steps[-1].kernel == "combine"
            rows = {dict(step.macros).get("TILE_ROWS") for step in plan.steps[:-1]}
            assert rows == {plan.tile_rows}


def test_tiles_grow_with_the_pairs_of_an_expert() -> None:
    def rows(n_tokens: int) -> int:
        size = Size(n_tokens, 8, 128)
        return choice.plan(QWEN, size, DType.BF16, AMPERE, {}).tile_rows

    assert [rows(n) for n in (129, 512, 513, 1024, 4096)] == [32, 32, 64, 64, 128]


def test_most_tiles_is_enough_and_not_too_much() -> None:
    for size in SIZES:
        for rows in (16, 64, 128):
            # The worst case: as many experts as there can be have one pair, the last has the rest.
            left = size.n_pairs - (size.most_experts - 1)
            worst = size.most_experts - 1 + -(-left // rows)
            assert worst <= size.most_tiles(rows) <= worst + -(-size.most_experts // rows)


# --- shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "hidden", "hidden_padded", "inner"),
    [
        (2048, 768, 2048, 2048, 768),
        (2880, 2880, 2880, 2880, 2880),
        (200, 1408, 200, 256, 1408),
        (33, 7, 40, 64, 64),
    ],
)
def test_padding(
    hidden_size: int, intermediate_size: int, hidden: int, hidden_padded: int, inner: int
) -> None:
    info = LayerInfo(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=1,
        top_k=1,
        experts=(0,),
        weight_dtype=DType.F16,
    )
    shape = Shape.of(info, has_bias=True)
    assert (shape.hidden, shape.hidden_padded, shape.inner) == (hidden, hidden_padded, inner)
    macros = shape.macros()
    assert (macros["HIDDEN"], macros["INNER"], macros["WEIGHT"]) == (hidden, inner, "f16")
    biases = 4 * (2 * inner + hidden_padded)
    assert shape.block_bytes == 2 * 3 * inner * hidden_padded + biases
    assert Shape.of(info, has_bias=False).block_bytes == shape.block_bytes - biases
