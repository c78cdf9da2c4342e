"""The real GPU's memory and streams against a CuPy that is made up."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from moeshm.errors import DeviceError, DeviceLost

from .fake_cupy import A100, MI250, REGISTERING, SHIFT, STREAM, VALUES, opened

ADDRESS = 0x7F00_0000_0000


def test_memory_is_freed_by_close_or_with_its_last_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cupy, device = opened(monkeypatch, A100)
    first, second, pinned = device.allocate(100), device.allocate(50), device.pin(8)
    assert (first.nbytes, len(pinned.array)) == (100, 8)
    first.close()
    first.close()
    assert cupy.called("free") == [(first.address,)]
    address = second.address
    del second
    gc.collect()
    assert cupy.called("free") == [(first.address,), (address,)]
    pinned.close()
    assert not cupy.memory
    assert device.free_bytes() == 5 << 30


@pytest.mark.parametrize(
    ("properties", "names"),
    [
        (A100, ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2")),
        (MI250, ("hipMemcpyHtoDAsync", "hipMemcpyDtoHAsync")),
    ],
)
def test_copies_go_over_the_stream(
    monkeypatch: pytest.MonkeyPatch, properties: dict[str, Any], names: tuple[str, str]
) -> None:
    cupy, device = opened(monkeypatch, properties)
    memory, pinned = device.allocate(16), device.pin(16)
    commands = device.command_list()
    commands.copy_in(memory.address + 4, pinned.address + 4, 8)
    commands.copy_out(pinned.address, memory.address + 4, 8)
    pinned.array[:] = np.arange(16)
    commands.enqueue()
    device.wait()
    np.testing.assert_array_equal(pinned.array[:8], np.arange(4, 12))
    for name in names:
        assert cupy.called(name) == [(8, STREAM)]
    with pytest.raises(IndexError, match="command 2 of 2 is no copy"):
        commands.set_host_address(2, pinned.address)
    assert cupy.called("streamSynchronize") == [(STREAM,)]


@pytest.mark.parametrize(("properties", "kind"), [(A100, "cuda"), (MI250, "hip")])
@pytest.mark.parametrize(("read_only", "flags"), [(False, 2), (True, 10)])
def test_memory_is_registered_until_it_is_closed(
    monkeypatch: pytest.MonkeyPatch,
    properties: dict[str, Any],
    kind: str,
    read_only: bool,
    flags: int,
) -> None:
    """Mapped for kernels (2), and where the host may not write, read-only (8)."""
    cupy, device = opened(monkeypatch, properties)
    register, unregister, device_address = REGISTERING[kind]
    registration = device.register(ADDRESS, 8192, read_only=read_only)
    assert registration.device_address == ADDRESS + SHIFT
    assert cupy.called(register) == [(ADDRESS, 8192, flags)]
    assert cupy.called(device_address) == [(ADDRESS, 0)]
    assert cupy.called(unregister) == []
    registration.close()
    registration.close()
    assert cupy.called(unregister) == [(ADDRESS,)]


@pytest.mark.parametrize("read_only", [False, True])
def test_memory_that_is_refused(monkeypatch: pytest.MonkeyPatch, read_only: bool) -> None:
    cupy, device = opened(monkeypatch, A100)
    cupy.statuses["cuMemHostRegister_v2"] = 801
    how = "read-only " if read_only else ""
    message = f"^8192 bytes of {how}shared memory cannot .* for cuda:0: CUDA_ERROR_801$"
    with pytest.raises(DeviceError, match=message):
        device.register(ADDRESS, 8192, read_only=read_only)
    assert cupy.called("cuMemHostUnregister") == []


def test_memory_that_kernels_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, device = opened(monkeypatch, A100)
    cupy.statuses["cuMemHostGetDevicePointer_v2"] = 801
    with pytest.raises(DeviceError, match="CUDA_ERROR_801"):
        device.register(ADDRESS, 8192, read_only=False)
    assert cupy.called("cuMemHostUnregister") == [(ADDRESS,)]


def test_memory_that_cannot_be_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, device = opened(monkeypatch, A100)
    registration = device.register(ADDRESS, 8192, read_only=False)
    cupy.statuses["cuMemHostUnregister"] = 713
    with pytest.raises(DeviceError, match="CUDA_ERROR_713"):
        registration.close()


def test_a_lost_device_registers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, device = opened(monkeypatch, A100)
    cupy.statuses["cuMemHostRegister_v2"] = 700
    cupy.query_status = 700
    with pytest.raises(DeviceLost, match=r"cuda:0 \(A card\) is lost: CUDA_ERROR_700"):
        device.register(ADDRESS, 8192, read_only=False)


@pytest.mark.parametrize("properties", [A100, MI250])
def test_memory_goes_to_other_processes(
    monkeypatch: pytest.MonkeyPatch, properties: dict[str, Any]
) -> None:
    """What is opened is closed and not freed."""
    cupy, device = opened(monkeypatch, properties)
    memory = device.allocate(2 << 20)
    handle = device.export(memory)
    assert len(handle) == 64
    found = device.open_exported(handle)
    # CuPy's own default has the driver enable access to another GPU's memory.
    assert cupy.called("ipcOpenMemHandle") == [(handle,)]
    address = found.address
    assert address == memory.address + SHIFT
    found.close()
    found.close()
    assert cupy.called("ipcCloseMemHandle") == [(address,)]
    assert cupy.called("free") == []


@pytest.mark.parametrize("function", ["ipcGetMemHandle", "ipcOpenMemHandle"])
def test_memory_that_cannot_go_to_other_processes(
    monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    cupy, device = opened(monkeypatch, A100)
    cupy.raises[function] = "cudaErrorNotSupported"
    with pytest.raises(DeviceError, match=r"cuda:0 \(A card\): cudaErrorNotSupported"):
        device.open_exported(device.export(device.allocate(2 << 20)))


@pytest.mark.parametrize(("properties", "kind"), [(A100, "cuda"), (MI250, "hip")])
def test_values_are_written_and_waited_for(
    monkeypatch: pytest.MonkeyPatch, properties: dict[str, Any], kind: str
) -> None:
    cupy, device = opened(monkeypatch, properties)
    write, wait = VALUES[kind]
    commands = device.command_list()
    numbers = commands.wait_value(ADDRESS), commands.write_value(ADDRESS)
    commands.set_value(numbers[0], ADDRESS + 128, 7)
    commands.set_value(numbers[1], ADDRESS + 256, 8)
    for stream in (None, 0, 99):
        commands.enqueue(stream)
        where = STREAM if stream is None else stream
        mask = (0xFFFF_FFFF,) if kind == "hip" else ()
        assert cupy.called(wait)[-1] == (where, ADDRESS + 128, 7, 0, *mask)
        assert cupy.called(write)[-1] == (where, ADDRESS + 256, 8, 0)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("cuStreamWriteValue32_v2", "write of a value"),
        ("cuStreamWaitValue32_v2", "wait for a value"),
    ],
)
def test_values_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, function: str, named: str
) -> None:
    cupy, device = opened(monkeypatch, A100)
    commands = device.command_list()
    commands.write_value(ADDRESS)
    commands.wait_value(ADDRESS)
    cupy.statuses[function] = 801
    with pytest.raises(DeviceError, match=rf"cuda:0 \(A card\): {named}: CUDA_ERROR_801"):
        commands.enqueue()


@pytest.mark.parametrize(("properties", "legacy"), [(A100, 1), (MI250, 0)])
def test_other_streams(
    monkeypatch: pytest.MonkeyPatch, properties: dict[str, Any], legacy: int
) -> None:
    cupy, device = opened(monkeypatch, properties)
    for stream in (1, 2, 12345):
        device.wait_for_stream(stream)
    assert cupy.called("streamSynchronize") == [(legacy,), (2,), (12345,)]
