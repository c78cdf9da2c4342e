"""What the demo keeps in its own process, and how much of the work that was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .. import checkpoint
from ..backends import Ids, Weights
from ..dtypes import FloatArray
from ..errors import SettingError
from ..layers import LayerInfo
from ..offload import OffloadStats
from ..placement import Placement
from ..routing_stats import RoutingStats
from . import tiny_moe_path
from .decoder import ExpertsFn

#: The only one, by its name in the placement.
WORKER = "worker"

#: Of every call: the layer, and the ids [n_tokens, top_k] that the router chose.
Choices = list[tuple[int, Ids]]


@dataclass(frozen=True)
class Shares:
    """Where (token, expert) pairs were computed, and which rows went to the worker."""

    fraction: float
    #: Of each layer's experts.
    n_hot: int
    num_experts: int
    hot_slots: int
    cold_slots: int
    #: Computed here, too, in the worker's place.
    fallback_slots: int
    #: Of all layers together: a row is a token in a layer.
    rows: int
    #: Those without a cold expert.
    hot_rows: int

    @property
    def hot_share(self) -> float:
        """Of all pairs, those that hot experts computed here."""
        return self.hot_slots / self._slots

    @property
    def cold_share(self) -> float:
        """Of all pairs, those that the worker computed."""
        return self.cold_slots / self._slots

    @property
    def _slots(self) -> int:
        return self.hot_slots + self.cold_slots + self.fallback_slots


def n_hot_experts(fraction: float) -> tuple[int, int]:
    """So many experts of each of the bundled model's layers are this fraction, and how many there
    are; SettingError: not in 0..1."""
    if not 0 <= fraction <= 1:
        raise SettingError(f"a fraction of {fraction} of the experts; it must lie in 0..1")
    layers = checkpoint.load(tiny_moe_path()).layers.values()
    num_experts = min(layer.info.num_experts for layer in layers)
    return round(fraction * num_experts), num_experts


def recorded(experts: ExpertsFn, choices: Choices) -> ExpertsFn:
    """The same experts; what they are asked for is appended to `choices`."""

    def compute(layer: int, hidden_states: FloatArray, ids: Ids, weights: Weights) -> FloatArray:
        choices.append((layer, ids))
        return experts(layer, hidden_states, ids, weights)

    return compute


def place(layers: Mapping[int, LayerInfo], choices: Choices, n_hot: int) -> Placement:
    """The most chosen `n_hot` experts of each layer are hot, and the worker has the others."""
    stats = RoutingStats.for_layers(layers)
    for layer, ids in choices:
        stats.observe(layer, ids)
    return Placement.from_counts([WORKER], stats, n_hot)


def shares_of(
    fraction: float, placement: Placement, choices: Choices, stats: OffloadStats
) -> Shares:
    """The shares of a run in which the router made these choices."""
    is_hot = {number: placement.is_hot(number) for number in placement.layers}
    layer = next(iter(placement.layers.values()))
    return Shares(
        fraction=fraction,
        n_hot=len(layer.hot),
        num_experts=layer.num_experts,
        hot_slots=stats.hot_slots,
        cold_slots=sum(stats.cold_slots.values()),
        fallback_slots=sum(stats.fallback_slots.values()),
        rows=sum(len(ids) for _, ids in choices),
        hot_rows=sum(int(is_hot[number][ids].all(axis=1).sum()) for number, ids in choices),
    )
