"""kernels/combine.cu and kernels/convert.cu."""

from __future__ import annotations

import numpy as np
import pytest

from moeshm.dtypes import DType, narrow, widen
from tests.checkpoints import random_layer
from tests.simt import guarded

from .harness import Problem, assert_close, draw, same_bits

FORMATS = {DType.F32: "float", DType.F16: "f16", DType.BF16: "bf16"}


def run(problem: Problem, partial: str, grid: int = 3, order: int = 1) -> None:
    problem.launch("combine.cu", "combine", grid, 256, order=order, PARTIAL=partial)


@pytest.mark.parametrize("out_dtype", DType)
@pytest.mark.parametrize("kept_dtype", DType)
@pytest.mark.parametrize(
    ("hidden_size", "n_tokens", "top_k"), [(8, 1, 1), (24, 33, 4), (136, 5, 9), (72, 130, 16)]
)
def test_weighted_sum(
    hidden_size: int, n_tokens: int, top_k: int, kept_dtype: DType, out_dtype: DType
) -> None:
    """Pairs without an expert are nowhere written, and have any weight."""
    layer = random_layer(0, hidden_size=hidden_size, weight_dtype=kept_dtype)
    x, ids, weights = draw(hidden_size, layer, n_tokens, top_k)
    problem = Problem(layer, x, ids, weights, out_dtype=out_dtype, kept_dtype=kept_dtype)
    rng = np.random.default_rng(1)
    outputs = narrow(rng.standard_normal(problem.partial.shape, np.float32), kept_dtype)
    is_there = ids.ravel() >= 0
    problem.partial[is_there] = outputs[is_there]
    run(problem, FORMATS[kept_dtype])
    wide = np.where(is_there[:, None], widen(outputs), 0).reshape(n_tokens, top_k, hidden_size)
    terms = wide * np.nan_to_num(weights)[..., None].astype(np.float64)
    assert_close(problem.out, terms.sum(axis=1), out_dtype)


def test_a_token_without_experts_gets_zeros() -> None:
    layer = random_layer(0)
    x, ids, weights = draw(0, layer, 3, 2, empty=0)
    ids[1], weights[1] = -1, np.nan
    problem = Problem(layer, x, ids, weights)
    problem.partial[:2] = problem.partial[4:] = 1
    run(problem, "float")
    assert same_bits(problem.out[1], np.zeros_like(problem.out[1]))
    assert np.isfinite(problem.out).all()


def test_same_bits_whatever_the_grid() -> None:
    layer = random_layer(0, hidden_size=72)
    x, ids, weights = draw(0, layer, 40, 8)
    outputs = np.random.default_rng(0).standard_normal((ids.size, 72), np.float32)
    found = []
    for grid in (1, 2, 100):
        problem = Problem(layer, x, ids, weights)
        problem.partial[...] = outputs
        run(problem, "float", grid)
        found.append(problem.out)
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


@pytest.mark.parametrize("to", DType)
@pytest.mark.parametrize("source", DType)
@pytest.mark.parametrize("grid", [1, 7])
def test_convert_is_the_package_s_own(source: DType, to: DType, grid: int) -> None:
    """Rounded to nearest, ties to even; NaN, infinities and subnormals included."""
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 1 << 32, (40, 200), np.uint32).view(np.float32)
    x = narrow(wide, source)
    layer = random_layer(0, hidden_size=200)
    problem = Problem(layer, x, np.full((40, 1), -1, np.int32), np.zeros((40, 1), np.float32))
    out = guarded(narrow(np.zeros((40, 200), np.float32), to))
    problem.call.out, problem.call.out_dtype = out.ctypes.data, to
    problem.launch("convert.cu", "convert", grid, 256)
    expected = narrow(widen(x), to)
    is_nan = np.isnan(widen(expected))
    assert np.array_equal(np.isnan(widen(out)), is_nan)
    assert same_bits(out[~is_nan], expected[~is_nan])
