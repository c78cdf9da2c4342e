"""The real GPU's device against a CuPy that is made up: what it calls, and what errors become."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import pytest

from moeshm.backends.gpu.abi import Call, Route
from moeshm.backends.gpu.cupy_device import CupyDevice, open_device
from moeshm.backends.gpu.device import CommandList
from moeshm.errors import DeviceError, DeviceLost, OutOfDeviceMemory

from .fake_cupy import A100, H100, MI250, STREAM, FakeCupy, FakeModule, cuda_driver, opened


def listed(device: CupyDevice, kernel: str) -> CommandList:
    """A list with one launch."""
    commands = device.command_list()
    launched = device.compile("combine.cu", {}).kernel(kernel)
    commands.launch(launched, 5, 256, 1000, Call(n_tokens=7), Route(tiles=99))
    return commands


# --- opening --------------------------------------------------------------------------------


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(DeviceError, match=r"no CuPy for device cuda:0 .*'moeshm\[cuda12\]'"):
        open_device("cuda:0")


@pytest.mark.parametrize(
    ("properties", "name", "message"),
    [
        (A100, "cuda:2", "no GPU cuda:2; CuPy sees cuda:0, cuda:1"),
        (MI250, "hip:7", "no GPU hip:7; CuPy sees hip:0, hip:1"),
        (A100, "hip:0", r"the CuPy here is built for cuda; pip install .*moeshm\[rocm\]"),
        (MI250, "cuda:0", r"the CuPy here is built for hip; pip install .*moeshm\[cuda13\]"),
        (A100, "tpu", "device 'tpu'; choose cpu, auto, cuda:N or hip:N"),
    ],
)
def test_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, properties: dict[str, Any], name: str, message: str
) -> None:
    with pytest.raises(DeviceError, match=message):
        opened(monkeypatch, properties, name)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCupy(A100, n_devices=0).install(monkeypatch)
    with pytest.raises(DeviceError, match="no GPU cuda:0; CuPy sees none"):
        open_device("auto")
    cupy = FakeCupy(A100)
    cupy.raises["getDeviceCount"] = "cudaErrorNoDevice"
    cupy.install(monkeypatch)
    with pytest.raises(DeviceError, match="no GPU for device auto: cudaErrorNoDevice"):
        open_device("auto")


@pytest.mark.parametrize(
    ("properties", "name", "found"),
    [
        (A100, "auto", "cuda:0"),
        (A100, "cuda", "cuda:0"),
        (A100, "cuda:1", "cuda:1"),
        (MI250, "auto", "hip:0"),
        (MI250, "hip:1", "hip:1"),
    ],
)
def test_names(
    monkeypatch: pytest.MonkeyPatch, properties: dict[str, Any], name: str, found: str
) -> None:
    cupy, device = opened(monkeypatch, properties, name)
    assert device.name == found
    index = int(found[-1])
    assert cupy.called("setDevice") == [(index,)]
    device.use()
    assert cupy.called("setDevice") == [(index,)] * 2


@pytest.mark.parametrize(
    ("properties", "arch", "warp", "shared_kib", "has"),
    [
        ({**A100, "major": 6, "minor": 1, "sharedMemPerBlockOptin": 48 << 10}, "sm_61", 32, 48, ""),
        (A100, "sm_80", 32, 163, "mma"),
        (H100, "sm_90", 32, 227, "mma overlap wgmma"),
        ({**H100, "major": 12}, "sm_120", 32, 227, "mma overlap"),
        ({**MI250, "sharedMemPerBlock": 64 << 10}, "gfx90a", 64, 64, ""),
    ],
)
def test_features(
    monkeypatch: pytest.MonkeyPatch,
    properties: dict[str, Any],
    arch: str,
    warp: int,
    shared_kib: int,
    has: str,
) -> None:
    features = opened(monkeypatch, properties)[1].features
    assert features.name == "A card"
    assert (features.arch, features.warp, features.shared_bytes) == (arch, warp, shared_kib << 10)
    assert (features.multiprocessors, features.total_bytes) == (108, 80 << 30)
    names = [name for name in ("mma", "overlap", "wgmma") if getattr(features, f"has_{name}")]
    assert names == has.split()


@pytest.mark.parametrize(("told", "bus_id"), [("0000:1B:00.0", "0000:1b:00.0"), (None, "")])
def test_where_the_device_is(
    monkeypatch: pytest.MonkeyPatch, told: str | None, bus_id: str
) -> None:
    cupy = FakeCupy(H100)
    cupy.bus_id = told
    cupy.install(monkeypatch)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: cuda_driver(cupy))
    assert open_device("cuda:0").features.bus_id == bus_id


@pytest.mark.parametrize("is_set", [0, 1])
def test_a_driver_that_ends_long_kernels(monkeypatch: pytest.MonkeyPatch, is_set: int) -> None:
    features = opened(monkeypatch, {**H100, "kernelExecTimeoutEnabled": is_set})[1].features
    assert features.ends_long_kernels == bool(is_set)


def test_an_nvrtc_that_is_too_old_for_wgmma(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = FakeCupy(H100)
    cupy.nvrtc_version = (12, 6)
    cupy.install(monkeypatch)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: cuda_driver(cupy))
    assert not open_device("cuda:0").features.has_wgmma


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCupy(H100).install(monkeypatch)
    # One without any function of CUDA.
    library = ctypes.CDLL(None)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)
    with pytest.raises(DeviceError, match=r"cuda:0 lacks .*cuMemHostRegister_v2.* a newer one"):
        open_device("cuda:0")


# --- kernels --------------------------------------------------------------------------------


def test_options_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, device = opened(monkeypatch, MI250)
    device.compile("combine.cu", {"HIDDEN": 64, "WEIGHT": "bf16"})
    assert cupy.modules[0].options == ("-std=c++17", "-DWARP=64", "-DHIDDEN=64", "-DWEIGHT=bf16")
    assert "void __launch_bounds__(256) combine(Call call, Route)" in cupy.modules[0].code
    assert '#include "' not in cupy.modules[0].code
    cupy, device = opened(monkeypatch, H100)
    device.compile("prefill_wgmma.cu", {})
    assert cupy.modules[0].options[-1] == "--gpu-architecture=sm_90a"


def test_a_kernel_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, device = opened(monkeypatch, A100)
    cupy.raises["compile"] = "expected a ;"
    with pytest.raises(DeviceError, match=r"combine\.cu does not compile for cuda:0: expected a ;"):
        device.compile("combine.cu", {})


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    device = opened(monkeypatch, MI250)[1]

    def fail(_module: object) -> None:
        raise OSError("Failed to run `hipcc` command")

    monkeypatch.setattr(FakeModule, "compile", fail)
    with pytest.raises(DeviceError, match=r"combine\.cu does not compile for hip:0: Failed to run"):
        device.compile("combine.cu", {})


@pytest.mark.parametrize(
    ("properties", "function"),
    [
        (A100, "cuLaunchKernel"),
        (H100, "cuLaunchKernelEx"),
        (MI250, "hipModuleLaunchKernel"),
    ],
)
def test_launches(
    monkeypatch: pytest.MonkeyPatch, properties: dict[str, Any], function: str
) -> None:
    cupy, device = opened(monkeypatch, properties)
    commands = listed(device, "combine")
    assert not cupy.called(function)
    for _ in range(2):
        commands.enqueue()
    handle = len("combine")
    launched = (handle, [5, 1, 1, 256, 1, 1, 1000], STREAM, 7, 99, 0)
    assert cupy.called(function) == [launched] * 2


def test_a_launch_that_must_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, device = opened(monkeypatch, H100)
    commands = device.command_list()
    kernel = device.compile("combine.cu", {}).kernel("combine")
    commands.launch(kernel, 5, 256, 0, Call(n_tokens=7), Route(tiles=99), overlaps=False)
    commands.enqueue(4712)
    assert cupy.called("cuLaunchKernelEx") == []
    sizes = [5, 1, 1, 256, 1, 1, 0]
    assert cupy.called("cuLaunchKernel") == [(len("combine"), sizes, 4712, 7, 99, 0)]


def test_a_kernel_is_loaded_once_and_may_use_all_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that none of this is left for a call."""
    cupy, device = opened(monkeypatch, A100)
    commands = listed(device, "combine")
    assert cupy.called("get_function") == [("combine",)]
    # All but what it has of its own.
    assert cupy.limits == [("combine", (163 << 10) - 1000)]
    before = list(cupy.calls)
    commands.enqueue()
    assert [call[0] for call in cupy.calls[len(before) :]] == ["cuLaunchKernel"]
    cupy, device = opened(monkeypatch, MI250)
    listed(device, "combine")
    assert cupy.limits == []


