"""Routing statistics count what the router chose, add up, fade, and survive a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeshm.errors import SettingError
from moeshm.routing_stats import RoutingStats


def counted(stats: RoutingStats, layer: int) -> list[float]:
    counts: list[float] = stats.counts(layer).tolist()
    return counts


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int16])
def test_ids_are_counted_and_empty_slots_are_not(dtype: type[np.signedinteger[Any]]) -> None:
    stats = RoutingStats({3: 4})
    stats.observe(3, np.array([[0, 3], [3, -1]], dtype))
    stats.observe(3, np.array([[3, 1]], dtype))
    assert counted(stats, 3) == [1, 1, 0, 3]
    assert stats.total() == 5


def test_ids_of_any_strides_count() -> None:
    stats = RoutingStats({0: 8})
    stats.observe(0, np.arange(8, dtype=np.int32).reshape(4, 2)[::2, ::-1])
    assert counted(stats, 0) == [1, 1, 0, 0, 1, 1, 0, 0]


def test_counts_match_bincount_on_random_ids() -> None:
    ids = np.random.default_rng(5).integers(-1, 64, (500, 8), np.int32)
    stats = RoutingStats({1: 64})
    stats.observe(1, ids)
    np.testing.assert_array_equal(stats.counts(1), np.bincount(ids[ids >= 0], minlength=64))


def test_an_id_that_cannot_be_is_named() -> None:
    with pytest.raises(ValueError, match=r"expert id 4; those of layer 0 are 0\.\.3"):
        RoutingStats({0: 4}).observe(0, np.array([[1, 4]], np.int32))


def test_torch_ids_are_counted_on_cpu_and_where_they_are() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    stats = RoutingStats({0: 4})
    ids = torch.tensor([[0, 3], [3, -1]])
    stats.observe(0, ids)
    # What ids on a GPU go through; any device does for the arithmetic.
    stats._count_on_device(0, ids)
    assert counted(stats, 0) == [2, 0, 0, 4]


def test_merging_adds_layers_and_counts() -> None:
    left, right = RoutingStats({0: 2, 5: 2}), RoutingStats({5: 2, 1: 3})
    left.observe(5, np.array([0], np.int32))
    right.observe(5, np.array([0, 1], np.int32))
    right.observe(1, np.array([2], np.int32))
    left.merge(right)
    assert left.layers == (0, 1, 5)
    assert [counted(left, layer) for layer in left.layers] == [[0, 0], [0, 0, 1], [2, 1]]
    assert counted(right, 5) == [1, 1]


def test_merging_different_models_is_refused_and_changes_nothing() -> None:
    left = RoutingStats({0: 2, 1: 2})
    other = RoutingStats({0: 2, 1: 3})
    other.observe(0, np.array([1], np.int32))
    with pytest.raises(ValueError, match="layer 1 has 2 experts here and 3 there"):
        left.merge(other)
    assert left.total() == 0


def test_decay() -> None:
    stats = RoutingStats({0: 2})
    stats.observe(0, np.array([0, 0, 1], np.int32))
    stats.decay(0.5)
    stats.observe(0, np.array([1], np.int32))
    assert counted(stats, 0) == [1.0, 1.5]
    with pytest.raises(ValueError, match=r"factor=1\.5"):
        stats.decay(1.5)


def test_what_came_since_is_a_difference() -> None:
    stats = RoutingStats({0: 2, 3: 2})
    stats.observe(0, np.array([0, 1], np.int32))
    earlier = RoutingStats({0: 2})
    earlier.merge(stats)
    stats.observe(0, np.array([1], np.int32))
    stats.observe(3, np.array([0], np.int32))
    since = stats.since(earlier)
    assert [counted(since, layer) for layer in since.layers] == [[0, 1], [1, 0]]
    assert counted(stats, 0) == [1, 2]
    assert stats.since(stats).total() == 0


@pytest.mark.parametrize("sizes", [{0: 2}, {0: 3}, {0: 2, 1: 1}])
def test_where_a_count_fell_or_is_gone_all_of_it_is_new(sizes: dict[int, int]) -> None:
    earlier = RoutingStats(sizes)
    earlier.observe(0, np.array([0, 0], np.int32))
    stats = RoutingStats({0: 2})
    stats.observe(0, np.array([0, 1, 1, 1], np.int32))
    assert counted(stats.since(earlier), 0) == [1, 3]


@pytest.mark.parametrize("name", ["stats.csv", "stats.npz"])
def test_a_file_may_be_read_while_it_is_saved(tmp_path: Path, name: str) -> None:
    """A link to the old file keeps its content: it was not written into."""
    path, link = tmp_path / name, tmp_path / f"old-{name}"
    RoutingStats({0: 3}).save(path)
    link.hardlink_to(path)
    stats = RoutingStats({0: 3})
    stats.observe(0, np.array([1], np.int32))
    stats.save(path)
    assert RoutingStats.load(link).total() == 0
    assert RoutingStats.load(path).total() == 1


@pytest.mark.parametrize("name", ["stats.csv", "stats.npz"])
def test_a_file_gives_the_counts_back(tmp_path: Path, name: str) -> None:
    stats = RoutingStats({2: 5, 10: 3})
    stats.observe(2, np.array([0, 4, 4], np.int32))
    stats.observe(10, np.array([2], np.int32))
    stats.decay(0.3)
    stats.save(tmp_path / name)
    again = RoutingStats.load(tmp_path / name)
    assert again.layers == (2, 10)
    assert [counted(again, n) for n in (2, 10)] == [counted(stats, n) for n in (2, 10)]


def test_whole_counts_are_written_as_whole_numbers(tmp_path: Path) -> None:
    stats = RoutingStats({0: 2})
    stats.observe(0, np.array([1], np.int32))
    stats.save(tmp_path / "stats.csv")
    assert (tmp_path / "stats.csv").read_text().split() == ["layer,expert,count", "0,0,0", "0,1,1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line is None"),
        ("a,b,c\n", "the first line is"),
        ("layer,expert,count\n0,1,3\n", "does not list each expert"),
        ("layer,expert,count\n0,0\n", "not enough values"),
        ("layer,expert,count\n0,0,-1\n", "negative"),
        ("layer,expert,count\n0,0,nan\n", "no numbers"),
        ("layer,expert,count\n0,0,many\n", "could not convert"),
    ],
)
def test_a_bad_file_says_so(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "stats.csv"
    path.write_text(text)
    with pytest.raises(SettingError, match=message):
        RoutingStats.load(path)


def test_other_suffixes_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"ends in \.csv or \.npz"):
        RoutingStats({0: 1}).save(tmp_path / "stats.json")
    with pytest.raises(SettingError, match="No such file"):
        RoutingStats.load(tmp_path / "stats.npz")
