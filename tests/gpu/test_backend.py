"""The backend on a GPU: what no made-up device can show, and the conformance suite does not."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeshm
from moeshm import checkpoint
from moeshm.backends import Backend, Ids, Weights
from moeshm.backends.cpu import CpuBackend
from moeshm.backends.gpu import backend, job
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.cupy_device import open_device
from moeshm.backends.gpu.device import Device
from moeshm.backends.gpu.registered import MemoryStats
from moeshm.backends.reference import reference_ffn
from moeshm.demo import tiny_moe_path
from moeshm.demo.decoder import Decoder, ExpertsFn, generate
from moeshm.dtypes import DType, FloatArray, narrow
from tests.checkpoints import random_layer
from tests.conformance.test_backends import TOLERANCE, assert_close, compute, draw_call
from tests.unit.test_gpu_registered import RING_BYTES, rings, serve

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
PROMPT = b"import os\n\n\ndef find_files(folder, pattern):\n"

#: Reads where no memory is.
_ILLEGAL = """
import numpy as np
from moeshm.backends.gpu.abi import Call, Route
from moeshm.backends.gpu.choice import Shape
from moeshm.backends.gpu.cupy_device import open_device
from moeshm.dtypes import DType
from moeshm.errors import DeviceLost
from moeshm.layers import Activation

device = open_device("auto")
shape = Shape(64, 64, DType.F32, Activation.SWIGLU, False)
kernel = device.compile("convert.cu", shape.macros()).kernel("convert")
memory = device.allocate(1 << 20)
commands = device.command_list()
commands.launch(kernel, 1, 256, 0, Call(x=16, out=16, n_tokens=64), Route())
for _ in range(2):
    try:
        commands.enqueue()
        device.wait()
    except DeviceLost as error:
        print(error)
"""


@pytest.fixture
def device() -> Iterator[Device]:
    """The first GPU."""
    with warnings.catch_warnings():
        # CuPy may warn of what is installed beside it.
        warnings.simplefilter("ignore")
        yield open_device("auto")


@pytest.mark.parametrize("weight_dtype", DType)
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 16, 300])
def test_cupys_arrays_are_used_in_place(
    device: Device, weight_dtype: DType, dtype: DType, n_tokens: int
) -> None:
    import cupy

    layer = random_layer(1, hidden_size=256, intermediate_size=192, weight_dtype=weight_dtype)
    hidden, ids, weights = draw_call(2, layer, n_tokens, 2)
    hidden = narrow(hidden, dtype)
    out: Any = cupy.asarray(narrow(np.full(hidden.shape, np.nan, np.float32), dtype))
    given: list[Any] = [*(cupy.asarray(each) for each in (hidden, ids, weights)), out]
    GpuBackend({0: layer}, device).ffn(0, *given)
    tolerance = max(TOLERANCE[weight_dtype], TOLERANCE[dtype])
    assert_close(cupy.asnumpy(out), reference_ffn(layer, hidden, ids, weights), tolerance)


@pytest.mark.parametrize("in_place_bytes", [0, 1 << 20])
@pytest.mark.parametrize("n_tokens", [1, 16, 300])
def test_outputs_reach_the_host(
    device: Device, monkeypatch: pytest.MonkeyPatch, n_tokens: int, in_place_bytes: int
) -> None:
    """By a copy, or written there by the kernels."""
    monkeypatch.setattr(job, "IN_PLACE_BYTES", in_place_bytes)
    layer = random_layer(1, hidden_size=256, intermediate_size=192, weight_dtype=DType.BF16)
    hidden, ids, weights = draw_call(2, layer, n_tokens, 2)
    hidden = narrow(hidden, DType.BF16)
    found = compute(GpuBackend({0: layer}, device), hidden, ids, weights, DType.BF16)
    assert_close(found, reference_ffn(layer, hidden, ids, weights), TOLERANCE[DType.BF16])


@pytest.mark.parametrize("in_place_bytes", [0, 1 << 20])
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 16, 200])
def test_calls_between_registered_rings(
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    n_tokens: int,
    dtype: DType,
    in_place_bytes: int,
) -> None:
    """Several of a kind, also across the rings' ends, by copies and by kernels."""
    monkeypatch.setattr(job, "IN_PLACE_BYTES", in_place_bytes)
    monkeypatch.setattr(backend, "DIRECT_BYTES", 0)
    layer = random_layer(1, hidden_size=64, intermediate_size=192, weight_dtype=DType.BF16)
    served = GpuBackend({0: layer}, device)
    with rings(served) as ends:
        assert served.memory_stats == MemoryStats(2 * RING_BYTES, 0)
        for seed in range(5):
            hidden, ids, weights = draw_call(seed, layer, n_tokens, 2)
            hidden = narrow(hidden, dtype)
            found = serve(ends, layer, served, hidden, ids, weights)
            assert_close(found, reference_ffn(layer, hidden, ids, weights), TOLERANCE[DType.BF16])
    assert served.memory_stats == MemoryStats(0, 0)