# --- errors ---------------------------------------------------------------------------------


def test_an_error_that_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, device = opened(monkeypatch, A100)
    commands = listed(device, "combine")
    cupy.statuses["cuLaunchKernel"] = 1
    with pytest.raises(DeviceError, match=r"cuda:0 \(A card\): combine: CUDA_ERROR_1") as raised:
        commands.enqueue()
    assert type(raised.value) is DeviceError
    cupy.statuses.clear()
    commands.enqueue()
    device.wait()


@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("cuMemcpyHtoDAsync_v2", "copy to the device"),
        ("cuLaunchKernelEx", "combine"),
        ("cuMemcpyDtoHAsync_v2", "copy from the device"),
    ],
)
def test_what_is_refused_is_named_and_the_rest_is_not_enqueued(
    monkeypatch: pytest.MonkeyPatch, function: str, named: str
) -> None:
    cupy, device = opened(monkeypatch, H100)
    memory, pinned = device.allocate(16), device.pin(16)
    commands = device.command_list()
    commands.copy_in(memory.address, pinned.address, 8)
    kernel = device.compile("combine.cu", {}).kernel("combine")
    commands.launch(kernel, 1, 32, 0, Call(), Route())
    commands.copy_out(pinned.address, memory.address, 8)
    cupy.statuses[function] = 700
    cupy.query_status = 700
    with pytest.raises(DeviceLost, match=rf"is lost: {named}: CUDA_ERROR_700; this process"):
        commands.enqueue()
    enqueued = [call[0] for call in cupy.calls if call[0].startswith("cu")]
    assert enqueued[-1] == function


