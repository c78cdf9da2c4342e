"""The GPU backend without a GPU: its memory, what calls need, and its errors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from moeshm.backends import Backend, Ids, Weights
from moeshm.backends.cpu import CpuBackend
from moeshm.backends.gpu import job, workspace
from moeshm.backends.gpu.abi import Call
from moeshm.backends.gpu.backend import _MAX_JOBS, GpuBackend
from moeshm.backends.gpu.device import Macros, Module
from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import ExpertLayer, load
from moeshm.demo import tiny_moe_path
from moeshm.demo.decoder import Decoder, ExpertsFn, generate
from moeshm.dtypes import Array, DType, FloatArray, narrow, widen
from moeshm.errors import DeviceLost, OutOfDeviceMemory, SettingError
from tests.checkpoints import random_layer
from tests.conformance.test_backends import TOLERANCE, assert_close, compute, draw_call
from tests.simt.device import FEATURES, IdleDevice, SimtDevice
from tests.steps import AlwaysDue, NeverDue
from tests.unit.test_gpu_experts import part
from tests.wire import meanwhile

LAYER = random_layer(1)
#: A wavefront of 64, and no matrix instructions.
WIDE = FEATURES._replace(arch="gfx90a", warp=64, has_mma=False)


class OnDevice:
    """An array that says it is in device memory; the shim's is the host's."""

    def __init__(self, array: Array, **interface: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "strides": None if array.flags.c_contiguous else array.strides,
            "version": 3,
            "stream": None,
            **interface,
        }


def aligned(array: Array, offset: int = 0) -> Array:
    """A copy that starts at a multiple of 16, or so many bytes after one."""
    memory = np.zeros(array.nbytes + 32, np.uint8)
    start = -memory.ctypes.data % 16 + offset
    result: Array = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


# --- memory ---------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_variety_of_calls() -> None:
    layer = random_layer(2, weight_dtype=DType.BF16, top_k=4)
    device = IdleDevice()
    backend = GpuBackend({0: layer}, device)
    backend.warm_up()
    before = (device.device_bytes, device.pinned_bytes, device.n_allocations, len(device.compiled))
    rng = np.random.default_rng(3)
    hidden, ids, weights = draw_call(4, layer, 5000, 4)
    rows = {dtype: narrow(hidden, dtype) for dtype in DType}
    out, formats = np.empty_like(hidden), list(DType)
    for n_tokens in rng.integers(1, 5001, 10_000).tolist():
        dtype, top_k = formats[rng.integers(3)], int(rng.integers(1, 5))
        call = (rows[dtype][:n_tokens], ids[:n_tokens, :top_k], weights[:n_tokens, :top_k])
        backend.ffn(0, *call, out[:n_tokens])
    found = (device.device_bytes, device.pinned_bytes, device.n_allocations, len(device.compiled))
    assert found == before
    assert len(backend._jobs) <= _MAX_JOBS


@pytest.mark.parametrize("top_k", [1, 2, 7])
@pytest.mark.parametrize("dtype", DType)
def test_long_calls_are_cut_into_parts(
    monkeypatch: pytest.MonkeyPatch, top_k: int, dtype: DType
) -> None:
    monkeypatch.setattr(workspace, "MAX_TOKENS", 40)
    layer = random_layer(5, weight_dtype=dtype)
    call = draw_call(6, layer, 130, top_k)
    found = compute(GpuBackend({0: layer}, SimtDevice()), *call)
    assert_close(found, reference_ffn(layer, *call), TOLERANCE[dtype])


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are computed in parts of 40 tokens."""
    monkeypatch.setattr(workspace, "step_tokens", lambda *_: 40)


@pytest.mark.usefixtures("small_parts")
def test_others_compute_and_experts_come_between_parts() -> None:
    """Of the same bits; the layer that comes needs a larger workspace."""
    backend = GpuBackend({0: LAYER}, SimtDevice())
    long, short = draw_call(6, LAYER, 130, 2), draw_call(7, LAYER, 50, 2)
    expected, expected_short = compute(backend, *long), compute(backend, *short)
    assert_close(expected, reference_ffn(LAYER, *long), TOLERANCE[DType.F32])
    wide = random_layer(7, hidden_size=200, intermediate_size=136, top_k=6)
    call = draw_call(9, wide, 50, 6)
    before = backend._workspace.device_bytes

    def others() -> None:
        np.testing.assert_array_equal(compute(backend, *short), expected_short)
        if due.n == 2:
            backend.add(1, wide)
            assert backend._workspace.device_bytes > before
        if due.n > 1:
            out = np.full_like(call[0], np.nan)
            backend.ffn(1, *call, out)
            assert_close(out, reference_ffn(wide, *call), TOLERANCE[DType.F32])

    due = AlwaysDue(others)
    out = np.full_like(long[0], np.nan)
    backend.ffn_in_steps(0, *long, out, due)
    assert due.n == 3
    np.testing.assert_array_equal(out, expected)
    backend.ffn_in_steps(0, *long, out, NeverDue())
    np.testing.assert_array_equal(out, expected)


