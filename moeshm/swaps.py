"""Which hot experts to exchange for cold ones, when what the router chooses has changed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from .placement import LayerPlacement, Placement, PlacementError
from .routing_stats import Counts, RoutingStats

#: A cold expert must be used so many times as often as the hot one whose place it takes.
MIN_GAIN = 1.25
#: Most swaps at a time: an expert's weights are megabytes for a worker to load.
MAX_SWAPS = 8


class Swap(msgspec.Struct, frozen=True):
    """Two experts of a layer that change places."""

    layer: int
    #: The model's id of a cold expert that becomes hot.
    promote: int
    #: That of the hot one that goes to the workers which hold `promote`.
    demote: int
    #: What the hot share of the layer's slots gains.
    gained_share: float


def propose_swaps(
    placement: Placement,
    stats: RoutingStats,
    *,
    min_gain: float = MIN_GAIN,
    max_swaps: int = MAX_SWAPS,
    min_sigmas: float = 0.0,
) -> list[Swap]:
    """The swaps that gain most by these counts, the best first.

    In each layer the most used cold expert meets the least used hot one, the second most used the
    second least used, and so on. A pair is a swap if the cold expert was counted at least
    `min_gain` times as often, and by `min_sigmas` standard deviations of the difference of two
    Poisson counts, which is the root of their sum; of all layers' swaps the best `max_swaps` stay.
    PlacementError:
    `min_gain` below 1 (experts would change places for nothing), `max_swaps` below 0, or a layer
    of the placement that `stats` lacks or has with other experts.
    """
    if not min_gain >= 1:
        raise PlacementError(f"min_gain={min_gain}; it must be at least 1")
    if max_swaps < 0:
        raise PlacementError(f"max_swaps={max_swaps}; it must be at least 0")
    swaps: list[Swap] = []
    for number, layer in placement.layers.items():
        _check_counts(number, layer, stats)
        swaps += _swaps_of(
            number, placement.is_hot(number), stats.counts(number), min_gain, min_sigmas
        )
    # Stable: of equal gains, the lower layer comes first, as everywhere.
    return sorted(swaps, key=lambda swap: -swap.gained_share)[:max_swaps]


def apply_swaps(placement: Placement, swaps: Sequence[Swap]) -> Placement:
    """The placement after these swaps, one after the other.

    The engine and every worker hold as many experts of each layer as before, and a demoted expert
    has as many replicas as the promoted one had. PlacementError: no such layer, `promote` is not
    cold, or `demote` is not hot.
    """
    by_layer: dict[int, list[Swap]] = defaultdict(list)
    for swap in swaps:
        by_layer[swap.layer].append(swap)
    layers = dict(placement.layers)
    for number, chosen in by_layer.items():
        if number not in layers:
            raise PlacementError(
                f"a swap is of layer {number}; the placement has {sorted(placement.layers)}"
            )
        for swap in chosen:
            layers[number] = _swapped(layers[number], swap)
    return Placement(placement.workers, layers)


def _check_counts(number: int, layer: LayerPlacement, stats: RoutingStats) -> None:
    if number not in stats.layers:
        raise PlacementError(
            f"layer {number} of the placement was not counted; there are counts of "
            f"{list(stats.layers)}"
        )
    n_counted = len(stats.counts(number))
    if n_counted != layer.num_experts:
        raise PlacementError(
            f"layer {number} has {layer.num_experts} experts in the placement and {n_counted} in "
            "the statistics; these are of different models"
        )


def _swaps_of(
    number: int, is_hot: npt.NDArray[np.bool_], counts: Counts, min_gain: float, min_sigmas: float
) -> list[Swap]:
    total = float(counts.sum())
    by_use = np.argsort(-counts, kind="stable")
    cold, hot = by_use[~is_hot[by_use]], by_use[is_hot[by_use]][::-1]
    swaps = []
    for promote, demote in zip(cold.tolist(), hot.tolist(), strict=False):
        gain = float(counts[promote] - counts[demote])
        noise = math.sqrt(counts[promote] + counts[demote])
        # Pairs gain less and less.
        if gain <= 0 or counts[promote] < min_gain * counts[demote]:
            break
        if gain < min_sigmas * noise:
            continue
        swaps.append(Swap(number, promote, demote, gain / total))
    return swaps


def _swapped(layer: LayerPlacement, swap: Swap) -> LayerPlacement:
    if swap.demote not in layer.hot:
        raise PlacementError(f"{swap}: expert {swap.demote} is not hot")
    if not any(swap.promote in held for held in layer.cold.values()):
        raise PlacementError(f"{swap}: expert {swap.promote} is not cold")
    return LayerPlacement(
        layer.num_experts,
        _exchanged(layer.hot, swap.demote, swap.promote),
        {
            worker: _exchanged(held, swap.promote, swap.demote) if swap.promote in held else held
            for worker, held in layer.cold.items()
        },
    )


def _exchanged(experts: tuple[int, ...], gone: int, come: int) -> tuple[int, ...]:
    return tuple(sorted({*experts, come} - {gone}))
