"""Stored weights times float32 activations: widened a cache-sized block at a time, then BLAS.

Arrays of activations are feature-major, [features] or [features, n_rows], so that a block of
weight rows yields a contiguous block of results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from ..dtypes import Array, FloatArray, widen

#: float32 values in a block of widened weights: 2 MiB, to stay in a cache while it is used.
#: Measured with bfloat16 experts on 2 cores with 1 MiB of L2 each and 32 MiB of L3: blocks of
#: 2^16 to 2^18 take up to 2.5 times as long for one token, 2^20 the same; widening a whole
#: matrix at once takes the same for [768, 2048], but 4 to 5 times as long for [14336, 4096].
BLOCK_ELEMENTS = 1 << 19
#: Activations that are multiplied by a block at once, at most: 3.6 to 4 ms of a core of that
#: machine. All 512 rows of an expert at once took 2 % less per row, 128 at once 4 % more.
MOST_ROWS = 320
#: Rows of weights that need no widening and are multiplied at once, at least; where they are so
#: long that this is too much, they are cut. With 320 rows of activations [4096, 4096] took 10 %
#: longer so than at once, [2048, 14336] the same; 128 rows of that at once took 19 % longer.
FLOAT32_ROWS = 512
#: What a block costs beside its multiply-adds, as so many more rows of activations: reading and
#: widening it takes 0.05 ms, and few rows are multiplied at half the speed of many. So no step is
#: more than BLOCK_ELEMENTS * (MOST_ROWS + _ROWS_TO_WIDEN) multiply-adds, whatever the shapes.
_ROWS_TO_WIDEN = 16


class _Scratch:
    """Memory for blocks of widened weights, of which each multiplication has one while it lasts."""

    def __init__(self) -> None:
        self._free: list[FloatArray] = []

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[FloatArray]:
        """At least so many values, uninitialised."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(max(size, BLOCK_ELEMENTS), np.float32)
        if memory.size < size:
            memory = np.empty(size, np.float32)
        try:
            yield memory
        finally:
            self._free.append(memory)


_scratch = _Scratch()


def multiply(weights: Array, xs: Sequence[FloatArray], outs: Sequence[FloatArray]) -> Iterator[int]:
    """`out[...] = weights @ x` in float32, for each of them; yields the multiply-adds of each step.

    `weights`: [n_out, n_in], float32, float16 or bfloat16 as uint16, in C or Fortran order
    (others are right but slow). `xs`: [n_in] or [n_in, n_rows], up to MOST_ROWS. `outs`: [n_out] or
    [n_out, n_rows], C-contiguous. Steps depend on shapes alone. Each may be taken by another
    thread, and there may be any time between two.
    """
    by_column = weights.flags.f_contiguous and not weights.flags.c_contiguous
    if weights.dtype == np.float32 and weights.flags.c_contiguous:
        yield from _multiply_float32(weights, xs, outs)
    elif by_column:
        yield from _multiply_columns(weights.T, xs, outs)
    else:
        yield from _multiply_rows(weights, xs, outs)


def _multiply_float32(
    weights: Array, xs: Sequence[FloatArray], outs: Sequence[FloatArray]
) -> Iterator[int]:
    """As they are: few rows of activations by more weights at once."""
    n_out, n_in = weights.shape
    size = BLOCK_ELEMENTS * (MOST_ROWS + _ROWS_TO_WIDEN)
    size //= max(map(_n_rows, xs)) + _ROWS_TO_WIDEN
    height = min(n_out, max(FLOAT32_ROWS, size // n_in))
    width = max(1, size // height)
    for row in range(0, n_out, height):
        for column in range(0, n_in, width):
            block = weights[row : row + height, column : column + width]
            for x, whole in zip(xs, outs, strict=True):
                part, out = x[column : column + width], whole[row : row + height]
                if column == 0:
                    np.dot(block, part, out=out)
                else:
                    np.add(out, np.dot(block, part), out=out)
                yield block.size * (_n_rows(x) + _ROWS_TO_WIDEN)


def _multiply_rows(
    weights: Array, xs: Sequence[FloatArray], outs: Sequence[FloatArray]
) -> Iterator[int]:
    """Rows of weights in memory, each block of them gives a block of results."""
    n_out, n_in = weights.shape
    step = max(1, BLOCK_ELEMENTS // n_in)
    with _scratch.of(min(step, n_out) * n_in) as scratch:
        for row in range(0, n_out, step):
            stored = weights[row : row + step]
            block = widen(stored, scratch[: stored.size].reshape(stored.shape))
            for x, out in zip(xs, outs, strict=True):
                np.dot(block, x, out=out[row : row + step])
                yield block.size * (_n_rows(x) + _ROWS_TO_WIDEN)


def _multiply_columns(
    stored: Array, xs: Sequence[FloatArray], outs: Sequence[FloatArray]
) -> Iterator[int]:
    """`stored` [n_in, n_out] in memory: each block of it adds to all results."""
    n_in, n_out = stored.shape
    step = max(1, BLOCK_ELEMENTS // n_out)
    part = np.empty_like(outs[0])
    for out in outs:
        out[...] = 0
    with _scratch.of(min(step, n_in) * n_out) as scratch:
        for row in range(0, n_in, step):
            rows = stored[row : row + step]
            if rows.dtype == np.float32:
                block = rows.T
            else:
                block = widen(rows, scratch[: rows.size].reshape(rows.shape)).T
            for x, out in zip(xs, outs, strict=True):
                if part.shape != out.shape:
                    part = np.empty_like(out)
                np.dot(block, x[row : row + step], out=part)
                np.add(out, part, out=out)
                yield block.size * (_n_rows(x) + _ROWS_TO_WIDEN)


def _n_rows(x: FloatArray) -> int:
    return 1 if x.ndim == 1 else x.shape[1]
