"""GPUs, and what their runtime supports of what transports between processes need."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import gpu_paths
from .finding import Finding, describe, read, size

#: A page of device memory: what is exported to other processes is a multiple of it.
_SLAB_BYTES = 2 << 20
_ON_CPU = "none needed: experts are computed on the CPU"
_THROUGH_HOST = "none needed: activations go through the host's memory"
#: What CuPy's HIP build only stubs out, whatever the card (GPU checks see the first two fail).
ROCM_LACKS = "IPC events, mallocAsync, cooperative launch, cuFuncSetAttribute, graph upload"


def check_gpus() -> list[Finding]:
    """A finding per GPU that CuPy sees, and per way between these and the host; without CuPy,
    whether there is a GPU at all."""
    try:
        from cupy.cuda import runtime
    except ImportError as error:
        return [_without_cupy(describe(error))]
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return [Finding("gpu", "missing", describe(error), _ON_CPU)]
    if count == 0:
        return [Finding("gpu", "missing", "CuPy sees none", _ON_CPU)]
    found = [check_gpu(runtime, index) for index in range(count)]
    return found + gpu_paths.check_paths(runtime, [gpu.name for gpu in found])


def check_gpu(runtime: Any, index: int) -> Finding:
    """One GPU, under the name that --device takes: architecture, memory, runtime, and what of it
    works when tried."""
    properties = runtime.getDeviceProperties(index)
    value = f"{_identity(runtime, properties)}, {_versions(runtime)}"
    name = f"{'hip' if runtime.is_hip else 'cuda'}:{index}"
    before = runtime.getDevice()
    runtime.setDevice(index)
    try:
        works, fails = [], []
        for what, attempt in _ATTEMPTS:
            problem = _problem(attempt, runtime)
            works.append(what) if problem is None else fails.append(f"{what} ({problem})")
    finally:
        runtime.setDevice(before)
    if works:
        value += f"; {', '.join(works)} work"
    if not fails:
        return Finding(name, "ok", value)
    value += f"; do not work: {', '.join(fails)}"
    if runtime.is_hip:
        value += f"; CuPy on ROCm lacks {ROCM_LACKS}"
    return Finding(name, "degraded", value, _THROUGH_HOST)


def _identity(runtime: Any, properties: dict[str, Any]) -> str:
    if runtime.is_hip:
        architecture = properties["gcnArchName"].decode().partition(":")[0]
    else:
        architecture = f"sm_{properties['major']}{properties['minor']}"
    name = properties["name"].decode()
    return f"{name}, {architecture}, {size(properties['totalGlobalMem'])}"


def _versions(runtime: Any) -> str:
    used, driver = runtime.runtimeGetVersion(), runtime.driverGetVersion()
    if runtime.is_hip:
        return f"HIP {used // 10_000_000}.{used // 100_000 % 100}"
    return f"CUDA {_cuda_version(used)} (the driver's: {_cuda_version(driver)})"


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


# --- what transports need, each tried and undone -------------------------------------------


def _problem(attempt: Callable[[Any], None], runtime: Any) -> str | None:
    try:
        attempt(runtime)
    except (RuntimeError, AttributeError, OSError) as error:  # CuPy's errors are RuntimeErrors
        return describe(error)
    return None


def _export_memory(runtime: Any) -> None:
    address = runtime.malloc(_SLAB_BYTES)
    try:
        runtime.ipcGetMemHandle(address)
    finally:
        runtime.free(address)


def _export_event(runtime: Any) -> None:
    event = runtime.eventCreateWithFlags(runtime.eventInterprocess | runtime.eventDisableTiming)
    try:
        runtime.ipcGetEventHandle(event)
    finally:
        runtime.eventDestroy(event)


def _register_read_ring(_runtime: Any) -> None:
    from .._ring import RingConsumer

    with RingConsumer.create(None, _SLAB_BYTES) as ring:
        _register(ring.memory())


def _register_written_ring(_runtime: Any) -> None:
    from .._ring import RingProducer

    with RingProducer.create(None, _SLAB_BYTES) as ring:
        _register(ring.memory())


def _register(memory: memoryview) -> None:
    """As a worker registers a session's: whole, or each half of what is mapped twice."""
    from ..backends.gpu._launch import address_of
    from ..backends.gpu.driver import Driver

    driver, address = Driver(), address_of(memory)
    half = memory.nbytes // 2
    try:
        driver.register(address, 2 * half, read_only=memory.readonly)
    except RuntimeError:
        with contextlib.ExitStack() as stack:
            for start in (address, address + half):
                driver.register(start, half, read_only=memory.readonly)
                stack.callback(driver.unregister, start)
    else:
        driver.unregister(address)


_ATTEMPTS: tuple[tuple[str, Callable[[Any], None]], ...] = (
    ("IPC memory", _export_memory),
    ("IPC events", _export_event),
    ("rings it reads", _register_read_ring),
    ("rings it writes", _register_written_ring),
)


# --- without CuPy -------------------------------------------------------------------------


def _without_cupy(reason: str) -> Finding:
    found, extra = _find_hardware()
    if not found:
        return Finding("gpu", "missing", "none found", _ON_CPU)
    return Finding(
        "gpu",
        "degraded",
        f"{found} is here but CuPy is not ({reason})",
        f"pip install {extra}, or let the CPU compute experts",
    )


def _find_hardware() -> tuple[str, str]:
    """What the kernel's drivers and PATH say, and the extra that brings CuPy for it."""
    for information in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", read(str(information)) or "", re.MULTILINE)
        return (model[1] if model else "an NVIDIA GPU"), _CUDA_EXTRA
    if shutil.which("nvidia-smi"):
        return "nvidia-smi", _CUDA_EXTRA
    if Path("/dev/kfd").exists():
        return "an AMD GPU (/dev/kfd)", "'moeshm[rocm]'"
    return "", ""


_CUDA_EXTRA = "'moeshm[cuda13]' ('moeshm[cuda12]' for drivers before 580, cards before sm_75)"
