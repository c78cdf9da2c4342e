"""The kernel that stays on a GPU, and a worker that has one.

It is for a GPU that no other process uses: tests of worker processes take one that this process has
not used either, as when this file is run by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeshm
from moeshm._words import wait_for_word
from moeshm.backends import Ids, Weights
from moeshm.backends.gpu import resident
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.cupy_device import open_device
from moeshm.backends.gpu.device import Device
from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import load
from moeshm.demo import tiny_moe_path
from moeshm.dtypes import Array, DType, narrow, widen
from moeshm.transport.slab import DONE, REFUSED
from tests.checkpoints import random_layer
from tests.conformance.test_backends import TOLERANCE, assert_close, compute, draw_call
from tests.crash import processes
from tests.unit.gpu_slabs import engine
from tests.wire import meanwhile

pytestmark = pytest.mark.gpu

Inputs = tuple[Array, Ids, Weights]

BF16, F16, F32 = DType.BF16, DType.F16, DType.F32
LAYER = random_layer(
    1, hidden_size=512, intermediate_size=320, num_experts=16, top_k=8, weight_dtype=BF16
)
#: Of the demo's model.
NUMBER = 3
#: Kernels are compiled when a worker starts.
START_S = 300.0
PATIENCE_NS = 60 * 10**9

#: Has memory of a GPU until its input ends.
_NEIGHBOUR = """
import sys
import cupy

with cupy.cuda.Device(int(sys.argv[1])):
    kept = cupy.ones(1 << 20)
    cupy.cuda.Device().synchronize()
    print("there", flush=True)
    sys.stdin.read()
"""


# --- a worker that has one --------------------------------------------------------------------


@pytest.fixture
def free_gpu() -> int:
    """One that this process does not use, so that it is the worker's alone."""
    driver = ctypes.CDLL("libcuda.so.1")
    n_gpus, flags, is_active = ctypes.c_int(), ctypes.c_uint(), ctypes.c_int()
    assert driver.cuInit(0) == 0
    assert driver.cuDeviceGetCount(ctypes.byref(n_gpus)) == 0
    for number in reversed(range(n_gpus.value)):
        arguments = number, ctypes.byref(flags), ctypes.byref(is_active)
        assert driver.cuDevicePrimaryCtxGetState(*arguments) == 0
        if not is_active.value:
            return number
    pytest.skip("this process uses every GPU by now; run tests/gpu/test_resident.py by itself")


@contextlib.contextmanager
def worker(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[processes.Process, str]]:
    """A process with a kernel that stays, and its address."""
    monkeypatch.setattr(processes, "PATIENCE_S", START_S)
    address = f"unix:{folder / 'w.sock'}"
    arguments = ["-m", "moeshm", "worker", "--model", str(tiny_moe_path()), "--listen", address]
    arguments += ["--device", f"cuda:{number}", "--layers", str(NUMBER), "--resident"]
    with processes.running(arguments) as process:
        process.log.read_until("listening at")
        yield process, address


def draw_of_model(seed: int, n_tokens: int) -> Inputs:
    """A call of the model's layer."""
    return draw_call(seed, load(tiny_moe_path(), layers=[NUMBER]).layers[NUMBER], n_tokens, 4)


def assert_right(client: moeshm.ExpertClient, seed: int) -> None:
    """Calls of few tokens and of many."""
    layer = load(tiny_moe_path(), layers=[NUMBER]).layers[NUMBER]
    for n_tokens in (1, 1, 4, 300, 1):
        inputs = draw_of_model(seed, n_tokens)
        found = client.compute(NUMBER, *inputs)
        assert_close(found, reference_ffn(layer, *inputs), TOLERANCE[BF16])


