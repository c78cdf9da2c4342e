"""Weights as they lie on a device, held against the order that kernels/ffn.cuh describes."""

from __future__ import annotations

import numpy as np
import pytest

from moeshm.backends.gpu._packing import fill_tiles
from moeshm.backends.gpu.choice import Shape
from moeshm.backends.gpu.packing import pack
from moeshm.checkpoint.layer import ExpertWeights
from moeshm.dtypes import Array, DType
from moeshm.layers import LayerInfo


def in_tiles(matrix: Array) -> Array:
    """Tile by tile, block by block, row by row, each row's eights as they are exchanged."""
    found = []
    n_rows, n_columns = matrix.shape
    for row in range(0, n_rows, 64):
        for column in range(0, n_columns, 64):
            for block in range(0, 64, 8):
                for half in range(0, 64, 32):
                    for r in range(8):
                        eights = matrix[row + block + r, column + half :][:32].reshape(4, 8)
                        found.append(eights[[place ^ r // 2 for place in range(4)]].reshape(-1))
    return np.concatenate(found)


@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (128, 64), (192, 320)])
def test_tiles(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)
    matrix.flags.writeable = False
    target = np.zeros(matrix.size, np.uint16)
    fill_tiles(target, matrix)
    np.testing.assert_array_equal(target, in_tiles(matrix))


def test_nothing_is_no_tile() -> None:
    fill_tiles(np.empty(0, np.uint16), np.empty((0, 64), np.uint16))


@pytest.mark.parametrize(
    ("n", "shape"), [(64 * 64, (64, 63)), (64 * 64, (32, 128)), (64 * 64 - 1, (64, 64))]
)
def test_what_is_no_tile_is_refused(n: int, shape: tuple[int, int]) -> None:
    target = np.zeros(n, np.uint16)
    with pytest.raises(ValueError, match="tiles are of 64 x 64"):
        fill_tiles(target, np.ones(shape, np.uint16))
    assert not target.any()


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_an_experts_block(dtype: DType, is_interleaved: bool) -> None:
    """Padded to multiples of 64, whatever the strides, and through little staging memory."""
    hidden, inner = 136, 72
    random = np.random.default_rng(1)

    def draw(rows: int, columns: int) -> Array:
        step = 2 if is_interleaved else 1
        bits = random.integers(0, 0x3C00, (rows * step, columns), np.uint16)
        return bits[::step].view(dtype.numpy)

    weights = ExpertWeights(
        gate_proj=draw(inner, hidden), up_proj=draw(inner, hidden), down_proj=draw(hidden, inner)
    )
    info = LayerInfo(
        hidden_size=hidden,
        intermediate_size=inner,
        num_experts=1,
        top_k=1,
        experts=(0,),
        weight_dtype=dtype,
    )
    shape = Shape.of(info, has_bias=False)
    block = np.zeros(shape.block_bytes, np.uint8)
    staging = np.empty(64 * 192 * 2, np.uint8)
    for offset, n_bytes in pack(shape, weights, staging):
        block[offset : offset + n_bytes] = staging[:n_bytes]
    expected = []
    for matrix, rows, columns in (
        (weights.gate_proj, 128, 192),
        (weights.up_proj, 128, 192),
        (weights.down_proj, 192, 128),
    ):
        padded = np.zeros((rows, columns), np.uint16)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix.view(np.uint16)
        expected.append(in_tiles(padded))
    np.testing.assert_array_equal(block.view(np.uint16), np.concatenate(expected))
