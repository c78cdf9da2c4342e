"""A placement puts every expert somewhere, by rule, by count or by budget, and reads back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeshm.errors import SettingError
from moeshm.layers import fingerprint_of
from moeshm.placement import LayerPlacement, Placement, PlacementError
from moeshm.routing_stats import RoutingStats


def stats_of(*counts: list[int]) -> RoutingStats:
    """Layer n with the n-th list of counts."""
    stats = RoutingStats({layer: len(each) for layer, each in enumerate(counts)})
    for layer, each in enumerate(counts):
        ids = np.repeat(np.arange(len(each)), each).astype(np.int32)
        stats.observe(layer, ids)
    return stats


def test_a_rule_decides_and_the_rest_is_dealt_out_in_turn() -> None:
    placement = Placement.by_rule(["a", "b"], {2: 6}, lambda _layer, expert: expert < 2)
    assert placement.layers[2] == LayerPlacement(6, (0, 1), {"a": (2, 4), "b": (3, 5)})


def test_the_most_used_are_hot_and_ties_go_to_the_lower_id() -> None:
    placement = Placement.from_counts(["a"], stats_of([1, 5, 5, 0], [0, 0, 0, 9]), 2)
    assert [layer.hot for layer in placement.layers.values()] == [(1, 2), (0, 3)]


def test_workers_get_even_shares_of_the_calls() -> None:
    counts = [100, 1, 60, 50, 1, 1]
    placement = Placement.from_counts(["a", "b"], stats_of(counts), 0)
    shares = [sum(counts[e] for e in placement.layers[0].cold[name]) for name in ("a", "b")]
    assert sorted(shares) == [103, 110]


def test_a_budget_is_spent_where_the_value_per_byte_is_highest() -> None:
    # Shares: layer 0 has 0.6 0.3 0.1, layer 1 0.4 0.3 0.3; layer 1's experts are twice as large.
    stats = stats_of([6, 3, 1], [4, 3, 3])
    placement = Placement.from_budget(["a"], stats, {0: 10, 1: 20}, 40)
    # 0.6/10, 0.3/10, 0.4/20: forty bytes.
    assert [layer.hot for layer in placement.layers.values()] == [(0, 1), (0,)]
    assert placement.hot_share(stats) == pytest.approx({0: 0.9, 1: 0.4})


def test_the_floor_of_every_layer_comes_first() -> None:
    stats = stats_of([9, 1], [0, 0])
    placement = Placement.from_budget(["a"], stats, {0: 10, 1: 10}, 20, min_hot_per_layer=1)
    assert [layer.hot for layer in placement.layers.values()] == [(0,), (0,)]
    with pytest.raises(PlacementError, match="take 20 bytes and the budget is 19"):
        Placement.from_budget(["a"], stats, {0: 10, 1: 10}, 19, min_hot_per_layer=1)


def test_replicas_are_on_different_workers() -> None:
    placement = Placement.from_counts(["a", "b", "c"], stats_of([3, 2, 1]), 1, replicas=2)
    held = [worker for worker in "abc" for e in placement.layers[0].cold[worker] if e == 1]
    assert len(set(held)) == 2
    with pytest.raises(PlacementError, match="replicas=4; there are 3 workers"):
        Placement.from_counts(["a", "b", "c"], stats_of([3, 2, 1]), 1, replicas=4)


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 12),
    st.data(),
)
def test_every_expert_is_hot_or_on_just_as_many_workers_as_asked_for(
    counts: list[list[int]], n_workers: int, n_hot: int, data: st.DataObject
) -> None:
    workers = [f"w{i}" for i in range(n_workers)]
    replicas = data.draw(st.integers(1, n_workers))
    hot = {layer: min(n_hot, len(each)) for layer, each in enumerate(counts)}
    placement = Placement.from_counts(workers, stats_of(*counts), hot, replicas)
    for layer, each in enumerate(counts):
        is_hot = placement.is_hot(layer)
        assert is_hot.sum() == hot[layer]
        tables = np.stack([placement.local_ids(layer, worker) for worker in workers])
        np.testing.assert_array_equal((tables >= 0).sum(axis=0), np.where(is_hot, 0, replicas))
        for worker, table in zip(workers, tables, strict=True):
            held = placement.experts_of(worker).get(layer, ())
            assert [int(table[expert]) for expert in held] == list(range(len(held)))
        assert len(each) == placement.layers[layer].num_experts
    assert Placement.from_json(placement.to_json()) == placement


def test_a_person_can_read_and_write_the_file(tmp_path: Path) -> None:
    placement = Placement.by_rule(["w0", "w1"], {3: 8}, lambda _layer, expert: expert < 4)
    placement.save(tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text()
    assert '"3": {"num_experts":8,"hot":"0-3","cold":{"w0":"4, 6","w1":"5, 7"}}' in text
    assert Placement.load(tmp_path / "p.json") == placement
    layer = '{"num_experts": 3, "hot": "2,0", "cold": {"w": "1"}}'
    by_hand = f'{{"version": 1, "workers": ["w"], "layers": {{"0": {layer}}}}}'
    assert Placement.from_json(by_hand).layers[0].hot == (0, 2)


def test_fingerprints_tell_shares_apart() -> None:
    placement = Placement.by_rule(["a", "b"], {0: 4, 1: 4}, lambda layer, expert: expert == layer)
    assert placement.fingerprint("a") != placement.fingerprint("b")
    assert placement.fingerprint("a") == fingerprint_of(placement.experts_of("a"))
    assert fingerprint_of({0: (1, 2)}) != fingerprint_of({0: (2, 1)})
    assert fingerprint_of({0: (1,), 1: (2,)}) == fingerprint_of({1: (2,), 0: (1,)})
    with pytest.raises(PlacementError, match="no worker 'c'; there are a, b"):
        placement.fingerprint("c")


@pytest.mark.parametrize(
    ("hot", "cold", "message"),
    [
        ("0", {"w": "1"}, "expert 2 is neither hot nor on a worker"),
        ("0-1", {"w": "1-2"}, "expert 1 is hot and on a worker"),
        ("0-2", {"x": ""}, "names the worker 'x'; there are 'w'"),
        ("0-3", {}, r"hot: expert 3; there are 0\.\.2"),
        ("two", {}, "'two' in 'two' is no number"),
    ],
)
def test_what_cannot_be_is_named(hot: str, cold: dict[str, str], message: str) -> None:
    layer = {"num_experts": 3, "hot": hot, "cold": cold}
    file = {"version": 1, "workers": ["w"], "layers": {"7": layer}}
    with pytest.raises(PlacementError, match=f"layer 7.*{message}"):
        Placement.from_json(str(file).replace("'", '"'))


def test_files_that_are_no_placement(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no placement"):
        Placement.from_json("{}")
    with pytest.raises(PlacementError, match="version 2; this moeshm reads 1"):
        Placement.from_json('{"version": 2, "workers": [], "layers": {}}')
    with pytest.raises(PlacementError, match=r"gone\.json.*No such file"):
        Placement.load(tmp_path / "gone.json")
    with pytest.raises(PlacementError, match="a name is there twice"):
        Placement(["a", "a"], {})
