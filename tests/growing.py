"""A backend whose experts come and go, and a checkpoint for it: whole numbers, exact sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moeshm.backends import Ids, Weights
from moeshm.checkpoint import ExpertLayer, ExpertWeights
from moeshm.layers import LayerInfo

HIDDEN_SIZE = 8
TOP_K = 3
NUM_EXPERTS = 6
LAYERS = (0, 1, 2)
#: By layer, the model's ids in local order.
Experts = Mapping[int, Sequence[int]]

_WEIGHTS = ExpertWeights(
    np.ones((1, HIDDEN_SIZE), np.float32),
    np.ones((1, HIDDEN_SIZE), np.float32),
    np.ones((HIDDEN_SIZE, 1), np.float32),
)


def layer_of(experts: Sequence[int], hidden_size: int = HIDDEN_SIZE) -> LayerInfo:
    """The description of these."""
    return LayerInfo(
        hidden_size=hidden_size,
        intermediate_size=1,
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        experts=tuple(experts),
    )


def load(experts: Experts) -> dict[int, ExpertLayer]:
    """As from a checkpoint."""
    return {n: ExpertLayer(layer_of(ids), [_WEIGHTS] * len(ids)) for n, ids in experts.items()}


class GrowingArithmetic:
    """Expert `e` of layer `n` multiplies its input by `10 n + e + 1`."""

    name = "growing"

    def __init__(self, experts: Experts) -> None:
        self.layers: Mapping[int, LayerInfo] = {n: layer_of(ids) for n, ids in experts.items()}
        #: By layer and slot, the model's expert.
        self.slots = {(n, i): e for n, ids in experts.items() for i, e in enumerate(ids)}
        #: Told of each call's layer, before it is computed.
        self.on_turn: Callable[[int], object] = lambda _layer: None
        #: Refuses to take this expert in.
        self.refused: tuple[int, int] | None = None

    def ffn(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
    ) -> None:
        """As `Backend.ffn`; KeyError for a slot that is free."""
        self.on_turn(layer)
        experts = [-1 if i < 0 else self.slots[layer, i] for i in topk_ids.ravel().tolist()]
        ids = np.array(experts).reshape(topk_ids.shape)
        out[...] = expected(layer, hidden_states, ids, topk_weights)

    def add(self, layer: int, experts: ExpertLayer) -> list[int]:
        """As `GrowingBackend.add`."""
        if self.refused in [(layer, each) for each in experts.info.experts]:
            raise MemoryError("as if there were no room")
        free = (i for i in range(1000) if (layer, i) not in self.slots)
        slots = []
        for expert in experts.info.experts:
            slots.append(next(free))
            self.slots[layer, slots[-1]] = expert
        return slots

    def remove(self, layer: int, slots: Sequence[int]) -> None:
        """As `GrowingBackend.remove`."""
        for slot in slots:
            del self.slots[layer, slot]


def expected(
    layer: int, hidden_states: npt.NDArray[Any], global_ids: Ids, topk_weights: Weights
) -> npt.NDArray[Any]:
    """What the model's experts give."""
    factors = np.where(global_ids < 0, 0, global_ids + 10 * layer + 1) * topk_weights
    result: npt.NDArray[np.float32] = hidden_states * factors.sum(
        axis=1, keepdims=True, dtype=np.float32
    )
    return result


def draw(
    rng: np.random.Generator, n_experts: int, n_tokens: int = 3
) -> tuple[npt.NDArray[np.float32], Ids, Weights]:
    """A call of local ids below `n_experts`: small whole numbers."""
    hidden_states = rng.integers(-8, 8, (n_tokens, HIDDEN_SIZE)).astype(np.float32)
    ids = rng.integers(-1, n_experts, (n_tokens, TOP_K), dtype=np.int32)
    return hidden_states, ids, rng.integers(1, 4, (n_tokens, TOP_K)).astype(np.float32)


def globally(ids: Ids, experts: Sequence[int]) -> Ids:
    """Local ids as the model's."""
    return np.array([*experts, -1], np.int32)[ids]