def test_a_kernel_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, device = opened(monkeypatch, A100)
    cupy.raises["get_function"] = "CUDA_ERROR_NOT_FOUND"
    with pytest.raises(DeviceError, match="CUDA_ERROR_NOT_FOUND"):
        device.compile("combine.cu", {}).kernel("nothing")


def test_errors_of_what_every_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, device = opened(monkeypatch, A100)
    for function, do in (("setDevice", device.use), ("streamSynchronize", device.wait)):
        cupy.raises[function] = "cudaErrorInvalidDevice"
        with pytest.raises(DeviceError, match=r"cuda:0 \(A card\): cudaErrorInvalidDevice"):
            do()


def test_an_error_that_sticks(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, device = opened(monkeypatch, A100)
    memory = device.allocate(10)
    said = "cudaErrorIllegalAddress: an illegal memory access was encountered"
    for name in ("streamSynchronize", "free"):
        cupy.raises[name] = said
    cupy.query_status = 700
    for _ in range(2):
        with pytest.raises(
            DeviceLost, match=rf"cuda:0 \(A card\) is lost: {said}; .* start it anew"
        ):
            device.wait()
    # It goes with the process.
    memory.close()


@pytest.mark.parametrize(
    ("properties", "said"),
    [
        (A100, "cudaErrorMemoryAllocation: out of memory"),
        (A100, "CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        (MI250, "hipErrorOutOfMemory: out of memory"),
    ],
)
def test_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, properties: dict[str, Any], said: str
) -> None:
    cupy, device = opened(monkeypatch, properties)
    cupy.raises["malloc"] = cupy.raises["hostAlloc"] = said
    with pytest.raises(OutOfDeviceMemory, match=f"{said}; hold fewer experts"):
        device.allocate(1 << 40)
    with pytest.raises(MemoryError, match=f"cannot be page-locked .*{said}; free some of it"):
        device.pin(1 << 40)
