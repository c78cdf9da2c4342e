"""The engine's side of a slab, without a GPU: what it enqueues, leaves behind and restores."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from moeshm._words import load_word, store_word
from moeshm.backends.gpu import mover
from moeshm.backends.gpu.device import Memory
from moeshm.backends.gpu.mover import Mover
from moeshm.device_arrays import DeviceInputs
from moeshm.dtypes import Array, DType, dtype_of, narrow, widen
from moeshm.errors import DeviceError
from moeshm.transport import slab
from moeshm.transport.slab import DONE, FLAGS_BYTES, GIVEN, SLOT_BYTES, TAKEN, Places
from tests.simt.device import FEATURES, LazyDevice, SimtDevice

DATA_BYTES = slab.PAGE_BYTES
HIDDEN_SIZE, TOP_K = 72, 3
KIB = 1 << 10
AT = Places(5, hidden_states=4096, topk_ids=256 * KIB, topk_weights=384 * KIB, out=512 * KIB)
OTHER = Places(31, *(1024 * KIB + offset for offset in AT[1:]))
STREAM = 0xCAFE
CALLERS_DEVICE, MOVERS_DEVICE = 3, 1


class Runtime:
    """As CuPy's: which device is the thread's."""

    current = CALLERS_DEVICE

    def getDevice(self) -> int:
        return self.current

    def setDevice(self, index: int) -> None:
        self.current = index


class Slab:
    """A slab as the worker has it, and a mover of the engine's."""

    def __init__(
        self, memory: memoryview, data: Array, made: Mover, device: SimtDevice, worker_bytes: int
    ) -> None:
        self.memory = memory
        #: Of pinned or of device memory.
        self.data = data
        self.mover = made
        self.device = device
        #: Device memory that is the worker's.
        self.worker_bytes = worker_bytes

    def close(self) -> None:
        """It is unmapped, though a test still refers to this."""
        self.memory, self.data = memoryview(b""), np.empty(0, np.uint8)

    @property
    def left(self) -> tuple[Any, ...]:
        """What the mover has of the device: registered and opened memory, device's and pinned."""
        each = self.device
        return (
            dict(each.registered),
            [*each.opened],
            each.device_bytes - self.worker_bytes,
            each.pinned_bytes,
        )

    def flag(self, at: Places, which: int) -> int:
        """As it is now."""
        return load_word(self.memory, at.slot * SLOT_BYTES + which)

    def answer(self, at: Places, sequence: int, output: Array) -> None:
        """What the worker's GPU does."""
        stored = output.reshape(-1).view(np.uint8)
        self.data[at.out : at.out + stored.nbytes] = stored
        store_word(self.memory, at.slot * SLOT_BYTES + DONE, sequence)

    def found(self, offset: int, like: Array) -> Array:
        """What is in its data."""
        stored = self.data[offset : offset + like.nbytes]
        return stored.view(like.dtype).reshape(like.shape)


class Call:
    """The arrays of one, in the device's memory, which is the host's here."""

    def __init__(
        self,
        n_tokens: int,
        dtype: DType = DType.BF16,
        ids_dtype: Any = np.int32,
        weights_dtype: DType = DType.F32,
    ) -> None:
        rng = np.random.default_rng(n_tokens)
        rows, pairs = (n_tokens, HIDDEN_SIZE), (n_tokens, TOP_K)
        self.hidden = narrow(rng.standard_normal(rows, np.float32), dtype)
        self.ids = rng.integers(-1, 64, pairs).astype(ids_dtype)
        self.weights = narrow(rng.standard_normal(pairs, np.float32), weights_dtype)
        self.output = narrow(rng.standard_normal(rows, np.float32), dtype)
        self.out = np.zeros_like(self.output)

    @property
    def inputs(self) -> DeviceInputs:
        """As `device_arrays.check_device` has it."""
        return DeviceInputs(
            hidden_states=self.hidden.ctypes.data,
            topk_ids=self.ids.ctypes.data,
            topk_weights=self.weights.ctypes.data,
            n_tokens=len(self.hidden),
            hidden_size=HIDDEN_SIZE,
            top_k=TOP_K,
            dtype=dtype_of(self.hidden),
            ids_itemsize=self.ids.itemsize,
            weights_dtype=dtype_of(self.weights),
            owners=(self.hidden, self.ids, self.weights),
        )

    def give(self, to: Slab, at: Places, sequence: int) -> None:
        """To the slab."""
        to.mover.give(STREAM, self.inputs, at, sequence)

    def take(self, source: Slab, at: Places, sequence: int) -> None:
        """From the slab."""
        source.mover.take(STREAM, self.out.ctypes.data, self.out.nbytes, at, sequence)

    def assert_given(self, to: Slab, at: Places) -> None:
        """What the worker finds."""
        np.testing.assert_array_equal(to.found(at.hidden_states, self.hidden), self.hidden)
        ids, weights = self.ids.astype(np.int32), widen(self.weights)
        np.testing.assert_array_equal(to.found(at.topk_ids, ids), ids)
        np.testing.assert_array_equal(to.found(at.topk_weights, weights), weights)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """In the place of CuPy's."""
    made = Runtime()
    monkeypatch.setattr(mover, "_runtime", lambda: made)
    return made


