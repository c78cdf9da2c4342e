"""The engine's side of a slab, without a GPU: copies for the host, what is left, whose device."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from moeshm.backends.gpu import mover
from moeshm.backends.gpu.mover import Mover
from moeshm.errors import DeviceError
from moeshm.transport import slab
from moeshm.transport.slab import FLAGS_BYTES, GIVEN, TAKEN
from tests.simt.device import FEATURES, SimtDevice
from tests.unit.mover_slabs import (
    ANOTHERS_BUS_ID,
    AT,
    CALLERS_DEVICE,
    DATA_BYTES,
    HIDDEN_SIZE,
    MOVERS_DEVICE,
    OTHER,
    OWN_BUS_ID,
    Call,
    Runtime,
    Slab,
    opened_slab,
)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """In the place of CuPy's."""
    return Runtime(monkeypatch)


@pytest.fixture(params=["pinned", "device"])
def opened(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> Iterator[Slab]:
    """A slab of each kind; what is enqueued is done at once."""
    with opened_slab(SimtDevice(), monkeypatch, runtime, request.param) as made:
        yield made


def test_the_host_reads_and_writes_a_slab(opened: Slab) -> None:
    call = Call(50)
    call.give(opened, AT, 1)
    fetched = opened.mover.fetch(AT.hidden_states, call.hidden.nbytes)
    np.testing.assert_array_equal(fetched.view(call.hidden.dtype), call.hidden.reshape(-1))
    opened.mover.put(AT.out, call.output)
    np.testing.assert_array_equal(opened.found(AT.out, call.output), call.output)
    # A copy, and the caller's own.
    fetched[:] = 0
    call.assert_given(opened, AT)


def test_nothing_and_what_has_gaps_is_copied(opened: Slab) -> None:
    assert opened.mover.fetch(DATA_BYTES, 0).shape == (0,)
    opened.mover.put(DATA_BYTES, np.empty((0, HIDDEN_SIZE), np.float32))
    spread = np.arange(32, dtype=np.float32).reshape(4, 8)[:, ::2]
    opened.mover.put(256, spread)
    np.testing.assert_array_equal(opened.found(256, spread), spread)


def test_a_fallback_allocates_nothing(opened: Slab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers wait for every stream when they allocate or free, and one waits for the fallback."""
    monkeypatch.setattr(mover, "_BOUNCE_BYTES", 1000)
    before = opened.device.n_allocations, opened.device.pinned_bytes
    call = Call(50)
    opened.mover.put(AT.out, call.output)
    np.testing.assert_array_equal(opened.found(AT.out, call.output), call.output)
    fetched = opened.mover.fetch(AT.out, call.output.nbytes)
    np.testing.assert_array_equal(fetched, call.output.reshape(-1).view(np.uint8))
    assert (opened.device.n_allocations, opened.device.pinned_bytes) == before


NOTHING: tuple[Any, ...] = ({}, [], 0, 0)


def test_a_mover_leaves_nothing(opened: Slab) -> None:
    assert opened.left != NOTHING
    for _ in range(2):
        opened.mover.close()
        assert opened.left == NOTHING


@pytest.mark.parametrize("kind", ["pinned", "device"])
@pytest.mark.parametrize(
    "refused", ["register", "open_exported", "allocate", "pin", "copy_in", "wait", "compile"]
)
def test_a_refusal_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime, kind: str, refused: str
) -> None:
    """Whatever it is that the driver refuses."""
    device = SimtDevice()
    real: Callable[..., Any] = getattr(device, refused)
    is_refusing = False

    def refuse(*arguments: Any, **named: Any) -> Any:
        if is_refusing:
            raise DeviceError(f"no {refused}")
        return real(*arguments, **named)

    unregister, closed_on = device.unregister, list[int]()

    def note(address: int) -> None:
        closed_on.append(runtime.current)
        unregister(address)

    monkeypatch.setattr(device, "unregister", note)
    monkeypatch.setattr(device, refused, refuse)
    with opened_slab(device, monkeypatch, runtime, kind) as made:
        handle = made.data.ctypes.data.to_bytes(64, "little") if kind == "device" else b""
        made.mover.close()
        second, fd = slab.Segment.create(len(made.memory) - FLAGS_BYTES)
        os.close(fd)
        is_refusing = True
        if refused != "open_exported" or kind == "device":
            with pytest.raises(DeviceError, match=f"no {refused}"):
                Mover("cuda:1", second.memory, handle)
        is_refusing = False
        assert made.left == NOTHING
        assert runtime.current == CALLERS_DEVICE
    assert set(closed_on) == {MOVERS_DEVICE}


def test_what_cannot_be_closed_is_told_once(
    opened: Slab, monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> None:
    """The rest is closed, and the device is left."""
    unregister = opened.device.unregister

    def refuse(address: int) -> None:
        unregister(address)
        raise DeviceError("it knows nothing of it")

    monkeypatch.setattr(opened.device, "unregister", refuse)
    with pytest.raises(DeviceError, match="it knows nothing of it"):
        opened.mover.close()
    opened.mover.close()
    assert opened.device.opened == []
    assert runtime.current == CALLERS_DEVICE


def test_the_callers_device_stays_current(
    opened: Slab, monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> None:
    """And commands are enqueued, and memory is copied, while the mover's is."""
    seen: list[int] = []
    for name in ("do", "wait"):
        real = getattr(opened.device, name)

        def note(*arguments: Any, real: Any = real) -> None:
            seen.append(runtime.current)
            real(*arguments)

        monkeypatch.setattr(opened.device, name, note)
    call = Call(4)
    opened.answer(AT, 1, call.output)
    for step in (
        lambda: call.give(opened, AT, 1),
        lambda: call.take(opened, AT, 1),
        lambda: opened.mover.fetch(0, 16),
        lambda: opened.mover.put(0, np.zeros(4)),
        opened.mover.close,
    ):
        step()
        assert runtime.current == CALLERS_DEVICE
    assert seen
    assert set(seen) == {MOVERS_DEVICE}


def test_the_callers_device_stays_current_after_errors(opened: Slab, runtime: Runtime) -> None:
    call = Call(4)
    with pytest.raises(DeviceError):
        call.take(opened, AT, 1)
    assert runtime.current == CALLERS_DEVICE


def test_the_callers_device_stays_current_with_an_exchange(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> None:
    """Also when it is refused: nothing was enqueued, and no flag will be set."""
    device, call = SimtDevice(FEATURES._replace(bus_id=OWN_BUS_ID)), Call(4)
    with opened_slab(device, monkeypatch, runtime, "device", ANOTHERS_BUS_ID) as made:
        made.answer(AT, 1, call.output)
        seen: list[int] = []
        do = device.do

        def note(*arguments: Any) -> None:
            seen.append(runtime.current)
            do(*arguments)

        def refuse(*_arguments: Any) -> None:
            raise DeviceError("no launch")

        monkeypatch.setattr(device, "do", note)
        assert call.exchange(made, AT, 1)
        assert (seen, runtime.current) == ([MOVERS_DEVICE], CALLERS_DEVICE)
        monkeypatch.setattr(device, "do", refuse)
        with pytest.raises(DeviceError, match="no launch"):
            call.exchange(made, OTHER, 2)
        assert runtime.current == CALLERS_DEVICE
        assert (made.flag(OTHER, GIVEN), made.flag(OTHER, TAKEN)) == (0, 0)


def test_without_cupy_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a worker is started."""
    for name in ("cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeviceError, match="no CuPy for device cuda:0"):
        Mover("cuda:0", memoryview(b""), b"")