@pytest.mark.usefixtures("small_parts")
def test_a_pause_that_raises_ends_the_call_and_leaves_the_turn() -> None:
    backend = GpuBackend({0: LAYER}, SimtDevice())
    call = draw_call(6, LAYER, 130, 2)
    expected = compute(backend, *call)

    def stop() -> None:
        assert not backend._turn.kept.locked()
        if due.n == 2:
            raise TimeoutError("enough")

    due = AlwaysDue(stop)
    with pytest.raises(TimeoutError, match="enough"):
        backend.ffn_in_steps(0, *call, np.empty_like(call[0]), due)
    assert not backend._turn.kept.locked()
    np.testing.assert_array_equal(compute(backend, *call), expected)


@pytest.mark.parametrize(
    ("weight_dtype", "dtype"),
    [(DType.F16, DType.F16), (DType.BF16, DType.BF16), (DType.BF16, DType.F16)],
)
def test_calls_are_launched_as_the_kernels_of_sm_90a_take_them(
    weight_dtype: DType, dtype: DType
) -> None:
    """Their blocks and shared memory are choice.py's."""
    layer = random_layer(8, weight_dtype=weight_dtype)
    hidden, ids, weights = draw_call(9, layer, 200, 2)
    call = (narrow(hidden, dtype), ids, weights)
    device = SimtDevice(FEATURES._replace(has_wgmma=True))
    found = compute(GpuBackend({0: layer}, device), *call, dtype)
    tolerance = max(TOLERANCE[weight_dtype], TOLERANCE[dtype])
    assert_close(found, reference_ffn(layer, *call), tolerance)
    assert "prefill_wgmma.cu" in device.compiled


@pytest.mark.parametrize(("hidden_size", "on_device"), [(24, False), (24, True), (33, False)])
@pytest.mark.parametrize("n_tokens", [1, 140])
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16])
def test_activations_are_rounded_to_weights_in_bfloat16(
    dtype: DType, n_tokens: int, hidden_size: int, on_device: bool
) -> None:
    """The bits of a call that comes in bfloat16, up to the largest float16."""
    layer = random_layer(8, hidden_size=hidden_size, weight_dtype=DType.BF16)
    hidden, ids, weights = draw_call(9, layer, n_tokens, 2)
    hidden[0, :3] = 65504, -65504, 2**-24
    hidden = narrow(hidden, dtype)
    backend = GpuBackend({0: layer}, SimtDevice())
    expected = compute(backend, narrow(widen(hidden), DType.BF16), ids, weights)
    rows: Any = OnDevice(aligned(hidden)) if on_device else hidden
    found = np.full(hidden.shape, np.nan, np.float32)
    backend.ffn(0, rows, ids, weights, found)
    np.testing.assert_array_equal(found, expected)
    assert_close(found, reference_ffn(layer, hidden, ids, weights), TOLERANCE[DType.BF16])


def test_memory_is_freed_with_the_backend() -> None:
    device = IdleDevice()
    backend = GpuBackend({0: LAYER}, device)
    compute(backend, *draw_call(7, LAYER, 1, 2))
    assert device.device_bytes
    del backend
    assert (device.device_bytes, device.pinned_bytes) == (0, 0)


def test_a_small_device_gets_a_small_workspace() -> None:
    layer = random_layer(2, hidden_size=64, intermediate_size=64, top_k=6)
    small = IdleDevice(FEATURES._replace(total_bytes=160 << 20))
    large = IdleDevice()
    backends = [GpuBackend({0: layer}, device) for device in (small, large)]
    assert small.device_bytes < 12 << 20 < large.device_bytes
    call = draw_call(7, layer, 4096, 6)
    for backend in backends:
        compute(backend, *call)


