"""How calls are cut into messages."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moeshm import windows


def test_without_a_wish_a_call_is_one_message() -> None:
    assert windows.cut(7, None, 4096, 100) == [slice(0, 7)]
    assert windows.cut(7, np.array([1, 6]), 4096, 100) == [slice(0, 2)]


def test_windows_start_at_multiples_and_empty_ones_are_left_out() -> None:
    assert windows.cut(10, None, 4, 100) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    rows = np.array([0, 3, 8, 9, 15])
    assert windows.cut(16, rows, 4, 100) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_a_window_is_cut_to_what_the_worker_takes() -> None:
    assert windows.cut(10, None, 4096, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert windows.cut(10, None, 6, 4) == [slice(0, 4), slice(4, 6), slice(6, 10)]


@given(
    st.integers(1, 300).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))
    ),
    st.integers(1, 400),
    st.integers(1, 50),
)
def test_every_row_is_in_one_message(
    sent: tuple[int, set[int]], slice_tokens: int, most_rows: int
) -> None:
    n_tokens, chosen = sent
    rows = np.array(sorted(chosen), np.int64)
    parts = windows.cut(n_tokens, rows, slice_tokens, most_rows)
    covered = np.concatenate([rows[part] for part in parts])
    np.testing.assert_array_equal(covered, rows)
    for part in parts:
        assert 1 <= len(rows[part]) <= most_rows
        assert len(set((rows[part] // slice_tokens).tolist())) == 1
