"""kernels/route.cu: every pair in its expert's list, in order, and the lists cut into tiles."""

from __future__ import annotations

import numpy as np
import pytest

from moeshm.backends import Ids
from moeshm.backends.gpu.abi import Call, Route
from tests.simt import Module, Order, compile, guarded

BLOCK = 512
TILE_ROWS = 32
UNWRITTEN = -7


@pytest.fixture(scope="module", params=[32, 64])
def module(request: pytest.FixtureRequest) -> Module:
    macros = {"WEIGHT": "float", "HIDDEN": 8, "INNER": 64, "ACTIVATION": 0, "HAS_BIAS": 0}
    return compile("route.cu", {**macros, "TILE_ROWS": TILE_ROWS}, request.param)


def check(module: Module, ids: Ids, n_slots: int, grid: int, order: Order = "forward") -> None:
    n_used, lengths = len(np.unique(ids[ids >= 0])), np.bincount(ids[ids >= 0], minlength=n_slots)
    n_tiles = int((-(-lengths // TILE_ROWS)).sum())
    assert n_tiles <= n_used + ids.size // TILE_ROWS, "what a caller makes room for"
    ids = guarded(ids, 4)
    sizes = (n_slots + 1, ids.size, 1, n_tiles * 2)
    parts = [guarded(np.full(size, UNWRITTEN, np.int32), 4) for size in sizes]
    call = Call(ids=ids.ctypes.data, n_tokens=len(ids), top_k=ids.shape[1], n_slots=n_slots)
    route = Route(*(part.ctypes.data for part in parts))
    module.launch("route", grid, BLOCK, 0, call, route, order=order)

    begin, pairs, found_tiles, tiles = parts
    # A stable sort by expert, those without one left out.
    expected = np.argsort(ids.ravel(), kind="stable")[(ids < 0).sum() :]
    assert np.array_equal(begin, np.concatenate([[0], np.cumsum(lengths)]))
    assert np.array_equal(pairs[: len(expected)], expected)
    assert (pairs[len(expected) :] == UNWRITTEN).all()
    assert found_tiles.tolist() == [n_tiles]
    assert tiles.reshape(-1, 2).tolist() == [
        [slot, first]
        for slot in range(n_slots)
        for first in range(begin[slot], begin[slot + 1], TILE_ROWS)
    ]


@pytest.mark.parametrize("grid", [1, 3, 32])
@pytest.mark.parametrize("n_slots", [1, 2, 5, 128, 1023, 1024, 1025, 2500])
def test_lists_and_tiles(module: Module, n_slots: int, grid: int) -> None:
    rng = np.random.default_rng(n_slots)
    for n_tokens, top_k in [(1, 1), (3, 2), (33, 8), (517, 3), (1000, 8)]:
        check(module, rng.integers(-1, n_slots, (n_tokens, top_k), np.int32), n_slots, grid)


@pytest.mark.parametrize("order", ["reverse", 1, 2])
def test_any_order_of_threads_and_blocks(module: Module, order: Order) -> None:
    rng = np.random.default_rng(0)
    check(module, rng.integers(-1, 40, (700, 3), np.int32), 40, 5, order)


@pytest.mark.parametrize("grid", [1, 2, 32])
@pytest.mark.parametrize("slot", [-1, 0, 6, 7])
def test_all_pairs_on_one_slot(module: Module, slot: int, grid: int) -> None:
    """With 65536 pairs, the most that a call has, a count needs its 17th bit."""
    check(module, np.full((4096, 16), slot, np.int32), 8, grid)


def test_the_most_pairs(module: Module) -> None:
    rng = np.random.default_rng(0)
    check(module, rng.integers(0, 256, (8192, 8), np.int32), 256, 1)


def test_no_tokens(module: Module) -> None:
    check(module, np.empty((0, 8), np.int32), 5, 2)
