"""Ways of calls' arrays between GPUs, and between a GPU and the host: each is tried and timed."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .finding import Finding, describe

if TYPE_CHECKING:
    from ..backends.gpu.device import CommandList, Device

#: Of the copies whose bandwidth is told, and of those whose duration is.
_LARGE_BYTES, _SMALL_BYTES = 64 << 20, 4 << 10
#: How many are made, of which the fastest counts.
_LARGE_COPIES, _SMALL_COPIES = 4, 20
#: Of the copies whose bytes are compared.
_CHECKED_BYTES = 1 << 20
#: Within the first, a stream that does not wait shows it; within the second, one that waits goes
#: on when it may.
_HELD_NS, _RELEASED_NS = 1_000_000, 1_000_000_000
_DEFAULT_STREAM = 0
_HOST_ARRAYS = "none needed: pass arrays in the host's memory, without engine_device"
_PINNED_SLABS = "none needed: transport auto takes pinned slabs"


def check_paths(runtime: Any, names: Sequence[str]) -> list[Finding]:
    """A finding for each GPU with the host's memory, for each with itself, and for each two.

    `runtime`: CuPy's. `names`: of all GPUs that it sees, in order, as --device takes them. The
    thread's current device stays what it was.
    """
    before = runtime.getDevice()
    try:
        found = [check_host_path(name) for name in names]
        for first, second in itertools.combinations_with_replacement(range(len(names)), 2):
            found.append(check_pair(runtime, names, first, second))
    finally:
        runtime.setDevice(before)
    return found


# --- a GPU and the host: pinned slabs, and flags ---------------------------------------------


class _Slab(NamedTuple):
    """A slab's segment, registered."""

    memory: memoryview
    #: Where the device finds its first byte.
    device_address: int


def check_host_path(name: str) -> Finding:
    """What slabs need of one GPU and the host's memory; the finding is named "cuda:0-host"."""
    works, fails = [], []
    try:
        from ..backends.gpu.cupy_device import open_device

        device = open_device(name)
        with _registered_slab(device) as slab:
            for attempt, failed in (
                (_copy_pinned, "pinned slabs do not work"),
                (_wait_for_flag, "stream waits do not work"),
            ):
                try:
                    works.append(attempt(device, slab))
                except Exception as error:  # a broken driver may raise anything
                    fails.append(f"{failed} ({describe(error)})")
    except Exception as error:
        fails.append(f"no slabs ({describe(error)})")
    value = "; ".join([*works, *fails])
    if fails:
        return Finding(f"{name}-host", "degraded", value, _HOST_ARRAYS)
    return Finding(f"{name}-host", "ok", value)


@contextlib.contextmanager
def _registered_slab(device: Device) -> Iterator[_Slab]:
    from ..backends.gpu._launch import address_of
    from ..transport.slab import Segment

    segment, fd = Segment.create(_LARGE_BYTES)
    os.close(fd)
    memory = segment.memory
    registration = device.register(address_of(memory), memory.nbytes, read_only=False)
    with contextlib.closing(registration):
        yield _Slab(memory, registration.device_address)


def _copy_pinned(device: Device, slab: _Slab) -> str:
    """How fast the device copies from and to the slab's data; DeviceError: to no avail."""
    import numpy as np

    from ..backends.gpu._launch import address_of
    from ..transport.slab import FLAGS_BYTES

    host = address_of(slab.memory) + FLAGS_BYTES
    data = np.frombuffer(slab.memory, np.uint8, _CHECKED_BYTES, FLAGS_BYTES)
    with contextlib.closing(device.allocate(_LARGE_BYTES)) as memory:

        def prepare(direction: str, n_bytes: int) -> Callable[[], None]:
            commands = device.command_list()
            if direction == "in":
                commands.copy_in(memory.address, host, n_bytes)
            else:
                commands.copy_out(host, memory.address, n_bytes)

            def copy() -> None:
                commands.enqueue()
                device.wait()

            return copy

        sent = secrets.token_bytes(_CHECKED_BYTES)
        data[:] = np.frombuffer(sent, np.uint8)
        prepare("in", _CHECKED_BYTES)()
        data[:] = 0
        prepare("out", _CHECKED_BYTES)()
        _compare(data.tobytes(), sent)
        into, out = (_rate(prepare(direction, _LARGE_BYTES)) for direction in ("in", "out"))
        small = _duration(prepare("in", _SMALL_BYTES))
    return f"pinned slabs: {into} in, {out} out, {small}"