def test_a_layer_with_larger_calls_comes_later() -> None:
    device = SimtDevice()
    backend = GpuBackend({0: LAYER}, device)
    call = draw_call(8, LAYER, 5, 2)
    before = compute(backend, *call)
    wide = random_layer(7, hidden_size=200, intermediate_size=136, top_k=6)
    assert backend.add(1, wide) == [0, 1, 2, 3, 4, 5]
    hidden, ids, weights = draw_call(9, wide, 50, 6)
    out = np.full_like(hidden, np.nan)
    backend.ffn(1, hidden, ids, weights, out)
    assert_close(out, reference_ffn(wide, hidden, ids, weights), 1e-5)
    np.testing.assert_array_equal(compute(backend, *call), before)
    assert list(backend.layers) == [0]


def test_what_does_not_fit_is_refused_before_anything_is_allocated() -> None:
    device = SimtDevice(FEATURES._replace(total_bytes=100 << 20))
    with pytest.raises(OutOfDeviceMemory, match=r"6 experts need .* hold fewer experts there"):
        GpuBackend({0: LAYER}, device)
    assert device.device_bytes == 0


def test_experts_that_do_not_fit_later() -> None:
    device = SimtDevice()
    backend = GpuBackend({0: part(LAYER, [0])}, device)
    before = device.device_bytes
    device.features = FEATURES._replace(total_bytes=before + (129 << 20))
    with pytest.raises(MemoryError, match="5 experts need"):
        backend.add(0, part(LAYER, [1, 2, 3, 4, 5]))
    assert device.device_bytes == before
    device.features = FEATURES._replace(total_bytes=before + (131 << 20))
    assert backend.add(0, part(LAYER, [1, 2, 3, 4, 5])) == [1, 2, 3, 4, 5]


# --- what calls need ------------------------------------------------------------------------


@pytest.mark.parametrize("weight_dtype", DType)
def test_after_warm_up_nothing_is_compiled(weight_dtype: DType) -> None:
    layer = random_layer(2, weight_dtype=weight_dtype, num_experts=20, top_k=8)
    device = IdleDevice()
    # Other experts may come later.
    backend = GpuBackend({0: part(layer, [3]), 1: part(layer, [])}, device)
    assert device.compiled == []
    backend.warm_up()
    compiled, loaded = list(device.compiled), list(device.loaded)
    assert {"convert.cu", "route.cu", "combine.cu"} <= set(compiled)
    for kind in ("decode", "prefill"):
        assert (f"{kind}_mma.cu" in compiled) == (weight_dtype is not DType.F32)
        # Activations of any format can be rounded to bfloat16.
        assert (f"{kind}_fma.cu" in compiled) == (weight_dtype is not DType.BF16)
    for expert in range(20):
        backend.add(1, part(layer, [expert]))
        for n_tokens in (*range(1, 40, 1 + expert), 64, 100, 300, 700, 4000, 9000):
            for top_k in (1, 2, 3, 5, 8):
                for dtype in DType:
                    hidden = np.zeros((n_tokens, layer.info.hidden_size), dtype.numpy)
                    ids = np.zeros((n_tokens, top_k), np.int32)
                    backend.ffn(1, hidden, ids, np.ones(ids.shape, np.float32), hidden.copy())
    hidden, ids, weights = draw_call(4, layer, 40, 8)
    for n_tokens in (1, 40):
        for dtype in DType:
            rows: Any = OnDevice(aligned(narrow(hidden[:n_tokens], dtype)))
            backend.ffn(1, rows, ids[:n_tokens], weights[:n_tokens], rows)
    assert (device.compiled, device.loaded) == (compiled, loaded)


