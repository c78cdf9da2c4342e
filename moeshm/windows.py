"""How a call is cut into messages: windows of neighbouring tokens, without the rows that stay."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt


def cut(
    n_tokens: int, rows: npt.NDArray[np.int64] | None, slice_tokens: int, most_rows: int
) -> list[slice]:
    """The messages of a call, as slices of its sent rows; none for a window without any.

    `rows`: the tokens that are sent, rising; None for all. A window starts at every multiple of
    `slice_tokens`; one of more than `most_rows` rows is cut further.
    """
    n_rows = n_tokens if rows is None else len(rows)
    if n_tokens <= slice_tokens:
        edges = [0, n_rows]
    else:
        starts = np.arange(0, n_tokens + slice_tokens, slice_tokens)
        edges = (
            np.minimum(starts, n_tokens) if rows is None else rows.searchsorted(starts)
        ).tolist()
    return [
        slice(start, min(start + most_rows, end))
        for first, end in itertools.pairwise(edges)
        for start in range(first, end, most_rows)
    ]
