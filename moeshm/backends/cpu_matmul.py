"""Stored weights times float32 activations: widened a cache-sized block at a time, then BLAS.

Arrays of activations are feature-major, [features] or [features, n_rows], so that a block of
weight rows yields a contiguous block of results.
"""

from __future__ import annotations

import threading

import numpy as np

from ..dtypes import Array, FloatArray, widen

#: float32 values in a block of widened weights: 2 MiB, to stay in a cache while it is used.
#: Measured with bfloat16 experts on 2 cores with 1 MiB of L2 each and 32 MiB of L3: blocks of
#: 2^16 to 2^18 take up to 2.5 times as long for one token, 2^20 the same; widening a whole
#: matrix at once takes the same for [768, 2048], but 4 to 5 times as long for [14336, 4096].
BLOCK_ELEMENTS = 1 << 19


class _Scratch(threading.local):
    """A thread's own memory for one block of widened weights."""

    def __init__(self) -> None:
        self.memory = np.empty(BLOCK_ELEMENTS, np.float32)

    def block(self, shape: tuple[int, ...]) -> FloatArray:
        """Uninitialised memory, valid until the next call by the same thread."""
        size = shape[0] * shape[1]
        if size > self.memory.size:
            self.memory = np.empty(size, np.float32)
        return self.memory[:size].reshape(shape)


_scratch = _Scratch()


def multiply(weights: Array, x: FloatArray, out: FloatArray) -> None:
    """`out[...] = weights @ x` in float32.

    `weights`: [n_out, n_in], float32, float16 or bfloat16 as uint16, in C or Fortran order
    (others are right but slow). `x`: [n_in] or [n_in, n_rows]. `out`: [n_out] or [n_out,
    n_rows], C-contiguous.
    """
    by_column = weights.flags.f_contiguous and not weights.flags.c_contiguous
    if weights.dtype == np.float32 and (by_column or weights.flags.c_contiguous):
        np.dot(weights, x, out=out)
    elif by_column:
        _multiply_columns(weights.T, x, out)
    else:
        _multiply_rows(weights, x, out)


def _multiply_rows(weights: Array, x: FloatArray, out: FloatArray) -> None:
    """Rows of weights in memory, each block of them gives a block of results."""
    n_out, n_in = weights.shape
    step = max(1, BLOCK_ELEMENTS // n_in)
    for row in range(0, n_out, step):
        stored = weights[row : row + step]
        np.dot(widen(stored, _scratch.block(stored.shape)), x, out=out[row : row + step])


def _multiply_columns(stored: Array, x: FloatArray, out: FloatArray) -> None:
    """`stored` [n_in, n_out] in memory: each block of it adds to all results."""
    n_in, n_out = stored.shape
    step = max(1, BLOCK_ELEMENTS // n_out)
    part = np.empty_like(out)
    out[...] = 0
    for row in range(0, n_in, step):
        block = stored[row : row + step]
        np.dot(widen(block, _scratch.block(block.shape)).T, x[row : row + step], out=part)
        np.add(out, part, out=out)
