"""What the matrix's workers compute, and what is expected of them: whole numbers, exact sums."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshm.backends import Ids, Weights
from moeshm.checkpoint import ExpertLayer, ExpertWeights
from tests.growing import Experts, GrowingArithmetic, expected, layer_of

__all__ = ["BROKEN", "MOST_TOKENS", "SMALL", "WIDE", "MatrixBackend", "expected", "load_experts"]

#: Layers: of few bytes; whose largest call fills a ring; that raises.
SMALL, WIDE, BROKEN = 0, 1, 2
#: What a WIDE call takes at least, so that others queue up behind it.
WIDE_S = 0.001
#: In one message.
MOST_TOKENS = 16
_HIDDEN_SIZES = {SMALL: 16, WIDE: 2048, BROKEN: 16}
#: What a worker begins with, in every layer; there are NUM_EXPERTS.
FIRST = (0, 1, 2)

_WEIGHTS = {
    size: ExpertWeights(
        np.ones((1, size), np.float32), np.ones((1, size), np.float32), np.ones((size, 1), "f4")
    )
    for size in set(_HIDDEN_SIZES.values())
}


class MatrixBackend(GrowingArithmetic):
    """Expert `e` of layer `n` multiplies its input by `10 n + e + 1`."""

    def __init__(self) -> None:
        experts = dict.fromkeys(_HIDDEN_SIZES, FIRST)
        super().__init__(experts)
        self.layers = {n: layer_of(ids, _HIDDEN_SIZES[n]) for n, ids in experts.items()}

    def ffn(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
    ) -> None:
        """As `Backend.ffn`."""
        if layer == BROKEN:
            raise RuntimeError("a call that fails")
        if layer == WIDE:
            time.sleep(WIDE_S)
        super().ffn(layer, hidden_states, topk_ids, topk_weights, out)

    def add(self, layer: int, experts: ExpertLayer) -> list[int]:
        """As `GrowingBackend.add`."""
        return super().add(layer, experts)

    def remove(self, layer: int, slots: Any) -> None:
        """As `GrowingBackend.remove`."""
        super().remove(layer, slots)


def load_experts(experts: Experts) -> Mapping[int, ExpertLayer]:
    """As from a checkpoint."""
    return {
        n: ExpertLayer(layer_of(ids, _HIDDEN_SIZES[n]), [_WEIGHTS[_HIDDEN_SIZES[n]]] * len(ids))
        for n, ids in experts.items()
    }
