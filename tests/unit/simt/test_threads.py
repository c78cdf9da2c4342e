"""Threads in the shim: barriers, shuffles, orders, teams and grids."""

from __future__ import annotations

import numpy as np
import pytest

from moeshm.backends.gpu.abi import Call
from tests.simt import KernelError, Module, Order, guarded

from .probing import ORDERS, call_of, floats, ints, needs_compiler

pytestmark = needs_compiler


# --- barriers and shuffles ---------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_give_the_values_of_other_lanes(probes: Module, warp: int, order: Order) -> None:
    out = ints(2 * warp, 2)
    probes.launch("shuffles", 1, 2 * warp, 0, call_of(out, n_tokens=warp // 2), order=order)
    threads = np.arange(2 * warp)
    np.testing.assert_array_equal(out[:, 0], threads ^ (warp // 2))
    np.testing.assert_array_equal(out[:, 1], threads // warp * warp + (threads + 1) % warp)


def test_a_ballot_has_a_bit_for_each_lane(probes: Module, warp: int) -> None:
    ids = guarded(np.random.default_rng(1).integers(0, 2, 128, np.int32))
    out = guarded(np.zeros(128, np.uint64))
    probes.launch("ballots", 1, 128, 0, call_of(out, ids=ids))
    expected = [sum(int(bit) << i for i, bit in enumerate(row)) for row in ids.reshape(-1, warp)]
    np.testing.assert_array_equal(out, np.repeat(np.array(expected, np.uint64), warp))


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_adds_up_its_values(probes: Module, order: Order) -> None:
    x, out = guarded(np.arange(256, dtype=np.float32)), floats(256)
    probes.launch("sums", 2, 256, 0, call_of(out, x), order=order)
    np.testing.assert_array_equal(out, x.sum())


def _rounds(probes: Module, barriers: int, order: Order) -> bool:
    """Whether the sums are right, with these barriers of two."""
    out = ints(128)
    probes.launch("rounds", 1, 128, 0, call_of(out, n_tokens=barriers), order=order)
    return bool(np.array_equal(out, 6000 + 4 * np.arange(127, -1, -1)))


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_order_threads(probes: Module, order: Order) -> None:
    assert _rounds(probes, 3, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("barriers", [0, 1, 2])
def test_a_missing_barrier_shows(probes: Module, barriers: int, order: Order) -> None:
    assert not _rounds(probes, barriers, order)


def test_thousands_of_barriers_take_no_time_to_speak_of(probes: Module) -> None:
    probes.launch("barriers", 1, 1024, 0, Call(n_tokens=2000))


def test_a_deadlock_is_an_error_that_says_who_waits_where(probes: Module) -> None:
    with pytest.raises(
        KernelError,
        match=r"barrier_of_some, block \(1, 0, 0\): .*; 0 to 39 wait at __syncthreads in line \d+ "
        r"`if \(threadIdx.x < 40\) __syncthreads\(\);`; 40 to 127 ended",
    ):
        probes.launch("barrier_of_some", 2, 128, 0, Call(), order="reverse")


@pytest.mark.parametrize("threads", [0, 1025])
def test_a_block_has_1_to_1024_threads(probes: Module, threads: int) -> None:
    with pytest.raises(KernelError, match=f"a block of {threads} threads; 1 to 1024"):
        probes.launch("barriers", 1, threads, 0, Call())


def test_two_barriers_are_not_one(probes: Module) -> None:
    with pytest.raises(KernelError, match=r"0 to 31 wait at __syncthreads .*; 32 to 63 wait at"):
        probes.launch("two_barriers", 1, 64, 0, Call())


def test_lanes_that_went_apart_cannot_shuffle(probes: Module, warp: int) -> None:
    half = warp // 2
    with pytest.raises(
        KernelError, match=rf"0 to {half - 1} wait at SHUFFLE_XOR .*; {half} to {warp - 1} wait at"
    ):
        probes.launch("two_shuffles", 1, warp, 0, Call())


def test_a_shuffle_stays_in_its_warp(probes: Module, warp: int) -> None:
    with pytest.raises(KernelError, match=rf"lane 0 wants the value of lane {warp}, of {warp}"):
        probes.launch("far_shuffle", 1, warp, 0, Call())


def test_a_part_of_a_warp_cannot_shuffle(probes: Module) -> None:
    with pytest.raises(KernelError, match=r"0 to 15 wait at SHUFFLE"):
        probes.launch("shuffles", 1, 16, 0, Call(n_tokens=1))


def test_atomics_count_every_thread(probes: Module) -> None:
    ids, out = guarded(np.arange(-50, 50, dtype=np.int32)), ints(3)
    probes.launch("counts", 1, 100, 0, call_of(out, ids=ids), order=5)
    assert out.tolist() == [100, -50, 49]


# --- orders ------------------------------------------------------------------------------


def _arrivals(probes: Module, order: Order) -> list[int]:
    """By thread of the grid, when it came."""
    out, counter = ints(6 * 70), guarded(np.zeros(1, np.int32))
    call = call_of(out, inner=counter.ctypes.data)
    probes.launch("arrivals", (3, 1, 2), 70, 0, call, order=order)
    came = [int(number) for number in out]
    assert sorted(came) == list(range(6 * 70))
    return came


def test_orders_say_who_comes_first(probes: Module) -> None:
    rising = list(range(6 * 70))
    assert _arrivals(probes, "forward") == rising
    assert _arrivals(probes, "reverse") == rising[::-1]
    by_chance = {tuple(_arrivals(probes, seed)) for seed in range(4)}
    assert len(by_chance) == 4
    # Blocks, and lanes of a warp, are mixed as well.
    for came in by_chance:
        block_starts = [min(came[first : first + 70]) for first in range(0, 6 * 70, 70)]
        assert block_starts != sorted(block_starts)
        assert list(came[:32]) != sorted(came[:32])
    assert by_chance == {tuple(_arrivals(probes, seed)) for seed in range(4)}


def test_after_an_error_the_next_launch_is_right(probes: Module) -> None:
    for _ in range(3):
        with pytest.raises(KernelError):
            probes.launch("reads", 1, 32, 0, Call())
        with pytest.raises(KernelError):
            probes.launch("barrier_of_some", 1, 64, 0, Call())
        assert _rounds(probes, 3, "forward")


# --- teams and grids ---------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_teams_have_barriers_of_their_own(probes_32: Module, order: Order) -> None:
    out = ints(128)
    probes_32.launch("teams", 1, 128, 0, call_of(out, n_tokens=64), order=order)
    np.testing.assert_array_equal(out, [3] * 64 + [6] * 64)


def test_a_team_is_of_one_size(probes_32: Module) -> None:
    with pytest.raises(KernelError, match=r"team 1 has 32 threads in line \d+ .* and 64 in line"):
        probes_32.launch("teams", 1, 128, 0, Call(n_tokens=32))


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_may_wait_for_each_other(probes: Module, order: Order) -> None:
    n_blocks = 5
    out, counter, numbers = ints(n_blocks, 64), guarded(np.zeros(1, np.int32)), ints(n_blocks)
    call = call_of(out, inner=counter.ctypes.data, partial=numbers.ctypes.data, n_tokens=n_blocks)
    probes.launch("waits_for_grid", n_blocks, 64, 0, call, order=order)
    np.testing.assert_array_equal(out, 10 + 100 * np.arange(n_blocks)[:, None] + 0 * out)


def test_a_block_that_never_comes_is_an_error(probes: Module) -> None:
    out, counter, numbers = ints(2, 64), guarded(np.zeros(1, np.int32)), ints(2)
    call = call_of(out, inner=counter.ctypes.data, partial=numbers.ctypes.data, n_tokens=3)
    with pytest.raises(KernelError, match="0 to 0 wait at load_acquire"):
        probes.launch("waits_for_grid", 2, 64, 0, call)