@contextlib.contextmanager
def _opened(
    device: SimtDevice,
    patch: pytest.MonkeyPatch,
    runtime: Runtime,
    kind: str,
    worker_bus_id: str = "",
) -> Iterator[Slab]:
    """A slab of that kind, whose mover takes `device` for its GPU."""
    patch.setattr(mover, "open_device", lambda _name: device)
    patch.setattr(device, "use", lambda: runtime.setDevice(MOVERS_DEVICE))
    pinned_bytes = DATA_BYTES if kind == "pinned" else 0
    segment, fd = slab.Segment.create(pinned_bytes)
    theirs = slab.Segment.attach(fd, pinned_bytes)
    os.close(fd)
    with contextlib.ExitStack() as stack:
        handle, data = b"", np.frombuffer(theirs.memory, np.uint8)[FLAGS_BYTES:]
        if kind == "device":
            allocated = stack.enter_context(contextlib.closing(device.allocate(DATA_BYTES)))
            handle, data = device.export(allocated), _bytes_of(allocated)
        worker_bytes = device.device_bytes
        made = Mover("cuda:1", segment.memory, handle, worker_bus_id)
        stack.enter_context(contextlib.closing(made))
        opened = Slab(theirs.memory, data, made, device, worker_bytes)
        yield stack.enter_context(contextlib.closing(opened))


def _bytes_of(memory: Memory) -> Array:
    array = (ctypes.c_uint8 * memory.nbytes).from_address(memory.address)
    return np.frombuffer(memoryview(array), np.uint8)


