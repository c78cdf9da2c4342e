"""The shim that runs kernels on the host: what it computes, and what it does not let pass."""

from __future__ import annotations

import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moeshm.backends.gpu.abi import Call
from moeshm.kernels import source
from tests import simt
from tests.simt import KernelError, Module, Order, guarded

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

ORDERS: tuple[Order, ...] = ("forward", "reverse", 0, 1, 2)
MACROS = {"WEIGHT": "float", "HIDDEN": 8, "INNER": 64, "ACTIVATION": 0, "HAS_BIAS": 0}
PROBES = Path(simt.__file__).with_name("probes.cu")
#: Where the processor says which instruction failed, and divisions by zero fail.
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


def probe_module(warp: int) -> Module:
    """The kernels of probes.cu."""
    text = source("ffn.cuh") + PROBES.read_text()
    return simt.compile_text(text, MACROS, warp, name="probes.cu")


@pytest.fixture(params=[32, 64], ids="WARP={}".format)
def warp(request: pytest.FixtureRequest) -> int:
    lanes: int = request.param
    return lanes


@pytest.fixture
def probes(warp: int) -> Module:
    return probe_module(warp)


@pytest.fixture
def probes_32() -> Module:
    return probe_module(32)


def _call(
    out: npt.NDArray[Any],
    x: npt.NDArray[Any] | None = None,
    ids: npt.NDArray[Any] | None = None,
    **others: int,
) -> Call:
    addresses = {"x": x, "ids": ids}
    given = {name: array.ctypes.data for name, array in addresses.items() if array is not None}
    return Call(out=out.ctypes.data, **given, **others)


def _floats(*shape: int) -> Floats:
    return guarded(np.full(shape, np.nan, np.float32))


def _ints(*shape: int) -> Ints:
    return guarded(np.full(shape, -1, np.int32))