def test_memory_stays_as_it_is(device: Device) -> None:
    """The device's own count, which includes what the driver takes for kernels."""
    layer = random_layer(3, hidden_size=256, intermediate_size=192, top_k=4, num_experts=16)
    backend = GpuBackend({0: layer}, device)
    backend.warm_up()
    hidden, ids, weights = draw_call(4, layer, 3000, 4)
    out = np.empty_like(hidden)

    def call(n_tokens: int) -> None:
        backend.ffn(0, hidden[:n_tokens], ids[:n_tokens], weights[:n_tokens], out[:n_tokens])

    for n_tokens in (1, 40, 3000):
        call(n_tokens)
    before = device.free_bytes()
    for n_tokens in np.random.default_rng(5).integers(1, 3001, 10_000).tolist():
        call(n_tokens)
    assert device.free_bytes() == before


@pytest.mark.parametrize("dtype", DType)
def test_every_run_gives_the_same_bits(device: Device, dtype: DType) -> None:
    layer = random_layer(6, hidden_size=512, intermediate_size=320, weight_dtype=dtype)
    for n_tokens in (1, 7, 32, 33, 500):
        hidden, ids, weights = draw_call(7, layer, n_tokens, 2)
        hidden = narrow(hidden, dtype)
        backend = GpuBackend({0: layer}, device)
        first = compute(backend, hidden, ids, weights, dtype)
        for _ in range(5):
            np.testing.assert_array_equal(compute(backend, hidden, ids, weights, dtype), first)


def test_an_illegal_address_loses_the_device() -> None:
    """In a process of its own, which cannot use the device afterwards."""
    done = subprocess.run(
        [sys.executable, "-c", _ILLEGAL], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "is lost" in first
    assert "start it anew" in second


def test_the_demos_text_is_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, in float32, and through a worker."""
    monkeypatch.setenv("MOESHM_KERNELS", "decode=fma,prefill=fma")
    layers = checkpoint.load(tiny_moe_path()).layers
    expected = text(in_process(CpuBackend(layers, 1)))
    with moeshm.spawn_worker(tiny_moe_path(), device="auto", timeout_s=600) as client:
        found = text(client.compute)
    assert found == expected


def in_process(backend: Backend) -> ExpertsFn:
    """The experts of a decoder."""

    def compute(layer: int, hidden_states: FloatArray, ids: Ids, weights: Weights) -> FloatArray:
        out = np.empty_like(hidden_states)
        backend.ffn(layer, hidden_states, ids, weights, out)
        return out

    return compute


def text(experts: ExpertsFn) -> bytes:
    """What the demo's model writes."""
    return bytes(token for token, _ in generate(Decoder(tiny_moe_path(), experts), PROMPT, 200))


@pytest.mark.parametrize("n_tokens", [33, 64, 115, 128])
def test_an_expert_that_several_blocks_visit(device: Device, n_tokens: int) -> None:
    """More of its tokens than one visit takes, and each time something else was left behind by
    another call; blocks list them in orders that only a card mixes."""
    layer = random_layer(1, hidden_size=128, intermediate_size=64, weight_dtype=DType.BF16)
    made = GpuBackend({0: layer}, device)
    hidden, ids, weights = draw_call(2, layer, n_tokens, 4)
    ids[:, 0] = 3
    expected = reference_ffn(layer, hidden, ids, weights)
    others = [draw_call(seed, layer, size, 4) for seed, size in enumerate((7, 40, 128, 300))]
    for turn in range(200):
        compute(made, *others[turn % len(others)])
        found = compute(made, hidden, ids, weights)
        assert_close(found, expected, TOLERANCE[DType.BF16])
