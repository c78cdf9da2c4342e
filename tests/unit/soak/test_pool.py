"""The cases of a soak: what they mix, and which results are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeshm.dtypes import DType, narrow, widen
from moeshm.soak import pool
from moeshm.soak.pool import Case

from .cases import CASES, LAYERS, compute


def test_the_cases_mix_layers_formats_and_sizes() -> None:
    assert {case.layer for case in CASES} == set(LAYERS)
    assert {case.dtype for case in CASES} == {case.wire for case in CASES} == set(DType)
    sizes = [len(case.topk_ids) for case in pool.draw(LAYERS, seed=1)]
    assert min(sizes) == 1
    assert max(sizes) == 512
    assert any((case.topk_ids == -1).any() for case in CASES)


def test_a_right_result_is_right_whatever_it_travelled_in() -> None:
    for case in CASES:
        assert case.difference(compute(case)) == "", case


def test_cases_that_may_be_rounded_on_the_way_allow_for_it() -> None:
    for case in pool.draw(LAYERS, seed=8, coarsest=DType.BF16):
        assert case.difference(compute(case, DType.BF16)) == "", case


def test_a_seed_draws_the_same_cases_and_files_keep_them(tmp_path: Path) -> None:
    pool.save(CASES, tmp_path / "cases.npz")
    again = pool.draw(LAYERS, seed=7)
    for case, other, kept in zip(CASES, again, pool.load(tmp_path / "cases.npz"), strict=True):
        for each in (other, kept):
            assert str(each) == str(case)
            assert each.tolerance == case.tolerance
            for name in ("hidden_states", "topk_ids", "topk_weights", "expected"):
                np.testing.assert_array_equal(getattr(each, name), getattr(case, name))
    other_seed = pool.draw(LAYERS, seed=9)
    assert [str(case) for case in other_seed] != [str(case) for case in CASES]


def large_case() -> Case:
    return max(CASES, key=lambda case: len(case.topk_ids))


def changed(case: Case, row: int, change: Callable[[Any], Any]) -> Any:
    values = widen(compute(case)).copy()
    values[row] = change(values[row])
    return narrow(values, case.dtype)


@pytest.mark.parametrize(
    "change",
    [lambda row: row * 0, lambda row: row * 1.1, lambda row: row * np.nan, lambda row: row[::-1]],
    ids=["zeros", "a tenth more", "nan", "another order"],
)
def test_one_wrong_row_of_many_is_found(change: Callable[[Any], Any]) -> None:
    case = large_case()
    row = int(np.flatnonzero((case.topk_ids >= 0).any(axis=1))[-1])
    difference = case.difference(changed(case, row, change))
    assert difference.startswith(f"1 of {len(case.topk_ids)} rows are wrong, rows [{row}]")


def test_a_row_without_an_expert_must_be_zero() -> None:
    case = next(c for c in CASES if (c.topk_ids < 0).all(axis=1).any() and not c.is_empty)
    row = int(np.flatnonzero((case.topk_ids < 0).all(axis=1))[0])
    assert f"rows [{row}]" in case.difference(changed(case, row, lambda values: values + 1e-3))


def test_a_result_of_another_shape_or_format_is_wrong() -> None:
    case = large_case()
    assert case.difference(compute(case)[1:])
    other = DType.F32 if case.dtype is not DType.F32 else DType.F16
    assert case.difference(narrow(widen(compute(case)), other))