# --- barriers and shuffles ---------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_give_the_values_of_other_lanes(probes: Module, warp: int, order: Order) -> None:
    out = _ints(2 * warp, 2)
    probes.launch("shuffles", 1, 2 * warp, 0, _call(out, n_tokens=warp // 2), order=order)
    threads = np.arange(2 * warp)
    np.testing.assert_array_equal(out[:, 0], threads ^ (warp // 2))
    np.testing.assert_array_equal(out[:, 1], threads // warp * warp + (threads + 1) % warp)


def test_a_ballot_has_a_bit_for_each_lane(probes: Module, warp: int) -> None:
    ids = guarded(np.random.default_rng(1).integers(0, 2, 128, np.int32))
    out = guarded(np.zeros(128, np.uint64))
    probes.launch("ballots", 1, 128, 0, _call(out, ids=ids))
    expected = [sum(int(bit) << i for i, bit in enumerate(row)) for row in ids.reshape(-1, warp)]
    np.testing.assert_array_equal(out, np.repeat(np.array(expected, np.uint64), warp))


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_adds_up_its_values(probes: Module, order: Order) -> None:
    x, out = guarded(np.arange(256, dtype=np.float32)), _floats(256)
    probes.launch("sums", 2, 256, 0, _call(out, x), order=order)
    np.testing.assert_array_equal(out, x.sum())


def _rounds(probes: Module, barriers: int, order: Order) -> bool:
    """Whether the sums are right, with these barriers of two."""
    out = _ints(128)
    probes.launch("rounds", 1, 128, 0, _call(out, n_tokens=barriers), order=order)
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
    ids, out = guarded(np.arange(-50, 50, dtype=np.int32)), _ints(3)
    probes.launch("counts", 1, 100, 0, _call(out, ids=ids), order=5)
    assert out.tolist() == [100, -50, 49]


# --- orders ------------------------------------------------------------------------------


def _arrivals(probes: Module, order: Order) -> list[int]:
    """By thread of the grid, when it came."""
    out, counter = _ints(6 * 70), guarded(np.zeros(1, np.int32))
    call = _call(out, inner=counter.ctypes.data)
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


# --- memory ------------------------------------------------------------------------------


def test_blocks_leave_nothing_in_shared_memory(probes: Module) -> None:
    out = guarded(np.zeros((3, 64), np.float32))
    probes.launch("leftovers", 3, 32, 128, _call(out))
    assert np.isnan(out).all()


@pytest.mark.parametrize("n_values", [1, 4, 5, 1023, 1024, 1025])
def test_guarded_arrays_end_where_memory_does(probes: Module, n_values: int) -> None:
    x, out = guarded(np.arange(n_values, dtype=np.float32), alignment=4), _floats(n_values + 1)
    threads = min(n_values, 1024)
    probes.launch("reads", 1, threads, 0, _call(out, x))
    np.testing.assert_array_equal(out[:threads], x[:threads])
    # The last thread reads the value behind the last.
    shifted = x.ctypes.data + 4 * (n_values - threads + 1)
    with pytest.raises(
        KernelError,
        match=rf"thread {threads - 1}: touches memory that it cannot reach: 0x\w+, "
        rf"byte {4 * n_values} of a float32 array of shape \({n_values},\)",
    ):
        probes.launch("reads", 1, threads, 0, Call(x=shifted, out=out.ctypes.data))


def test_guarded_arrays_may_be_empty_and_start_aligned() -> None:
    assert guarded(np.zeros((0, 8), np.float32)).shape == (0, 8)
    for n_values in range(1, 9):
        assert guarded(np.zeros(n_values, np.uint16)).ctypes.data % 16 == 0


@on_x86
def test_a_fault_names_the_line(probes: Module) -> None:
    with pytest.raises(KernelError, match=r"in line \d+ `\(\(float\*\)call.out\)\[threadIdx.x\]"):
        probes.launch("reads", 1, 32, 0, Call())


def test_addresses_are_aligned_or_an_error(probes: Module) -> None:
    x, out = guarded(np.zeros(8, np.float32)), _floats(4)
    with pytest.raises(KernelError, match="an address that is not aligned"):
        probes.launch("misaligned", 1, 1, 0, _call(out, x))


def test_indexes_of_shared_arrays_are_checked(probes: Module) -> None:
    probes.launch("beyond_array", 1, 1, 0, Call(n_tokens=7))
    with pytest.raises(KernelError, match="an index out of bounds"):
        probes.launch("beyond_array", 1, 1, 0, Call(n_tokens=8))


def test_dynamic_shared_memory_has_an_end(probes: Module) -> None:
    probes.launch("beyond_dynamic", 1, 1, 100, Call(n_tokens=99))
    with pytest.raises(KernelError, match="writes past the end of its dynamic shared memory"):
        probes.launch("beyond_dynamic", 1, 1, 100, Call(n_tokens=100))
    with pytest.raises(KernelError, match="touches memory that it cannot reach"):
        probes.launch("beyond_dynamic", 1, 1, 100, Call(n_tokens=128))


@on_x86
def test_division_by_zero_is_an_error(probes: Module) -> None:
    with pytest.raises(KernelError, match="divides an integer by zero"):
        probes.launch("divides", 1, 1, 0, Call(top_k=5, n_tokens=0))


def test_too_much_stack_is_an_error(probes: Module) -> None:
    with pytest.raises(KernelError, match="uses more stack than a thread has"):
        probes.launch("much_stack", 1, 64, 0, Call())


def test_what_was_never_set_does_not_look_like_zero(probes: Module) -> None:
    out = _floats(1)
    probes.launch("sums_from_nothing", 1, 1, 0, _call(out, n_tokens=3))
    assert not abs(float(out[0])) < 1e30


def test_after_an_error_the_next_launch_is_right(probes: Module) -> None:
    for _ in range(3):
        with pytest.raises(KernelError):
            probes.launch("reads", 1, 32, 0, Call())
        with pytest.raises(KernelError):
            probes.launch("barrier_of_some", 1, 64, 0, Call())
        assert _rounds(probes, 3, "forward")


def test_after_a_launch_faults_end_the_process_again() -> None:
    text = """
import ctypes
from tests import simt
from tests.unit.test_simt import probe_module
from moeshm.backends.gpu.abi import Call
try:
    probe_module(32).launch("reads", 1, 32, 0, Call())
except simt.KernelError:
    print("caught", flush=True)
ctypes.string_at(8)
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=root, capture_output=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == (b"caught\n", -signal.SIGSEGV)


# --- asynchronous copies -----------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_copies_are_there_after_the_wait(probes_32: Module, order: Order) -> None:
    x, out = guarded(np.arange(1, 9, dtype=np.float32)), _floats(12)
    probes_32.launch("copies", 1, 32, 0, _call(out, x, n_tokens=0), order=order)
    np.testing.assert_array_equal(out, [*range(1, 9), 0, 0, 0, 0])


@pytest.mark.parametrize("newest", [1, 2, 3])
def test_copies_are_not_there_before_the_wait(probes_32: Module, newest: int) -> None:
    x, out = guarded(np.arange(1, 9, dtype=np.float32)), _floats(12)
    probes_32.launch("copies", 1, 32, 0, _call(out, x, n_tokens=newest))
    n_there = 12 - 4 * newest
    np.testing.assert_array_equal(out[:n_there], [*range(1, 9), 0, 0, 0, 0][:n_there])
    assert np.isnan(out[n_there:]).all()


def test_copies_may_be_there_before_the_wait(probes_32: Module) -> None:
    x, out = guarded(np.arange(1, 9, dtype=np.float32)), _floats(12)
    probes_32.launch("copies", 1, 32, 0, _call(out, x, n_tokens=3), order="reverse")
    np.testing.assert_array_equal(out, [*range(1, 9), 0, 0, 0, 0])


def test_copies_are_of_aligned_memory_that_is_there(probes_32: Module) -> None:
    x, out = guarded(np.arange(8, dtype=np.float32)), _floats(12)
    with pytest.raises(KernelError, match="not all multiples of 16"):
        probes_32.launch("misaligned_copy", 1, 1, 0, _call(out, x))
    with pytest.raises(KernelError, match=r"thread 0: touches memory .* byte 32 of a float32"):
        probes_32.launch("copies", 1, 32, 0, Call(x=x.ctypes.data + 16, out=out.ctypes.data))


def _stages(probes: Module, waits: int, order: Order) -> bool:
    x, out = guarded(np.arange(8 * 16, dtype=np.float32).reshape(8, 16)), _floats(4, 16)
    probes.launch("stages", 1, 96, 0, _call(out, x, n_tokens=waits), order=order)
    return bool((out == x.sum(axis=0)).all())


@pytest.mark.parametrize("order", ORDERS)
def test_phases_hand_stages_over(probes_32: Module, order: Order) -> None:
    assert _stages(probes_32, 3, order)


@pytest.mark.parametrize("waits", [0, 1, 2])
def test_a_missing_wait_for_a_phase_shows(probes_32: Module, waits: int) -> None:
    def is_right(order: Order) -> bool:
        try:
            return _stages(probes_32, waits, order)
        except KernelError:
            return False

    assert not all(is_right(order) for order in ORDERS)


def _adds_after_copies(probes: Module, waits: int, order: Order) -> bool:
    x, out = guarded(np.arange(256, dtype=np.float32).reshape(2, 32, 4)), _floats(32)
    probes.launch("arrives_after_copies", 1, 64, 0, _call(out, x, n_tokens=waits), order=order)
    return bool((out == x.sum(axis=(0, 2))[::-1]).all())


@pytest.mark.parametrize("order", ORDERS)
def test_threads_arrive_once_their_copies_are_there(probes_32: Module, order: Order) -> None:
    assert _adds_after_copies(probes_32, 1, order)


def test_a_missing_wait_for_arrivals_shows(probes_32: Module) -> None:
    assert not all(_adds_after_copies(probes_32, 0, order) for order in ORDERS)


def test_a_block_does_not_end_before_its_copies(probes_32: Module) -> None:
    x = guarded(np.zeros(4, np.float32))
    with pytest.raises(KernelError, match="ended before a bulk copy did"):
        probes_32.launch("copy_at_the_end", 1, 1, 0, _call(x, x))


def test_a_phase_is_initialised_first(probes_32: Module) -> None:
    with pytest.raises(KernelError, match="a phase before its initialisation"):
        probes_32.launch("phase_of_nothing", 1, 1, 0, Call())


# --- teams and grids ---------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_teams_have_barriers_of_their_own(probes_32: Module, order: Order) -> None:
    out = _ints(128)
    probes_32.launch("teams", 1, 128, 0, _call(out, n_tokens=64), order=order)
    np.testing.assert_array_equal(out, [3] * 64 + [6] * 64)


def test_a_team_is_of_one_size(probes_32: Module) -> None:
    with pytest.raises(KernelError, match=r"team 1 has 32 threads in line \d+ .* and 64 in line"):
        probes_32.launch("teams", 1, 128, 0, Call(n_tokens=32))


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_may_wait_for_each_other(probes: Module, order: Order) -> None:
    n_blocks = 5
    out, counter, numbers = _ints(n_blocks, 64), guarded(np.zeros(1, np.int32)), _ints(n_blocks)
    call = _call(out, inner=counter.ctypes.data, partial=numbers.ctypes.data, n_tokens=n_blocks)
    probes.launch("waits_for_grid", n_blocks, 64, 0, call, order=order)
    np.testing.assert_array_equal(out, 10 + 100 * np.arange(n_blocks)[:, None] + 0 * out)


def test_a_block_that_never_comes_is_an_error(probes: Module) -> None:
    out, counter, numbers = _ints(2, 64), guarded(np.zeros(1, np.int32)), _ints(2)
    call = _call(out, inner=counter.ctypes.data, partial=numbers.ctypes.data, n_tokens=3)
    with pytest.raises(KernelError, match="0 to 0 wait at load_acquire"):
        probes.launch("waits_for_grid", 2, 64, 0, call)


# --- numbers -----------------------------------------------------------------------------


def test_every_float16_is_widened(probes: Module) -> None:
    out = _floats(1 << 16)
    probes.launch("widens", 256, 256, 0, _call(out))
    expected = np.arange(1 << 16).astype(np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.signbit(out), np.signbit(expected))


def _float32_to_narrow(seed: int) -> Floats:
    """Every float16, what lies around it and halfway to the next, and random bits."""
    halves = np.arange(1 << 16).astype(np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    between = (finite[1:] + finite[:-1]) / 2
    around = [np.nextafter(between, np.float32(side)) for side in (-np.inf, np.inf)]
    edges = np.array([65519, 65520, 65521, 1e30, 1e-30, 1e-45, -0.0], np.float32)
    bits = np.random.default_rng(seed).integers(0, 1 << 32, 1 << 16, np.uint32).view(np.float32)
    return np.concatenate([halves, between, *around, edges, -edges, bits])


@pytest.mark.parametrize("seed", [3])
def test_float32_are_rounded_to_the_nearest_float16(probes: Module, seed: int) -> None:
    x = guarded(_float32_to_narrow(seed))
    out = guarded(np.zeros(x.size, np.uint16))
    probes.launch("narrows", -(-x.size // 256), 256, 0, _call(out, x, n_tokens=x.size))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(out.view(np.float16), expected)
    np.testing.assert_array_equal(np.signbit(out.view(np.float16)), np.signbit(expected))


@pytest.mark.parametrize("seed", [4, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_mma_multiplies_its_fragments(probes_32: Module, order: Order, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = guarded(random.standard_normal((24, 16)).astype(np.float16))
    c = random.standard_normal((16, 8)).astype(np.float32)
    out = guarded(c)
    probes_32.launch("multiplies", 1, 32, 0, _call(out, x), order=order)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(out, c + wide[:16] @ wide[16:].T, rtol=1e-6, atol=1e-6)


def test_ldmatrix_hands_out_four_tiles(probes_32: Module) -> None:
    x = guarded(np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8))
    out = guarded(np.zeros((32, 4), np.uint32))
    probes_32.launch("loads_tiles", 1, 32, 0, _call(out, x))
    for lane in range(32):
        for tile in range(4):
            first = int(x[tile, lane // 4, lane % 4 * 2])
            assert out[lane, tile] == first | (first + 1) << 16


def test_stmatrix_puts_tiles_back_transposed(probes_32: Module) -> None:
    x = np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8)
    words = guarded(np.zeros((32, 8), np.uint16))
    for lane in range(32):
        words[lane] = x[:, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].ravel()
    out = guarded(np.zeros((4, 8, 8), np.uint16))
    probes_32.launch("stores_tiles", 1, 32, 0, _call(out, words, n_tokens=1))
    np.testing.assert_array_equal(out, x.swapaxes(1, 2))
    probes_32.launch("stores_tiles", 1, 32, 0, _call(out, words, n_tokens=0))
    np.testing.assert_array_equal(out, 0xFFFF)


def _wgmma(probes: Module, columns: int, waits: int, order: Order) -> tuple[Floats, Any]:
    """D and what it should be."""
    x = guarded(np.random.default_rng(6).standard_normal((64 + columns, 64)).astype(np.float16))
    out = _floats(64, columns)
    shared = (64 + columns) * 128 + 1024
    kernel = f"multiplies_by_group_{columns}"
    probes.launch(kernel, 1, 128, shared, _call(out, x, n_tokens=waits), order=order)
    wide = x.astype(np.float64)
    return out, wide[:64] @ wide[64:].T


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [8, 64, 256])
def test_wgmma_multiplies_swizzled_tiles(probes_32: Module, columns: int, order: Order) -> None:
    out, expected = _wgmma(probes_32, columns, 3, order)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_wgmma_happens_until_its_wait(probes_32: Module) -> None:
    early, expected = _wgmma(probes_32, 8, 0, "forward")
    np.testing.assert_array_equal(early, 0)
    overwritten, _ = _wgmma(probes_32, 8, 1, "forward")
    assert not np.allclose(overwritten, expected, atol=1e-3)
    at_once, _ = _wgmma(probes_32, 8, 0, "reverse")
    np.testing.assert_allclose(at_once, expected, rtol=1e-5, atol=1e-5)


def test_wgmma_is_for_four_warps_and_aligned_tiles(probes_32: Module) -> None:
    with pytest.raises(KernelError, match=r"threads 0 and 96 of a group ran 1 and 0 wgmma"):
        probes_32.launch("multiplies_by_some", 1, 128, 9216, Call())
    with pytest.raises(KernelError, match="does not start at a multiple of 1024"):
        probes_32.launch("multiplies_by_some", 1, 128, 9216, Call(n_tokens=128))
