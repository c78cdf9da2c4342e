"""Swaps bring used experts into the engine, and leave everybody's memory as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeshm.placement import LayerPlacement, Placement, PlacementError
from moeshm.routing_stats import RoutingStats
from moeshm.swaps import Swap, apply_swaps, propose_swaps
from tests.unit.test_placement import stats_of


def placed(hot: tuple[int, ...], **cold: tuple[int, ...]) -> Placement:
    """One layer."""
    n_experts = len({*hot, *(expert for held in cold.values() for expert in held)})
    return Placement(list(cold), {0: LayerPlacement(n_experts, hot, cold)})


def test_the_most_used_cold_meet_the_least_used_hot() -> None:
    placement = placed((0, 1, 2), a=(3, 4, 5))
    swaps = propose_swaps(placement, stats_of([10, 1, 2, 40, 0, 27]))
    assert swaps == [Swap(0, 3, 1, 39 / 80), Swap(0, 5, 2, 25 / 80)]


def test_a_gain_that_is_too_small_is_none() -> None:
    placement = placed((0,), a=(1,))
    assert propose_swaps(placement, stats_of([4, 5]), min_gain=1.25) == [Swap(0, 1, 0, 1 / 9)]
    assert propose_swaps(placement, stats_of([4, 5]), min_gain=1.26) == []
    # Nor is none at all one, whatever is asked for.
    assert propose_swaps(placement, stats_of([5, 5]), min_gain=1) == []
    assert propose_swaps(placement, stats_of([0, 0]), min_gain=1) == []
    # The root of 4 + 12 is 4: a difference of 8 is two of these.
    assert propose_swaps(placement, stats_of([4, 12]), min_sigmas=2) != []
    assert propose_swaps(placement, stats_of([4, 12]), min_sigmas=2.01) == []


def test_the_best_of_all_layers_stay() -> None:
    layer = LayerPlacement(4, (0, 1), {"a": (2, 3)})
    placement = Placement(["a"], dict.fromkeys(range(3), layer))
    # Gains of layer 0: 75 % and 25 %; of layer 1: 62.5 %; of layer 2: 80 %.
    stats = stats_of([0, 0, 6, 2], [1, 1, 6, 0], [0, 2, 8, 0])
    found = propose_swaps(placement, stats, max_swaps=3)
    assert [(each.layer, each.promote, each.demote) for each in found] == [
        (2, 2, 0),
        (0, 2, 1),
        (1, 2, 1),
    ]
    assert propose_swaps(placement, stats, max_swaps=0) == []


def test_the_demoted_goes_to_all_workers_that_held_the_promoted() -> None:
    placement = placed((0, 1), a=(2, 3), b=(3, 4), c=(4,))
    after = apply_swaps(placement, [Swap(0, 3, 1, 0.5)])
    assert after == placed((0, 3), a=(1, 2), b=(1, 4), c=(4,))
    assert placement == placed((0, 1), a=(2, 3), b=(3, 4), c=(4,))


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        (Swap(7, 1, 0, 0.1), r"a swap is of layer 7; the placement has \[0\]"),
        (Swap(0, 1, 2, 0.1), "promote=1, demote=2.*expert 2 is not hot"),
        (Swap(0, 9, 0, 0.1), "promote=9, demote=0.*expert 9 is not cold"),
        (Swap(0, 0, 0, 0.1), "expert 0 is not cold"),
    ],
)
def test_swaps_that_do_not_fit_are_refused_by_name(swap: Swap, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        apply_swaps(placed((0,), a=(1, 2)), [swap])


def test_what_cannot_be_asked_is_named() -> None:
    placement, stats = placed((0,), a=(1,)), stats_of([1, 2])
    for gain in (0.9, math.nan):
        with pytest.raises(PlacementError, match=f"min_gain={gain}; it must be at least 1"):
            propose_swaps(placement, stats, min_gain=gain)
    with pytest.raises(PlacementError, match="max_swaps=-1; it must be at least 0"):
        propose_swaps(placement, stats, max_swaps=-1)
    with pytest.raises(PlacementError, match=r"has 2 experts in the placement and 3 in the stat"):
        propose_swaps(placement, stats_of([1, 2, 3]))
    with pytest.raises(PlacementError, match=r"layer 0 .* not counted; there are counts of \[4\]"):
        propose_swaps(placement, RoutingStats({4: 2}))


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, RoutingStats]:
    """Any placement on up to three workers, replicas included, and counts of its layers."""
    workers = [f"w{number}" for number in range(draw(st.integers(1, 3)))]
    layers, counts = {}, []
    for number in range(draw(st.integers(1, 3))):
        n_experts = draw(st.integers(1, 8))
        holders = [
            draw(st.sets(st.sampled_from(["hot"])) | st.sets(st.sampled_from(workers), min_size=1))
            or {"hot"}
            for _ in range(n_experts)
        ]
        held = {
            who: tuple(expert for expert, each in enumerate(holders) if who in each)
            for who in ("hot", *workers)
        }
        layers[number] = LayerPlacement(n_experts, held.pop("hot"), held)
        counts.append(draw(st.lists(st.integers(0, 9), min_size=n_experts, max_size=n_experts)))
    return Placement(workers, layers), stats_of(*counts)


def sizes(placement: Placement) -> list[list[int]]:
    """Of the engine and each worker, by layer."""
    return [
        [len(layer.hot), *(len(layer.cold[worker]) for worker in placement.workers)]
        for layer in placement.layers.values()
    ]


@given(placements(), st.sampled_from([1.0, 1.25, 3.0]), st.integers(0, 9))
def test_swaps_keep_sizes_never_lose_and_come_to_an_end(
    drawn: tuple[Placement, RoutingStats], min_gain: float, max_swaps: int
) -> None:
    placement, stats = drawn
    swaps = propose_swaps(placement, stats, min_gain=min_gain, max_swaps=max_swaps)
    assert len(swaps) <= max_swaps
    # `Placement` itself checks that every expert is in a place.
    after = apply_swaps(placement, swaps)
    assert sizes(after) == sizes(placement)
    before_share, after_share = placement.hot_share(stats), after.hot_share(stats)
    for number, share in before_share.items():
        gained = sum(swap.gained_share for swap in swaps if swap.layer == number)
        assert (after_share[number] or 0) == pytest.approx((share or 0) + gained)
        assert all(swap.gained_share > 0 for swap in swaps)
    everything = sum(layer.num_experts for layer in placement.layers.values())
    settled = apply_swaps(
        placement, propose_swaps(placement, stats, min_gain=min_gain, max_swaps=everything)
    )
    assert propose_swaps(settled, stats, min_gain=min_gain, max_swaps=everything) == []
    if min_gain == 1:
        best = Placement.from_counts(
            placement.workers, stats, {n: len(each.hot) for n, each in placement.layers.items()}
        )
        assert settled.total_hot_share(stats) == best.total_hot_share(stats)


def test_the_hot_share_of_all_layers_is_that_of_all_counts() -> None:
    layer = LayerPlacement(2, (0,), {"a": (1,)})
    placement = Placement(["a"], {0: layer, 1: layer})
    assert placement.total_hot_share(stats_of([3, 1], [0, 12])) == 3 / 16
    assert placement.total_hot_share(stats_of([0, 0], [0, 0])) is None
    np.testing.assert_equal(placement.hot_share(stats_of([0, 0], [1, 3])), {0: None, 1: 0.25})