def test_calls_go_on_while_a_new_layers_kernels_are_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is there when they are, and its first calls compile nothing."""
    device = IdleDevice()
    backend = GpuBackend({0: LAYER}, device)
    call = draw_call(8, LAYER, 5, 2)
    compute(backend, *call)
    wide = random_layer(7, hidden_size=200, intermediate_size=136, top_k=6)
    is_compiling, may_go_on = threading.Event(), threading.Event()
    compile_now = device.compile

    def compile(file: str, macros: Macros) -> Module:
        is_compiling.set()
        assert may_go_on.wait(20)
        return compile_now(file, macros)

    monkeypatch.setattr(device, "compile", compile)
    with meanwhile(lambda: backend.add(1, wide)):
        assert is_compiling.wait(20)
        compute(backend, *call)
        assert list(backend._experts.layers) == [0]
        may_go_on.set()
    loaded = list(device.loaded)
    for n_tokens in (1, 33, 500):
        hidden, ids, weights = draw_call(9, wide, n_tokens, 6)
        backend.ffn(1, hidden, ids, weights, np.empty_like(hidden))
    assert device.loaded == loaded


def test_experts_of_a_layer_that_is_here_compile_nothing() -> None:
    device = IdleDevice()
    backend = GpuBackend({0: part(LAYER, [0])}, device)
    backend.add(0, part(LAYER, [1]))
    assert device.compiled == []


@pytest.mark.parametrize("kernels", [{}, {"decode": "fma"}, {"prefill": "fma"}])
def test_kernels_that_are_asked_for(kernels: dict[str, str]) -> None:
    layer = random_layer(2, weight_dtype=DType.BF16)
    device = SimtDevice()
    backend = GpuBackend({0: layer}, device, kernels)
    for n_tokens in (2, 130):
        call = draw_call(3, layer, n_tokens, 2)
        assert_close(compute(backend, *call), reference_ffn(layer, *call), TOLERANCE[DType.BF16])
    for kind in ("decode", "prefill"):
        assert f"{kind}_{kernels.get(kind, 'mma')}.cu" in device.compiled


def test_kernels_that_the_device_has_not() -> None:
    with pytest.raises(SettingError, match=r"prefill=wgmma, which SIMT shim \(simt\) cannot run"):
        GpuBackend({0: LAYER}, SimtDevice(), {"prefill": "wgmma"})


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 5, 40])
def test_wavefronts_of_64(dtype: DType, n_tokens: int) -> None:
    layer = random_layer(9, weight_dtype=dtype, hidden_size=72, intermediate_size=136)
    call = draw_call(10, layer, n_tokens, 3)
    device = SimtDevice(WIDE)
    assert_close(compute(GpuBackend({0: layer}, device), *call), reference_ffn(layer, *call), 1e-5)
    assert not [file for file in device.compiled if "mma" in file and "fma" not in file]


def test_the_demos_text_is_the_cpus() -> None:
    """Greedy, with float32 all the way: every decode kernel, and a prefill first."""
    layers = load(tiny_moe_path()).layers
    wanted = {"decode": "fma", "prefill": "fma"}
    found, expected = (
        [
            token
            for token, _ in generate(Decoder(tiny_moe_path(), through(backend)), b"import " * 6, 40)
        ]
        for backend in (GpuBackend(layers, SimtDevice(), wanted), CpuBackend(layers, 1))
    )
    assert found == expected


def through(backend: Backend) -> ExpertsFn:
    """The experts of a decoder."""

    def compute_rows(layer: int, rows: FloatArray, ids: Ids, weights: Weights) -> FloatArray:
        out = np.full_like(rows, np.nan)
        backend.ffn(layer, rows, ids, weights, out)
        return out

    return compute_rows


@pytest.mark.parametrize(
    ("on_device", "in_place_bytes", "expected"),
    [
        ("", 0, ["in", "decode_gate_up", "decode_down", "out"]),
        ("", 1 << 20, ["in", "decode_gate_up", "decode_down"]),
        ("out", 0, ["in", "decode_gate_up", "decode_down"]),
        ("x ids weights", 0, ["decode_gate_up", "decode_down", "out"]),
        ("x ids weights out", 1 << 20, ["decode_gate_up", "decode_down"]),
    ],
)
def test_a_call_takes_no_more_than_one_copy_each_way(
    monkeypatch: pytest.MonkeyPatch, on_device: str, in_place_bytes: int, expected: list[str]
) -> None:
    monkeypatch.setattr(job, "IN_PLACE_BYTES", in_place_bytes)
    device, enqueued = IdleDevice(), list[str]()
    backend = GpuBackend({0: LAYER}, device)
    hidden, ids, weights = draw_call(12, LAYER, 3, 2)
    arrays = {"x": aligned(hidden), "ids": ids, "weights": weights, "out": aligned(hidden)}
    given: list[Any] = [
        OnDevice(array) if name in on_device.split() else array for name, array in arrays.items()
    ]
    device.on_launch = lambda kernel, _call: enqueued.append(kernel)
    monkeypatch.setattr(device, "copy_in", lambda *_: enqueued.append("in"))
    monkeypatch.setattr(device, "copy_out", lambda *_: enqueued.append("out"))
    backend.ffn(0, *given)
    assert enqueued == expected


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 40])
def test_kernels_write_outputs_into_pinned_memory(
    monkeypatch: pytest.MonkeyPatch, dtype: DType, n_tokens: int
) -> None:
    layer = random_layer(9, weight_dtype=dtype)
    hidden, ids, weights = draw_call(10, layer, n_tokens, 2)
    hidden = narrow(hidden, dtype)
    found = []
    for in_place_bytes in (0, 1 << 20):
        monkeypatch.setattr(job, "IN_PLACE_BYTES", in_place_bytes)
        backend = GpuBackend({0: layer}, SimtDevice())
        found.append(compute(backend, hidden, ids, weights, dtype))
    np.testing.assert_array_equal(found[0], found[1])
    assert_close(found[1], reference_ffn(layer, hidden, ids, weights), TOLERANCE[dtype])


# --- errors ---------------------------------------------------------------------------------


def test_an_error_is_that_calls_own() -> None:
    device = IdleDevice()
    backend = GpuBackend({0: LAYER}, device)
    hidden, ids, weights = draw_call(21, LAYER, 2, 2)
    out = np.empty_like(hidden)

    def fail(kernel: str, call: Call) -> None:
        raise DeviceLost(f"simt is lost in {kernel} with {call.n_tokens} tokens")

    device.on_launch = fail
    for _ in range(2):
        with pytest.raises(DeviceLost, match="simt is lost in decode_gate_up with 2 tokens"):
            backend.ffn(0, hidden, ids, weights, out)
    launched: list[str] = []
    device.on_launch = lambda kernel, _call: launched.append(kernel)
    backend.ffn(0, hidden, ids, weights, out)
    assert launched == ["decode_gate_up", "decode_down"]


def test_a_call_that_is_interrupted_leaves_nothing_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = IdleDevice()
    backend = GpuBackend({0: LAYER}, device)
    hidden, ids, weights = draw_call(23, LAYER, 2, 2)
    events: list[str] = []

    def interrupt(kernel: str, _call: Call) -> None:
        events.append(kernel)
        if kernel == "decode_down":
            raise KeyboardInterrupt

    device.on_launch = interrupt
    monkeypatch.setattr(device, "wait", lambda: events.append("wait"))
    with pytest.raises(KeyboardInterrupt):
        backend.ffn(0, hidden, ids, weights, np.empty_like(hidden))
    assert events == ["decode_gate_up", "decode_down", "wait"]


def test_progress_is_told_layer_by_layer() -> None:
    told: list[int] = []
    GpuBackend({5: LAYER, 2: LAYER}, SimtDevice(), on_layer=told.append)
    assert told == [5, 2]


def launches_of(layer: ExpertLayer, n_tokens: int, kernels: Sequence[str]) -> None:
    """What one call launches."""
    device, launched = IdleDevice(), list[str]()
    backend = GpuBackend({0: layer}, device)
    device.on_launch = lambda kernel, _call: launched.append(kernel)
    call = draw_call(22, layer, n_tokens, 2)
    compute(backend, *call)
    assert launched == list(kernels)


def test_few_launches() -> None:
    layer = random_layer(2, weight_dtype=DType.BF16)
    launches_of(layer, 1, ["decode_gate_up", "decode_down"])
    launches_of(layer, 130, ["route", "prefill_gate_up", "prefill_down", "combine"])


def test_values_of_a_layer_reach_the_kernels() -> None:
    device, seen = IdleDevice(), list[tuple[float, float]]()
    backend = GpuBackend({0: LAYER}, device)
    device.on_launch = lambda _kernel, call: seen.append((call.alpha, call.limit))
    compute(backend, *draw_call(23, LAYER, 1, 2))
    assert seen == [pytest.approx((1.702, 7.0))] * 2


def test_a_layer_that_comes_later_leaves_no_other_less_memory() -> None:
    """Of what a call's arrays take, one layer has more in pinned memory, another on the device."""
    shared = workspace.Workspace(IdleDevice())
    for wanted in ((1000, 50_000), (3000, 20_000), (2000, 60_000)):
        missing = shared.missing_bytes(*wanted)
        shared.resize(*wanted)
        assert missing == shared.device_bytes
    assert (len(shared.host.array), shared.device_bytes) == (3000, 60_000)
    assert shared.missing_bytes(3000, 60_000) == 0
