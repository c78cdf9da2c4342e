"""Asynchronous copies in the shim: there after their wait, and no promise before."""

from __future__ import annotations

import numpy as np
import pytest

from moeshm.backends.gpu.abi import Call
from tests.simt import KernelError, Module, Order, guarded

from .probing import ORDERS, call_of, floats, needs_compiler

pytestmark = needs_compiler


@pytest.mark.parametrize("order", ORDERS)
def test_copies_are_there_after_the_wait(probes_32: Module, order: Order) -> None:
    x, out = guarded(np.arange(1, 9, dtype=np.float32)), floats(12)
    probes_32.launch("copies", 1, 32, 0, call_of(out, x, n_tokens=0), order=order)
    np.testing.assert_array_equal(out, [*range(1, 9), 0, 0, 0, 0])


@pytest.mark.parametrize("newest", [1, 2, 3])
def test_copies_are_not_there_before_the_wait(probes_32: Module, newest: int) -> None:
    x, out = guarded(np.arange(1, 9, dtype=np.float32)), floats(12)
    probes_32.launch("copies", 1, 32, 0, call_of(out, x, n_tokens=newest))
    n_there = 12 - 4 * newest
    np.testing.assert_array_equal(out[:n_there], [*range(1, 9), 0, 0, 0, 0][:n_there])
    assert np.isnan(out[n_there:]).all()


def test_copies_may_be_there_before_the_wait(probes_32: Module) -> None:
    x, out = guarded(np.arange(1, 9, dtype=np.float32)), floats(12)
    probes_32.launch("copies", 1, 32, 0, call_of(out, x, n_tokens=3), order="reverse")
    np.testing.assert_array_equal(out, [*range(1, 9), 0, 0, 0, 0])


def test_copies_are_of_aligned_memory_that_is_there(probes_32: Module) -> None:
    x, out = guarded(np.arange(8, dtype=np.float32)), floats(12)
    with pytest.raises(KernelError, match="not all multiples of 16"):
        probes_32.launch("misaligned_copy", 1, 1, 0, call_of(out, x))
    with pytest.raises(KernelError, match=r"thread 0: touches memory .* byte 32 of a float32"):
        probes_32.launch("copies", 1, 32, 0, Call(x=x.ctypes.data + 16, out=out.ctypes.data))


def _stages(probes: Module, waits: int, order: Order) -> bool:
    x, out = guarded(np.arange(8 * 16, dtype=np.float32).reshape(8, 16)), floats(4, 16)
    probes.launch("stages", 1, 96, 0, call_of(out, x, n_tokens=waits), order=order)
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
    x, out = guarded(np.arange(256, dtype=np.float32).reshape(2, 32, 4)), floats(32)
    probes.launch("arrives_after_copies", 1, 64, 0, call_of(out, x, n_tokens=waits), order=order)
    return bool((out == x.sum(axis=(0, 2))[::-1]).all())


@pytest.mark.parametrize("order", ORDERS)
def test_threads_arrive_once_their_copies_are_there(probes_32: Module, order: Order) -> None:
    assert _adds_after_copies(probes_32, 1, order)


def test_a_missing_wait_for_arrivals_shows(probes_32: Module) -> None:
    assert not all(_adds_after_copies(probes_32, 0, order) for order in ORDERS)


def test_a_block_does_not_end_before_its_copies(probes_32: Module) -> None:
    x = guarded(np.zeros(4, np.float32))
    with pytest.raises(KernelError, match="ended before a bulk copy did"):
        probes_32.launch("copy_at_the_end", 1, 1, 0, call_of(x, x))


def test_a_phase_is_initialised_first(probes_32: Module) -> None:
    with pytest.raises(KernelError, match="a phase before its initialisation"):
        probes_32.launch("phase_of_nothing", 1, 1, 0, Call())