def _wait_for_flag(device: Device, slab: _Slab) -> str:
    """Have a stream set a flag, and have it wait for one of the host's, as calls do; DeviceError:
    to no avail."""
    from .._words import load_word, store_word, wait_for_word
    from ..errors import DeviceError
    from ..transport.slab import DONE, GIVEN

    given, done = slab.device_address + GIVEN, slab.device_address + DONE
    # By itself: were it refused behind a wait, the stream would wait for ever.
    _value_list(device, write=(done, 1)).enqueue()
    device.wait()
    if load_word(slab.memory, DONE) != 1:
        raise DeviceError("a stream did not set a flag")
    _value_list(device, wait=(given, 1), write=(done, 2)).enqueue()
    went_ahead = wait_for_word(slab.memory, DONE, 2, _HELD_NS, 0)
    store_word(slab.memory, GIVEN, 1)
    is_released = wait_for_word(slab.memory, DONE, 2, _RELEASED_NS, 0)
    if not is_released:
        # The memory cannot be let go of while a stream waits for it.
        _value_list(device, write=(given, 1)).enqueue(_DEFAULT_STREAM)
    device.wait()
    if went_ahead:
        raise DeviceError("a stream did not wait for a flag")
    if not is_released:
        raise DeviceError("a stream did not see a flag that the host had set")
    return "stream waits work"


def _value_list(
    device: Device, *, wait: tuple[int, int] | None = None, write: tuple[int, int]
) -> CommandList:
    """A wait, if one is asked for, and a write: addresses as the device has them, and values."""
    commands = device.command_list()
    if wait is not None:
        commands.set_value(commands.wait_value(wait[0]), *wait)
    commands.set_value(commands.write_value(write[0]), *write)
    return commands


# --- two GPUs, or one: device slabs ----------------------------------------------------------


def check_pair(runtime: Any, names: Sequence[str], first: int, second: int) -> Finding:
    """Device slabs between two GPUs, either of which may be the engine's, or within one.

    Copies are made by the first, as by an engine's: to the other's memory, and from there. The
    finding is named "cuda:0-cuda:1".
    """
    one, other = names[first], names[second]
    name = f"{one}-{other}"
    try:
        for mine, theirs in ((first, second), (second, first)):
            if mine != theirs and not runtime.deviceCanAccessPeer(mine, theirs):
                value = (
                    f"no device slabs: {names[mine]} has no peer access to {names[theirs]}; arrays "
                    "go through the host's memory"
                )
                remedy = "rocm-smi --showtopoaccess" if runtime.is_hip else "nvidia-smi topo -p2p r"
                return Finding(name, "degraded", value, f"{_PINNED_SLABS}; {remedy} says more")
        there, back, small = _copy_between(runtime, first, second)
    except Exception as error:  # a broken driver may raise anything
        value = f"no device slabs ({describe(error)}); arrays go through the host's memory"
        return Finding(name, "degraded", value, _PINNED_SLABS)
    if first == second:
        value = f"device slabs: {there}, {small}; an engine and a worker on one GPU take turns"
    else:
        value = f"device slabs: {there} to {other}, {back} from there, {small}"
    return Finding(name, "ok", value)