def _done_by(device: SimtDevice, patch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels, and waits, that it does from now on."""
    names: list[str] = []
    do = device.do

    def note(command: Callable[..., None], *how: Any) -> None:
        names.append("wait" if command == device.wait_value else how[0].name)
        do(command, *how)

    patch.setattr(device, "do", note)
    return names


@pytest.fixture(params=["pinned", "device"])
def opened(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> Iterator[Slab]:
    """A slab of each kind; what is enqueued is done at once."""
    with _opened(SimtDevice(), monkeypatch, runtime, request.param) as made:
        yield made


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> Iterator[Slab]:
    """A pinned slab; what is enqueued is done when the device is waited for."""
    with _opened(LazyDevice(), monkeypatch, runtime, "pinned") as made:
        yield made


# --- calls --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_dtype", DType)
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [0, 1, 130])
def test_a_call_goes_to_a_slab_and_comes_back(
    opened: Slab, n_tokens: int, dtype: DType, ids_dtype: Any, weights_dtype: DType
) -> None:
    call = Call(n_tokens, dtype, ids_dtype, weights_dtype)
    call.give(opened, AT, 17)
    assert opened.flag(AT, GIVEN) == 17
    call.assert_given(opened, AT)
    opened.answer(AT, 17, call.output)
    call.take(opened, AT, 17)
    assert opened.flag(AT, TAKEN) == 17
    np.testing.assert_array_equal(call.out, call.output)


def test_calls_of_many_slots_and_sizes(opened: Slab) -> None:
    """Sequences wrap; what a larger call left behind changes nothing."""
    for round_, n_tokens in enumerate((700, 1, 0, 33, 2, 300, 1)):
        for at in (AT, OTHER):
            call, sequence = Call(n_tokens), (0xFFFFFFFC + round_) % (1 << 32)
            call.give(opened, at, sequence)
            call.assert_given(opened, at)
            opened.answer(at, sequence, call.output)
            call.take(opened, at, sequence)
            np.testing.assert_array_equal(call.out, call.output)
            assert (opened.flag(at, GIVEN), opened.flag(at, TAKEN)) == (sequence, sequence)


def test_nothing_is_done_before_its_turn(lazy: Slab) -> None:
    """Several calls are on their way at a time, each with its own arguments."""
    calls = {AT: Call(40), OTHER: Call(3, DType.F32, np.int64)}
    for at, call in calls.items():
        call.give(lazy, at, 9)
        assert lazy.flag(at, GIVEN) == 0
    lazy.device.wait()
    for at, call in calls.items():
        assert lazy.flag(at, GIVEN) == 9
        call.assert_given(lazy, at)
        call.take(lazy, at, 9)
    for at, call in calls.items():
        lazy.answer(at, 9, call.output)
        assert lazy.flag(at, TAKEN) == 0
    lazy.device.wait()
    for at, call in calls.items():
        assert lazy.flag(at, TAKEN) == 9
        np.testing.assert_array_equal(call.out, call.output)


def test_an_output_is_waited_for(opened: Slab) -> None:
    """The slot's own flag; the stand-in has nobody who could set it later."""
    call = Call(4)
    opened.answer(AT, 6, call.output)
    opened.answer(OTHER, 7, call.output)
    with pytest.raises(DeviceError, match="waits for ever for 7 where 6 is"):
        call.take(opened, AT, 7)
    assert not call.out.any()
    assert opened.flag(AT, TAKEN) == 0


@pytest.mark.parametrize("kind", ["pinned", "device"])
@pytest.mark.parametrize(
    ("worker_bus_id", "kernels"),
    [
        # A block of 256 threads that load 8 vectors each, or more behind one that waits.
        ("0000:1b:00.0", ["await_and_take", "await_done", "take"]),
        ("0000:1a:00.0", ["wait", "take", "wait", "take"]),
        ("", ["wait", "take", "wait", "take"]),
    ],
)
@pytest.mark.parametrize("ends_long_kernels", [False, True])
def test_kernels_await_only_what_another_gpu_computes(
    monkeypatch: pytest.MonkeyPatch,
    runtime: Runtime,
    kind: str,
    ends_long_kernels: bool,
    worker_bus_id: str,
    kernels: list[str],
) -> None:
    """On its own GPU the worker would not have its turn; and no kernel may take long for all."""
    if ends_long_kernels:
        kernels = ["wait", "take", "wait", "take"]
    features = FEATURES._replace(
        bus_id="0000:1a:00.0", multiprocessors=20, ends_long_kernels=ends_long_kernels
    )
    device = SimtDevice(features)
    with _opened(device, monkeypatch, runtime, kind, worker_bus_id) as made:
        source, out = (np.arange(2_049 * 4, dtype=np.uint32) for _ in range(2))
        made.answer(AT, 5, source)
        done = _done_by(device, monkeypatch)
        for n_vectors in (2_048, 2_049):
            out[:] = 0
            made.mover.take(STREAM, out.ctypes.data, n_vectors * 16, AT, 5)
            assert made.flag(AT, TAKEN) == 5
            np.testing.assert_array_equal(out[: n_vectors * 4], source[: n_vectors * 4])
    assert done == kernels


@pytest.mark.parametrize("stream", [0, STREAM])
def test_everything_is_on_the_callers_stream(opened: Slab, stream: int) -> None:
    """And none of it before the one ahead has ended, which is not ours."""
    opened.device.used_streams.clear()
    call = Call(4)
    opened.mover.give(stream, call.inputs, AT, 1)
    opened.answer(AT, 1, call.output)
    opened.mover.take(stream, call.out.ctypes.data, call.out.nbytes, AT, 1)
    assert opened.device.used_streams == [stream, stream]
    assert opened.device.overlapping == {"give": False, "take": False}


class Launches:
    """What is launched, and not done: grids, and where blocks are counted."""

    def __init__(self, device: SimtDevice, patch: pytest.MonkeyPatch) -> None:
        self.grids: list[int] = []
        self.counts: list[int] = []
        patch.setattr(device, "do", self._note)

    def _note(self, command: Callable[..., None], *how: Any) -> None:
        if command.__name__ == "launch":
            self.grids.append(how[1])
            self.counts.append(how[-1].n_done)


def test_grids_follow_the_bytes(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    """A thread for each vector and pair, as far as there are multiprocessors."""
    device = SimtDevice(FEATURES._replace(multiprocessors=6))
    with _opened(device, monkeypatch, runtime, "pinned") as made:
        given = Launches(device, monkeypatch)
        # 9 vectors and 3 pairs of a token: 256 threads are enough for 21.
        for n_tokens in (0, 1, 21, 22, 50, 100, 1000):
            Call(n_tokens).give(made, AT, 1)
        taken = Launches(device, monkeypatch)
        for n_vectors in (0, 1, 256, 257, 512, 513, 1024, 1025, 10_000):
            made.mover.take(STREAM, AT.out, n_vectors * 16, AT, 1)
    assert given.grids == [1, 1, 1, 2, 4, 6, 6]
    assert taken.grids == [1, 1, 1, 2, 2, 4, 4, 6, 6]


def test_every_slot_counts_by_itself(opened: Slab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of several streams are on their way at a time."""
    launches = Launches(opened.device, monkeypatch)
    places = [AT._replace(slot=slot) for slot in range(slab.SLOTS)]
    for at in places:
        Call(1).give(opened, at, 1)
    assert len(set(launches.counts)) == slab.SLOTS


# --- fallbacks ----------------------------------------------------------------------------


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


# --- what is left -------------------------------------------------------------------------


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
    with _opened(device, monkeypatch, runtime, kind) as made:
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


# --- devices ------------------------------------------------------------------------------


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


def test_without_cupy_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a worker is started."""
    for name in ("cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DeviceError, match="no CuPy for device cuda:0"):
        Mover("cuda:0", memoryview(b""), b"")
