"""Calls of small random layers, in arrays that kernels are run on: on the host, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeshm.backends import Ids, Weights
from moeshm.backends.gpu.abi import Call, Route
from moeshm.backends.gpu.choice import Shape
from moeshm.checkpoint import ExpertLayer, ExpertWeights
from moeshm.dtypes import Array, DType, dtype_of, narrow, widen
from moeshm.layers import Activation
from tests.checkpoints import random_layer
from tests.simt import Order, compile, guarded

#: Relative Frobenius norm of the error, by the coarsest format of a call.
TOLERANCES = {DType.F32: 1e-5, DType.F16: 3e-3, DType.BF16: 1e-2}
#: Of blocks and threads: who runs first after they have met.
ORDERS: tuple[Order, ...] = ("forward", "reverse", 1, 2)
_UNWRITTEN = -(1 << 30)


@dataclass(frozen=True)
class Case:
    """A layer's shape and formats, and the warp it is computed by."""

    hidden_size: int
    intermediate_size: int
    weight_dtype: DType
    activation: Activation
    has_bias: bool
    warp: int

    def __str__(self) -> str:
        bias = "-bias" if self.has_bias else ""
        return (
            f"{self.hidden_size}x{self.intermediate_size}-{self.weight_dtype}-{self.activation}"
            f"{bias}-warp{self.warp}"
        )

    def layer(self, seed: int, num_experts: int = 6) -> ExpertLayer:
        """A random layer of this shape."""
        return random_layer(
            seed,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_experts=num_experts,
            activation=self.activation,
            weight_dtype=self.weight_dtype,
            has_bias=self.has_bias,
        )


class Problem:
    """One call of a layer. What kernels read ends where memory ends; what they write starts as NaN.

    `kept_dtype`: of what is kept between kernels. `tile_rows`: pairs of a tile of the route.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        x: Array,
        ids: Ids,
        weights: Weights,
        *,
        out_dtype: DType = DType.F32,
        kept_dtype: DType = DType.F32,
        tile_rows: int = 64,
        warp: int = 32,
    ) -> None:
        info = layer.info
        self.shape = Shape.of(info, layer.expert(0).gate_bias is not None)
        self.warp = warp
        n_pairs = ids.size
        self._blocks = [guarded(_block(self.shape, layer.expert(i))) for i in range(len(layer))]
        addresses = np.array([block.ctypes.data for block in self._blocks], np.uint64)
        self._inputs = (guarded(x), guarded(ids, 4), guarded(weights, 4), guarded(addresses))
        self.out = poisoned((len(x), info.hidden_size), out_dtype)
        self.inner = poisoned((n_pairs, self.shape.inner), kept_dtype)
        self.partial = poisoned((n_pairs, info.hidden_size), kept_dtype)
        most_tiles = min(len(layer), n_pairs) + n_pairs // tile_rows
        self.begin, self.pairs, self.n_tiles, self.tiles = (
            guarded(np.full(size, _UNWRITTEN, np.int32), 4)
            for size in (len(layer) + 1, n_pairs, 1, (most_tiles, 2))
        )
        self.call = Call(
            *(each.ctypes.data for each in self._inputs[:3]),
            out=self.out.ctypes.data,
            experts=self._inputs[3].ctypes.data,
            inner=self.inner.ctypes.data,
            partial=self.partial.ctypes.data,
            n_tokens=len(x),
            top_k=ids.shape[1],
            n_slots=len(layer),
            x_dtype=dtype_of(x),
            out_dtype=out_dtype,
            alpha=info.activation_alpha,
            limit=info.activation_limit,
        )
        self.route = Route(
            *(each.ctypes.data for each in (self.begin, self.pairs, self.n_tiles, self.tiles))
        )

    def launch(
        self,
        file: str,
        kernel: str,
        grid: int,
        block: int,
        shared: int = 0,
        *,
        order: Order = "forward",
        **macros: object,
    ) -> None:
        """Run a kernel of `file`, compiled for the layer's shape and with these macros besides."""
        module = compile(file, {**self.shape.macros(), **macros}, self.warp)
        module.launch(kernel, grid, block, shared, self.call, self.route, order=order)