def _copy_between(runtime: Any, first: int, second: int) -> tuple[str, str, str]:
    """How fast the first GPU copies to the second and from there, and how long a small copy to it
    takes; DeviceError: to no avail."""
    with contextlib.ExitStack() as undo:
        near, far = (_allocate(runtime, index, undo) for index in (first, second))
        if first != second:
            undo.enter_context(_peer_access(runtime, first, second))

        def prepare(to: int, source: int, n_bytes: int) -> Callable[[], None]:
            def copy() -> None:
                kind = runtime.memcpyDeviceToDevice
                runtime.memcpyAsync(to, source, n_bytes, kind, _DEFAULT_STREAM)
                runtime.streamSynchronize(_DEFAULT_STREAM)

            return copy

        rates = []
        for to, source, owner in ((far, near, first), (near, far, second)):
            sent = secrets.token_bytes(_CHECKED_BYTES)
            _put(runtime, owner, source, sent)
            runtime.setDevice(first)
            prepare(to, source, _CHECKED_BYTES)()
            _compare(_fetch(runtime, to), sent)
            rates.append(_rate(prepare(to, source, _LARGE_BYTES)))
        return rates[0], rates[1], _duration(prepare(far, near, _SMALL_BYTES))


def _allocate(runtime: Any, index: int, undo: contextlib.ExitStack) -> int:
    """Memory of that GPU which other processes could open, as slabs must be."""
    runtime.setDevice(index)
    address: int = runtime.malloc(_LARGE_BYTES)
    undo.callback(runtime.free, address)
    runtime.ipcGetMemHandle(address)
    return address


@contextlib.contextmanager
def _peer_access(runtime: Any, mine: int, other: int) -> Iterator[None]:
    """One GPU reads and writes the other's memory by itself."""
    runtime.setDevice(mine)
    try:
        runtime.deviceEnablePeerAccess(other)
    except RuntimeError as error:
        if "AlreadyEnabled" not in str(error):
            raise
        # Whoever enabled it needs it.
        yield
        return
    try:
        yield
    finally:
        runtime.setDevice(mine)
        runtime.deviceDisablePeerAccess(other)


def _put(runtime: Any, owner: int, to: int, sent: bytes) -> None:
    """Copy from the host to that GPU's memory, where it is on return."""
    from ..backends.gpu._launch import address_of

    runtime.setDevice(owner)
    runtime.memcpy(to, address_of(sent), len(sent), runtime.memcpyHostToDevice)
    # Of what is not pinned, the driver may have no more than a copy yet.
    runtime.deviceSynchronize()


def _fetch(runtime: Any, source: int) -> bytes:
    from ..backends.gpu._launch import address_of

    found = bytearray(_CHECKED_BYTES)
    runtime.memcpy(address_of(found), source, len(found), runtime.memcpyDeviceToHost)
    return bytes(found)


# --- what copies are measured by -------------------------------------------------------------


def _compare(found: bytes, sent: bytes) -> None:
    from ..errors import DeviceError

    if found != sent:
        raise DeviceError(f"{len(sent)} bytes did not arrive as they were sent")


def _rate(copy: Callable[[], None]) -> str:
    """The bandwidth of a large copy."""
    return f"{_LARGE_BYTES / _fastest_ns(copy, _LARGE_COPIES):.1f} GB/s"


def _duration(copy: Callable[[], None]) -> str:
    """From a small copy's being enqueued until the host knows that it is done."""
    elapsed_us = _fastest_ns(copy, _SMALL_COPIES) / 1e3
    return f"{elapsed_us:.1f} µs for {_SMALL_BYTES >> 10} KiB"


def _fastest_ns(copy: Callable[[], None], n_copies: int) -> int:
    durations_ns = []
    for _ in range(n_copies):
        start_ns = time.perf_counter_ns()
        copy()
        durations_ns.append(time.perf_counter_ns() - start_ns)
    # A clock that stood still is no bandwidth.
    return max(1, min(durations_ns))