def test_a_worker(free_gpu: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From arrays of the host's memory; and from those of another GPU, if there is one."""
    with worker(free_gpu, tmp_path, monkeypatch) as (process, address):
        with moeshm.connect(address) as client:
            assert_right(client, 1)
        for transport in ("shared", "device") if free_gpu > 0 else ():
            assert_right_from_gpu(address, transport)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "steps aside" not in process.log.read_rest()


def assert_right_from_gpu(address: str, transport: str) -> None:
    """Many calls on their way at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cupy
    layer = load(tiny_moe_path(), layers=[NUMBER]).layers[NUMBER]
    with moeshm.connect(address, transport=transport, engine_device="cuda:0") as client:
        stream = cupy.cuda.Stream(non_blocking=True)
        calls = []
        for seed in range(50):
            inputs = draw_of_model(seed, (1, 2, 16, 200)[seed % 4])
            with stream:
                given = [cupy.asarray(each) for each in inputs]
            calls.append((inputs, client.submit(NUMBER, *given, stream=stream)))
        for inputs, future in calls:
            found = cupy.asnumpy(future.wait(60))
            assert_close(found, reference_ffn(layer, *inputs), TOLERANCE[BF16])


def test_a_worker_steps_aside_for_another_process(
    free_gpu: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is back when that one is gone and a session begins."""
    with worker(free_gpu, tmp_path, monkeypatch) as (process, address):
        with moeshm.connect(address) as client:
            assert_right(client, 1)
            with neighbour(free_gpu):
                with moeshm.connect(address) as second:
                    process.log.read_until("steps aside, calls are launched: 1 other processes")
                    assert_right(second, 2)
                assert_right(client, 3)
            assert_right(client, 4)
        with moeshm.connect(address) as client:
            process.log.read_until("takes calls again")
            assert_right(client, 5)


def test_a_gpu_that_another_process_uses_is_refused(free_gpu: int, tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'w.sock'}"
    arguments = ["-m", "moeshm", "worker", "--model", str(tiny_moe_path()), "--listen", address]
    arguments += ["--device", f"cuda:{free_gpu}", "--layers", str(NUMBER), "--resident"]
    with neighbour(free_gpu):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=processes.ROOT,
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
    assert done.returncode == 1
    assert f"1 other processes use cuda:{free_gpu}; use another GPU" in done.stderr


@contextlib.contextmanager
def neighbour(number: int) -> Iterator[None]:
    """Another process that uses the GPU."""
    with processes.running(["-c", _NEIGHBOUR, str(number)]) as process:
        process.output.read_until("there")
        yield


# --- in this process --------------------------------------------------------------------------


@pytest.fixture
def device() -> Iterator[Device]:
    """The first GPU."""
    with warnings.catch_warnings():
        # CuPy may warn of what is installed beside it.
        warnings.simplefilter("ignore")
        yield open_device("auto")


@pytest.fixture
def backend(device: Device) -> GpuBackend:
    """With LAYER, ready."""
    made = GpuBackend({0: LAYER}, device, is_resident=True)
    made.warm_up()
    return made


def counts(backend: GpuBackend) -> tuple[int, int]:
    """Of calls that it computed, and of its launches."""
    assert backend._resident is not None
    return backend._resident.n_calls, backend._resident.n_launched


def draw(seed: int, n_tokens: int, dtype: DType = BF16) -> Inputs:
    """A call of LAYER."""
    hidden, ids, weights = draw_call(seed, LAYER, n_tokens, 8)
    return narrow(hidden, dtype), ids, weights


@pytest.mark.parametrize(
    ("weight_dtype", "dtype"), [(BF16, BF16), (BF16, F32), (BF16, F16), (F16, F16)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_results(device: Device, weight_dtype: DType, dtype: DType, has_bias: bool) -> None:
    """Each time the same bits."""
    layer = random_layer(
        1, hidden_size=520, intermediate_size=320, weight_dtype=weight_dtype, has_bias=has_bias
    )
    backend = GpuBackend({0: layer}, device, is_resident=True)
    n_calls = 0
    for n_tokens in (1, 4, 16):
        hidden, ids, weights = draw_call(n_tokens, layer, n_tokens, 4)
        hidden = narrow(hidden, dtype)
        first = compute(backend, hidden, ids, weights, dtype)
        expected = reference_ffn(layer, hidden, ids, weights)
        assert_close(first, expected, TOLERANCE[weight_dtype])
        for _ in range(20):
            np.testing.assert_array_equal(compute(backend, hidden, ids, weights, dtype), first)
        n_calls += 21
        assert counts(backend)[0] == n_calls


def test_arrays_on_the_gpu(device: Device, backend: GpuBackend) -> None:
    """They are launched: whoever made them finds no room there while the kernel stays."""
    import cupy

    inputs = draw(0, 4)
    out: Any = cupy.empty(inputs[0].shape, inputs[0].dtype)
    given: list[Any] = [*(cupy.asarray(each) for each in inputs), out]
    before = counts(backend)[0]
    for seed in range(20):
        inputs = draw(seed, 4)
        for array, values in zip(given, inputs, strict=False):
            array.set(values)
        backend.ffn(0, *given)
        assert_close(cupy.asnumpy(out), reference_ffn(LAYER, *inputs), TOLERANCE[BF16])
    assert counts(backend)[0] == before
    device.wait()


def test_calls_after_pauses(backend: GpuBackend) -> None:
    """So that it has ended before some of them, and is about to before others."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    drawn = random.Random(seed)
    calls = [draw(n, 1 + n % 4) for n in range(8)]
    expected = [compute(backend, *each, BF16) for each in calls]
    for each, found in zip(calls, expected, strict=True):
        assert_close(found, reference_ffn(LAYER, *each), TOLERANCE[BF16])
    before = counts(backend)
    for _ in range(2000):
        time.sleep(drawn.choices((0, 0.001, 0.03), (0.8, 0.15, 0.05))[0])
        index = drawn.randrange(len(calls))
        np.testing.assert_array_equal(compute(backend, *calls[index], BF16), expected[index])
    n_calls, n_launched = counts(backend)
    assert n_calls == before[0] + 2000
    assert before[1] < n_launched <= before[1] + 2000


def test_calls_that_come_when_it_is_about_to_end(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is lost, whichever of the two is first."""
    idle_ns = 100_000
    monkeypatch.setattr(resident, "IDLE_NS", idle_ns)
    backend = GpuBackend({0: LAYER}, device, is_resident=True)
    inputs = draw(1, 1)
    expected = compute(backend, *inputs, BF16)
    drawn = random.Random(1)
    for _ in range(20_000):
        end = time.monotonic_ns() + idle_ns + drawn.randrange(-50_000, 20_000)
        while time.monotonic_ns() < end:
            pass
        np.testing.assert_array_equal(compute(backend, *inputs, BF16), expected)
    assert counts(backend)[0] == 20_001


def test_threads_with_calls_of_few_and_of_many_tokens(backend: GpuBackend) -> None:
    few = [draw(n, n) for n in (1, 2, 5, 16)]
    many = [draw(n, n) for n in (40, 200, 900)]
    expected = {len(each[0]): compute(backend, *each, BF16) for each in (*few, *many)}
    before = counts(backend)

    def serve(calls: list[Inputs], n_rounds: int) -> None:
        for _ in range(n_rounds):
            for each in calls:
                found = compute(backend, *each, BF16)
                np.testing.assert_array_equal(found, expected[len(each[0])])

    with meanwhile(lambda: serve(few, 200), lambda: serve(many, 60)):
        pass
    n_calls, n_launched = counts(backend)
    assert n_calls == before[0] + 800
    assert n_launched > before[1]


def test_experts_come_and_go(backend: GpuBackend) -> None:
    """While a thread calls."""
    inputs = draw(1, 2)
    expected = compute(backend, *inputs, BF16)

    def come_and_go() -> None:
        for _ in range(20):
            backend.remove(0, backend.add(0, LAYER))

    with meanwhile(come_and_go):
        for _ in range(500):
            np.testing.assert_array_equal(compute(backend, *inputs, BF16), expected)


def test_calls_from_a_slab(backend: GpuBackend) -> None:
    """A pinned one: many on their way, and one with an id that is wrong."""
    with engine(backend, "pinned") as slab:
        before = counts(backend)[0]
        for turn in range(40):
            calls = []
            for seed in range(24):
                inputs = draw(turn * 24 + seed, 1 + seed % 3)
                calls.append((inputs, slab.begin(*inputs, n_ids=16)))
            for inputs, claim in calls:
                flag = claim.flag(DONE)
                memory = slab.segment.memory
                assert wait_for_word(memory, flag, claim.sequence, PATIENCE_NS, 0)
                found = slab.take(claim, inputs[0])
                assert_close(found, reference_ffn(LAYER, *inputs), TOLERANCE[BF16])
        assert counts(backend)[0] == before + 40 * 24
        hidden, ids, weights = draw(1, 2)
        ids[1, 3] = 16
        claim = slab.begin(hidden, ids, weights, n_ids=16)
        assert wait_for_word(memory, claim.flag(DONE), claim.sequence, PATIENCE_NS, 0)
        assert slab.flag(claim, REFUSED) == 1 + 8 + 3
        ids[1, 3] = -1
        found = slab.take(claim, hidden)
        assert np.isfinite(widen(found)).all()
        assert_close(found, reference_ffn(LAYER, hidden, ids, weights), TOLERANCE[BF16])
