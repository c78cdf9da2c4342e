"""How an expert's weights lie on the device: kernels/ffn.cuh's blocks, made part by part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...checkpoint.layer import ExpertWeights
from ...dtypes import Array, DType, widen
from ._packing import fill_tiles
from .choice import Shape
from .device import Bytes

#: Of a matrix of 16-bit weights, what lies one behind the other: see IS_TILED there.
_TILE_ROWS = 64


class _Section(NamedTuple):
    """A matrix of the block, and what of it is not zero."""

    rows: int
    columns: int
    dtype: DType
    #: None for an expert without that bias.
    values: Array | None


def pack(shape: Shape, weights: ExpertWeights, staging: Bytes) -> Iterator[tuple[int, int]]:
    """Write the expert's block into `staging`, as much as it takes at a time.

    Each part's offset in the block and its bytes, which are the first of `staging`; the next part
    takes their place. `staging` takes 64 rows of every matrix.
    """
    offset = 0
    for section in _sections(shape, weights):
        row_bytes = section.columns * section.dtype.itemsize
        step = min(section.rows, len(staging) // row_bytes // _TILE_ROWS * _TILE_ROWS)
        if step == 0:
            raise ValueError(
                f"{len(staging)} bytes of staging for rows of {row_bytes} bytes; pass at least "
                f"{_TILE_ROWS * row_bytes}"
            )
        for first in range(0, section.rows, step):
            n_rows = min(step, section.rows - first)
            n_bytes = n_rows * row_bytes
            target = staging[:n_bytes].view(section.dtype.numpy)
            _fill(target, _padded(section, first, n_rows))
            yield offset, n_bytes
            offset += n_bytes


def _sections(shape: Shape, weights: ExpertWeights) -> Iterator[_Section]:
    inner, hidden, dtype = shape.inner, shape.hidden_padded, shape.weight_dtype
    yield _Section(inner, hidden, dtype, weights.gate_proj)
    yield _Section(inner, hidden, dtype, weights.up_proj)
    yield _Section(hidden, inner, dtype, weights.down_proj)
    if shape.has_bias:
        for size, bias in (
            (inner, weights.gate_bias),
            (inner, weights.up_bias),
            (hidden, weights.down_bias),
        ):
            yield _Section(1, size, DType.F32, None if bias is None else widen(bias)[None])


def _padded(section: _Section, first: int, n_rows: int) -> Array:
    """Rows from `first` on, with zeros where there is nothing."""
    values = section.values
    if values is not None and values.shape == (section.rows, section.columns):
        return values[first : first + n_rows]
    rows = np.zeros((n_rows, section.columns), section.dtype.numpy)
    if values is not None:
        there = values[first : first + n_rows]
        rows[: len(there), : values.shape[1]] = there
    return rows


def _fill(target: Array, rows: Array) -> None:
    """The rows as kernels find them."""
    if rows.itemsize != 2:
        np.copyto(target.reshape(rows.shape), rows)
        return
    fill_tiles(target.view(np.uint16), np.ascontiguousarray(rows).view(np.uint16))