def draw(
    seed: int,
    layer: ExpertLayer,
    n_tokens: int,
    top_k: int,
    *,
    x_dtype: DType = DType.F32,
    empty: float = 0.2,
) -> tuple[Array, Ids, Weights]:
    """Hidden states, ids with a share of empty slots, whose weights are NaN, and weights."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n_tokens, layer.info.hidden_size), np.float32)
    ids = rng.integers(0, len(layer), (n_tokens, top_k), np.int32)
    ids[rng.random(ids.shape) < empty] = -1
    weights = rng.random((n_tokens, top_k), np.float32)
    weights[ids < 0] = np.nan
    return narrow(x, x_dtype), ids, weights


def poisoned(shape: tuple[int, int], dtype: DType) -> Array:
    """NaN in that format, ending where memory ends."""
    return guarded(narrow(np.full(shape, np.nan, np.float32), dtype))


def assert_close(found: Array, expected: npt.NDArray[np.float64], dtype: DType) -> None:
    """`found`, of any format, is as close as `dtype`, the coarsest of the call, allows."""
    difference = widen(found) - expected
    error = float(np.linalg.norm(difference)) / max(float(np.linalg.norm(expected)), 1e-30)
    assert error <= TOLERANCES[dtype], f"error {error:.3g}, allowed {TOLERANCES[dtype]:.3g}"


def same_bits(a: Array, b: Array) -> bool:
    """True when the arrays are equal bit by bit, NaN included."""
    return a.tobytes() == b.tobytes()


def assert_disturbs_no_other(
    run: Callable[..., Array], layer: ExpertLayer, call: tuple[Array, Ids, Weights], bad: float
) -> None:
    """Row 3 made of `bad`, which is not finite, gives NaN; the others keep their bits."""
    x, ids, weights = call
    expected = run(layer, x, ids, weights)
    x[3] = bad
    out = run(layer, x, ids, weights)
    assert np.isnan(widen(out[3])).all()
    others = np.arange(len(x)) != 3
    assert same_bits(out[others], expected[others])


def assert_same_bits_of_any_grid(
    run: Callable[..., Array],
    layer: ExpertLayer,
    call: tuple[Array, Ids, Weights],
    **options: int,
) -> None:
    """However many blocks there are, and whoever runs first."""
    first = run(layer, *call, grid=1, **options)
    for grid, order in zip((3, 7, 40, 200), ORDERS, strict=True):
        out = run(layer, *call, grid=grid, order=order, **options)
        assert same_bits(out, first), (grid, order)


def _block(shape: Shape, weights: ExpertWeights) -> npt.NDArray[np.uint8]:
    """An expert's weights as kernels/ffn.cuh lays them out."""
    inner, hidden = shape.inner, shape.hidden_padded
    parts = [
        _matrix(weights.gate_proj, inner, hidden),
        _matrix(weights.up_proj, inner, hidden),
        _matrix(weights.down_proj, hidden, inner),
    ]
    for bias, size in (
        (weights.gate_bias, inner),
        (weights.up_bias, inner),
        (weights.down_bias, hidden),
    ):
        if bias is not None:
            parts.append(np.pad(widen(bias), (0, size - len(bias))))
    return np.concatenate([part.ravel().view(np.uint8) for part in parts])


def _matrix(values: Array, n_rows: int, n_columns: int) -> Array:
    """Padded with zeros; if of 16 bits, in swizzled blocks of 8 x 32 in tiles of 64 x 64."""
    padded = np.zeros((n_rows, n_columns), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    if values.itemsize == 4:
        return padded
    row, k = np.indices(padded.shape)
    block = (row // 64 * n_columns // 64 + k // 64) * 16 + row % 64 // 8 * 2 + k % 64 // 32
    index = block * 256 + row % 8 * 32 + (k // 8 ^ row // 2) % 4 * 8 + k % 8
    flat = np.empty(padded.size, padded.dtype)
    flat[index] = padded
    return flat
