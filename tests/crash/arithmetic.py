"""A backend of plain sums, quick and exact: the worker's, the fallback, and what is expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeshm.backends import Ids, Weights
from moeshm.layers import LayerInfo

#: Computes at once; waits until the test lets it go; raises.
FREE, GATED, BROKEN = 0, 1, 2
#: Computes at once; a call of MANY_TOKENS is larger than a socket's buffers.
WIDE = 3
WIDE_HIDDEN_SIZE = 2048
#: Computes at once, but where a backend computes in steps, one a token, and waits before each.
STEPPED = 4
MANY_TOKENS = 1024
HIDDEN_SIZE = 16
TOP_K = 2
NUM_EXPERTS = 4


def _info(hidden_size: int) -> LayerInfo:
    return LayerInfo(
        hidden_size=hidden_size,
        intermediate_size=4,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        experts=tuple(range(NUM_EXPERTS)),
    )


class ArithmeticBackend:
    """Expert `e` of layer `n` multiplies its input by `10 n + e + 1`."""

    name = "arithmetic"

    def __init__(self, on_turn: Callable[[int, int], None] = lambda _layer, _tag: None) -> None:
        self.layers: Mapping[int, LayerInfo] = {
            GATED: _info(HIDDEN_SIZE),
            BROKEN: _info(HIDDEN_SIZE),
            WIDE: _info(WIDE_HIDDEN_SIZE),
            STEPPED: _info(HIDDEN_SIZE),
            # The last of a shape is what an offload measures a worker by.
            FREE: _info(HIDDEN_SIZE),
        }
        self._on_turn = on_turn

    def ffn(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
    ) -> None:
        """As `Backend.ffn`; tells `on_turn` the layer and the call's tag first."""
        self._on_turn(layer, int(hidden_states[0, 0]))
        factors = np.where(topk_ids < 0, 0, topk_ids + 10 * layer + 1) * topk_weights
        out[...] = hidden_states * factors.sum(axis=1, keepdims=True).astype(hidden_states.dtype)


class CallInputs(NamedTuple):
    """What `compute` takes."""

    layer: int
    hidden_states: npt.NDArray[np.float32]
    topk_ids: npt.NDArray[np.int32]
    topk_weights: npt.NDArray[np.float32]


def make_inputs(layer: int, tag: int = 0, n_tokens: int = 3) -> CallInputs:
    """A call whose values are small whole numbers, so that every sum is exact."""
    rng = np.random.default_rng(tag)
    hidden_size = WIDE_HIDDEN_SIZE if layer == WIDE else HIDDEN_SIZE
    hidden_states = rng.integers(-8, 8, (n_tokens, hidden_size)).astype(np.float32)
    hidden_states[0, 0] = tag
    ids = rng.integers(0, NUM_EXPERTS, (n_tokens, TOP_K), dtype=np.int32)
    weights = rng.integers(1, 4, (n_tokens, TOP_K)).astype(np.float32)
    return CallInputs(layer, hidden_states, ids, weights)


def assert_exact(result: Any, inputs: CallInputs) -> None:
    """The result is what the backend computes from these inputs."""
    expected = np.empty_like(inputs.hidden_states)
    ArithmeticBackend().ffn(*inputs, expected)
    np.testing.assert_array_equal(result, expected)
