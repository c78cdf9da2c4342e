"""Adding rows, and what is refused; the conversions are checked in test_dtypes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeshm._formats import add_rows, convert
from moeshm.dtypes import DType, narrow, widen


@given(
    st.integers(1, 40), st.integers(1, 70), st.sampled_from(list(DType)), st.integers(0, 2**32 - 1)
)
def test_rows_are_added_to_theirs_and_no_others(
    n_tokens: int, width: int, dtype: DType, seed: int
) -> None:
    random = np.random.default_rng(seed)
    rows = np.flatnonzero(random.random(n_tokens) < 0.5)
    part = narrow(random.standard_normal((len(rows), width)).astype(np.float32), dtype)
    total = random.standard_normal((n_tokens, width)).astype(np.float32)
    expected = total.copy()
    expected[rows] += widen(part)
    add_rows(total, rows, part)
    np.testing.assert_array_equal(total, expected)


def test_all_rows_without_numbers_also_of_large_arrays() -> None:
    part = np.ones((300, 200), np.float32)
    total = np.full((300, 200), 2, np.float32)
    add_rows(total, None, part)
    assert (total == 3).all()


@pytest.mark.parametrize("rows", [[0, 3], [-1, 0]])
def test_a_row_that_is_not_there_is_refused_before_anything_is_added(rows: list[int]) -> None:
    total = np.zeros((3, 2), np.float32)
    with pytest.raises(IndexError, match="of 3"):
        add_rows(total, np.array(rows), np.ones((2, 2), np.float32))
    assert not total.any()


@pytest.mark.parametrize("source", DType)
@pytest.mark.parametrize("target", DType)
def test_every_format_converts_to_every_other_through_float32(source: DType, target: DType) -> None:
    every = np.arange(1 << 16, dtype=np.uint32)
    values = (every << 16 | every).view(np.float32)
    stored = narrow(values[np.isfinite(values)], source)
    found = np.empty(stored.shape, target.numpy)
    convert(stored, found)
    np.testing.assert_array_equal(found, narrow(widen(stored), target))


def test_the_portable_loops_agree_with_the_instructions() -> None:
    """Fewer than 8 values at a time never meet F16C."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    # Every half, its neighbours, and what lies between two halves.
    floats = widen(halves).view(np.uint32)
    floats = np.concatenate([floats, floats + 1, floats - 1, floats + 0x1000]).view(np.float32)
    for values, dtype in ((halves, DType.F32), (floats, DType.F16), (floats, DType.BF16)):
        at_once = np.empty(values.shape, dtype.numpy)
        in_sevens = np.empty(values.shape, dtype.numpy)
        convert(values, at_once)
        for start in range(0, len(values), 7):
            convert(values[start : start + 7], in_sevens[start : start + 7])
        first, second = widen(at_once), widen(in_sevens)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(np.signbit(first), np.signbit(second))


def test_other_shapes_and_formats_are_refused() -> None:
    total = np.zeros((3, 2), np.float32)
    with pytest.raises(ValueError, match="2 rows for 3 tokens"):
        add_rows(total, None, np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match="rows of 4 values"):
        add_rows(total, None, np.ones((3, 4), np.float32))
    with pytest.raises(ValueError, match="1 row numbers for 2 rows"):
        add_rows(total, np.array([1]), np.ones((2, 2), np.float32))
    with pytest.raises(TypeError, match="rows must be"):
        add_rows(total, np.array([1, 2], np.int32), np.ones((2, 2), np.float32))
    with pytest.raises(TypeError, match="add float64"):
        add_rows(total, None, np.ones((3, 2)))
    with pytest.raises(TypeError, match="add float32"):
        add_rows(total, None, np.ones((2, 3), np.float32).T)
    with pytest.raises(TypeError, match="from float64"):
        convert(np.zeros((1, 1)), np.zeros((1, 1), np.float32))
    with pytest.raises(ValueError, match="different shapes"):
        convert(np.zeros((1, 2), np.float32), np.zeros((2, 1), np.float32))
    locked = np.zeros((3, 2), np.float32)
    locked.flags.writeable = False
    with pytest.raises(TypeError, match="contiguous"):
        add_rows(locked, None, np.ones((3, 2), np.float32))
