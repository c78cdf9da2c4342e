"""Memory in the shim: what is out of bounds, not aligned or never set is an error or shows."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moeshm.backends.gpu.abi import Call
from tests.simt import KernelError, Module, guarded

from .probing import call_of, floats, needs_compiler

pytestmark = needs_compiler

#: Where the processor says which instruction failed, and divisions by zero fail.
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 only")


def test_blocks_leave_nothing_in_shared_memory(probes: Module) -> None:
    out = guarded(np.zeros((3, 64), np.float32))
    probes.launch("leftovers", 3, 32, 128, call_of(out))
    assert np.isnan(out).all()


@pytest.mark.parametrize("n_values", [1, 4, 5, 1023, 1024, 1025])
def test_guarded_arrays_end_where_memory_does(probes: Module, n_values: int) -> None:
    x, out = guarded(np.arange(n_values, dtype=np.float32), alignment=4), floats(n_values + 1)
    threads = min(n_values, 1024)
    probes.launch("reads", 1, threads, 0, call_of(out, x))
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
    x, out = guarded(np.zeros(8, np.float32)), floats(4)
    with pytest.raises(KernelError, match="an address that is not aligned"):
        probes.launch("misaligned", 1, 1, 0, call_of(out, x))


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
    out = floats(1)
    probes.launch("sums_from_nothing", 1, 1, 0, call_of(out, n_tokens=3))
    assert not abs(float(out[0])) < 1e30


def test_after_a_launch_faults_end_the_process_again() -> None:
    text = """
import ctypes
from tests import simt
from tests.unit.simt.probing import probe_module
from moeshm.backends.gpu.abi import Call
try:
    probe_module(32).launch("reads", 1, 32, 0, Call())
except simt.KernelError:
    print("caught", flush=True)
ctypes.string_at(8)
"""
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=root, capture_output=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == (b"caught\n", -signal.SIGSEGV)
