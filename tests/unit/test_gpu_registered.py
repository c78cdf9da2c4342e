"""Rings that are registered with a GPU, without a GPU: what the device then copies by itself."""

from __future__ import annotations

import contextlib
import logging
import select
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import moeshm
from moeshm import protocol
from moeshm.backends import Ids, MemoryUser, Weights
from moeshm.backends.gpu import backend as gpu_backend
from moeshm.backends.gpu import job, workspace
from moeshm.backends.gpu.abi import Call
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.device import Registration
from moeshm.backends.gpu.registered import MemoryStats, RegisteredMemory
from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import ExpertLayer
from moeshm.daemon import Daemon
from moeshm.dtypes import Array, DType, dtype_of, narrow
from moeshm.errors import DeviceError, DeviceLost
from tests.checkpoints import random_layer
from tests.conformance.test_backends import TOLERANCE, assert_close, draw_call
from tests.simt.device import IdleDevice, LazyDevice, SimtDevice, modes_of
from tests.wire import Ends, connected, meanwhile

LAYER = random_layer(1)
#: That are mapped of a ring for 64 KiB: one page more, twice. So small a ring is gone through from
#: end to end, however empty it is.
RING_BYTES = 2 * ((64 << 10) + 4096)


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations of any size go the way of large ones."""
    monkeypatch.setattr(gpu_backend, "DIRECT_BYTES", 0)


@contextlib.contextmanager
def rings(backend: MemoryUser, capacity: int = 64 << 10) -> Iterator[Ends]:
    """Both ends of a session's, whose memory the backend uses."""
    with connected("shared", capacity) as ends, contextlib.ExitStack() as stack:
        for memory in ends.worker.memory():
            stack.enter_context(contextlib.closing(backend.use_memory(memory)))
        yield ends


def serve(
    ends: Ends, layer: ExpertLayer, backend: GpuBackend, hidden: Array, ids: Ids, weights: Weights
) -> Array:
    """What a client reads after the worker computed its call, from record to record."""
    dtype = dtype_of(hidden)
    ends.client.write_call(7, 0, hidden, ids, weights, dtype, 0)
    record = ends.worker.acquire(0.0)
    call = protocol.read_plain(record, protocol.plain_shapes({0: layer.info}, {}), len(hidden))
    assert call is not None
    reply = ends.worker.reserve(
        protocol.reply_bytes(len(hidden), hidden.shape[1], dtype), protocol.REPLY
    )
    rows = reply.array(dtype.numpy, hidden.shape, protocol.HEADER_BYTES)
    rows.view(np.uint8)[...] = 0xFF
    backend.ffn(0, call.hidden_states, call.topk_ids, call.topk_weights, rows)
    del rows, call
    record.release()
    reply.commit()
    answer = ends.client.acquire(0.0)
    found: Array = answer.array(dtype.numpy, hidden.shape, protocol.HEADER_BYTES).copy()
    answer.release()
    return found


class Copies:
    """What a device is asked to copy, and what is launched, in order: names of memory and bytes."""

    def __init__(self, device: SimtDevice, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int] | str] = []
        #: Of the host, one for each copy.
        self.addresses: list[int] = []
        self._device = device
        copy_in, copy_out, launch = device.copy_in, device.copy_out, device.launch

        def note_in(to: int, source: int, nbytes: int) -> None:
            self.seen.append((f"in from {self._name(source)}", nbytes))
            self.addresses.append(source)
            copy_in(to, source, nbytes)

        def note_out(to: int, source: int, nbytes: int) -> None:
            self.seen.append((f"out to {self._name(to)}", nbytes))
            self.addresses.append(to)
            copy_out(to, source, nbytes)

        def note_launch(kernel: object, *how: object) -> None:
            self.seen.append(str(getattr(kernel, "name", "")))
            launch(kernel, *how)  # type: ignore[arg-type]

        patch.setattr(device, "copy_in", note_in)
        patch.setattr(device, "copy_out", note_out)
        patch.setattr(device, "launch", note_launch)

    def _name(self, address: int) -> str:
        ranges = self._device.registered.items()
        is_registered = any(at <= address < at + size for at, size in ranges)
        return "ring" if is_registered else "staging"


# --- calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place_bytes", [0, 1 << 20])
@pytest.mark.parametrize("weight_dtype", DType)
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 5, 140])
def test_calls_between_registered_rings(
    monkeypatch: pytest.MonkeyPatch,
    in_place_bytes: int,
    weight_dtype: DType,
    dtype: DType,
    n_tokens: int,
) -> None:
    """The bits of calls from memory that is not registered, there when `ffn` returns."""
    monkeypatch.setattr(job, "IN_PLACE_BYTES", in_place_bytes)
    layer = random_layer(9, weight_dtype=weight_dtype)
    backend, plain = (GpuBackend({0: layer}, made) for made in (LazyDevice(), SimtDevice()))
    hidden, ids, weights = draw_call(10, layer, n_tokens, 2)
    hidden = narrow(hidden, dtype)
    with rings(backend) as ends, connected("shared") as others:
        found = serve(ends, layer, backend, hidden, ids, weights)
        expected = serve(others, layer, plain, hidden, ids, weights)
    np.testing.assert_array_equal(found, expected)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[weight_dtype])
    assert_close(found, reference_ffn(layer, hidden, ids, weights), tolerance)


@pytest.mark.parametrize(
    ("weight_dtype", "dtype", "in_place_bytes", "direct_bytes", "expected"),
    [
        # Rows of 24 values; ids and weights, each padded to a multiple of 256 bytes.
        (DType.F32, DType.F32, 0, 0, [("in from ring", 3840), ("in from staging", 1024), "out"]),
        (DType.F32, DType.F32, 1 << 20, 0, [("in from ring", 3840), ("in from staging", 1024)]),
        (DType.BF16, DType.F32, 0, 0, [("in from staging", 1024), "convert", "out"]),
        (DType.BF16, DType.F16, 0, 0, [("in from staging", 1024), "convert", "out"]),
        (DType.F32, DType.F32, 0, 3841, [("in from staging", 4864), "out"]),
        (DType.F32, DType.F32, 0, 3840, [("in from ring", 3840), ("in from staging", 1024), "out"]),
    ],
)
def test_what_is_copied(
    monkeypatch: pytest.MonkeyPatch,
    weight_dtype: DType,
    dtype: DType,
    in_place_bytes: int,
    direct_bytes: int,
    expected: list[object],
) -> None:
    """Activations from record to device, or by `convert` where they lie; results to the record."""
    monkeypatch.setattr(job, "IN_PLACE_BYTES", in_place_bytes)
    monkeypatch.setattr(gpu_backend, "DIRECT_BYTES", direct_bytes)
    layer, device = random_layer(9, weight_dtype=weight_dtype), IdleDevice()
    backend, copies = GpuBackend({0: layer}, device), Copies(device, monkeypatch)
    hidden, ids, weights = draw_call(10, layer, 40, 2)
    hidden = narrow(hidden, dtype)
    with rings(backend) as ends:
        serve(ends, layer, backend, hidden, ids, weights)
    if expected[-1] == "out":
        expected[-1] = ("out to ring", hidden.nbytes)
    assert [each for each in copies.seen if each == "convert" or type(each) is tuple] == expected


@pytest.mark.parametrize("n_tokens", [40, 130])
def test_each_call_has_its_own_addresses(monkeypatch: pytest.MonkeyPatch, n_tokens: int) -> None:
    """Of one kind all, in other places of the rings, also across their ends."""
    monkeypatch.setattr(job, "IN_PLACE_BYTES", 0)
    layer, device = random_layer(9, hidden_size=64), LazyDevice()
    backend, copies = GpuBackend({0: layer}, device), Copies(device, monkeypatch)
    with rings(backend) as ends:
        for seed in range(15):
            call = draw_call(seed, layer, n_tokens, 2)
            assert_close(serve(ends, layer, backend, *call), reference_ffn(layer, *call), 1e-5)
        for start in device.registered:
            at = [each - start for each in copies.addresses if 0 <= each - start < RING_BYTES]
            assert len(at) == 15
            assert len(set(at)) > 2
            assert [each for each in at if each < RING_BYTES // 2 < each + n_tokens * 256]
    assert len(backend._jobs) == 1


def test_long_calls_are_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "MAX_TOKENS", 40)
    backend = GpuBackend({0: LAYER}, SimtDevice())
    call = draw_call(11, LAYER, 130, 2)
    with rings(backend) as ends:
        assert_close(serve(ends, LAYER, backend, *call), reference_ffn(LAYER, *call), 1e-5)


def test_rows_that_kernels_take_padded_are_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, device = random_layer(16, hidden_size=33), SimtDevice()
    backend, copies = GpuBackend({0: layer}, device), Copies(device, monkeypatch)
    call = draw_call(17, layer, 3, 2)
    with rings(backend) as ends:
        assert_close(serve(ends, layer, backend, *call), reference_ffn(layer, *call), 1e-5)
    assert not [each for each in copies.seen if "ring" in each[0]]


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_rows_that_kernels_cannot_load_are_staged(
    monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    device = IdleDevice()
    backend, copies = GpuBackend({0: LAYER}, device), Copies(device, monkeypatch)
    hidden, ids, weights = draw_call(17, LAYER, 3, 2)
    with connected("shared") as ends:
        memory = ends.worker.memory()[1]
        with contextlib.closing(backend.use_memory(memory)):
            rows = np.frombuffer(memory, np.uint8, hidden.nbytes, offset)
            backend.ffn(0, rows.view(np.float32).reshape(hidden.shape), ids, weights, hidden)
            del rows
        del memory
    assert copies.seen[0] == ("in from staging", 1024)


def test_kernels_get_the_devices_addresses_and_copies_the_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "IN_PLACE_BYTES", 1 << 20)
    device = IdleDevice()
    device.shift = 1 << 40
    layer = random_layer(9, weight_dtype=DType.BF16)
    backend, seen = GpuBackend({0: layer}, device), list[Call]()
    device.on_launch = lambda _kernel, call: seen.append(call)
    with rings(backend) as ends:
        hidden, ids, weights = draw_call(10, layer, 3, 2)
        serve(ends, layer, backend, hidden, ids, weights)
        (first, *_, last), (calls, replies) = seen, ends.worker.memory()
        for address, memory in ((first.x, calls), (last.out, replies)):
            start = np.frombuffer(memory, np.uint8).ctypes.data + device.shift
            assert start <= address < start + memory.nbytes
        monkeypatch.setattr(job, "IN_PLACE_BYTES", 0)
        # `device.copy_in` and `copy_out` refuse others than the host's.
        serve(ends, layer, backend, narrow(hidden, DType.BF16), ids, weights)
        del calls, replies, memory


@pytest.mark.parametrize("direct_bytes", [0, 16 << 10])
def test_calls_of_a_client(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, direct_bytes: int
) -> None:
    """Through a session as workers serve it, one reply after the other."""
    monkeypatch.setattr(gpu_backend, "DIRECT_BYTES", direct_bytes)
    layer, device = random_layer(9, weight_dtype=DType.BF16), LazyDevice()
    backend, address = GpuBackend({0: layer}, device), f"unix:{tmp_path / 'w.sock'}"
    served = Daemon(backend, address)

    def serve_one() -> None:
        select.select([served._listener.socket], [], [])
        served._accept()
        served._listener.close()
        for thread in served._threads:
            thread.join()

    calls = [draw_call(seed, layer, n_tokens, 2) for seed, n_tokens in enumerate((1, 200, 40, 1))]
    with meanwhile(serve_one), moeshm.connect(address, transport="shared") as client:
        pending = [client.submit(0, *call) for call in calls]
        found = [future.result() for future in pending]
        assert len(device.registered) == 2
        assert backend.memory_stats.refused_bytes == 0
    for call, rows in zip(calls, found, strict=True):
        assert_close(rows, reference_ffn(layer, *call), TOLERANCE[DType.BF16])
    assert not device.registered


# --- memory ---------------------------------------------------------------------------------


def test_rings_are_registered_as_they_are_mapped_and_until_they_are_closed() -> None:
    device = SimtDevice()
    backend = GpuBackend({0: LAYER}, device)
    with connected("shared", 64 << 10) as ends:
        used = [backend.use_memory(memory) for memory in ends.worker.memory()]
        assert [each.direct_bytes for each in used] == [RING_BYTES] * 2
        assert [modes_of(*each) for each in device.registered.items()] == [{"r--s"}, {"rw-s"}]
        assert backend.memory_stats == MemoryStats(2 * RING_BYTES, 0)
        for each in used:
            each.close()
            each.close()
        assert not device.registered
        assert backend.memory_stats == MemoryStats(0, 0)


def test_memory_stays_mapped_while_it_is_registered() -> None:
    device = SimtDevice()
    backend = GpuBackend({0: LAYER}, device)
    with connected("shared") as ends:
        used = [backend.use_memory(memory) for memory in ends.worker.memory()]
    where = list(device.registered.items())
    assert all(modes_of(*each) for each in where)
    for each in used:
        each.close()
    assert not any(modes_of(*each) for each in where)


def test_memory_of_several_sessions() -> None:
    device = SimtDevice()
    registered = RegisteredMemory(device)
    with connected("shared") as first, connected("shared") as second:
        views = [*first.worker.memory(), *second.worker.memory()]
        arrays = [np.frombuffer(view, np.uint8) for view in views]
        used = [registered.use(view) for view in views]
        for index in (2, 0, 3, 1):
            for is_written in (False, True):
                for array in (arrays[index], arrays[index][:1], arrays[index][-1:]):
                    at = array.ctypes.data
                    is_usable = array.flags.writeable or not is_written
                    assert registered.find(array, is_written) == ((at, at) if is_usable else None)
            used[index].close()
            assert registered.find(arrays[index], False) is None
        del views, arrays, array


def test_what_is_not_in_registered_memory() -> None:
    registered = RegisteredMemory(SimtDevice())
    with connected("shared") as ends:
        below, above = sorted(
            ends.worker.memory(), key=lambda view: np.frombuffer(view, np.uint8).ctypes.data
        )
        used = registered.use(below)
        half = np.frombuffer(below, np.uint8, len(below) // 4).reshape(2, -1)
        assert registered.find(half, False)
        for array in (np.zeros(8), np.frombuffer(above, np.uint8), half[:, 1:], half.T):
            assert registered.find(array, False) is None
        used.close()
        del below, above, half, array


class ChoosyDevice(SimtDevice):
    """Refuses more bytes at once than it is told, and counts."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__()
        self.most_bytes = most_bytes

    def register(self, address: int, nbytes: int, *, read_only: bool) -> Registration:
        """As `Device.register`."""
        if nbytes > self.most_bytes:
            raise DeviceError(f"{nbytes} bytes cannot be page-locked for a card: not supported")
        return super().register(address, nbytes, read_only=read_only)


def test_a_device_that_takes_rings_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies across the two goes through the staging."""
    device = ChoosyDevice(RING_BYTES // 2)
    layer = random_layer(9, hidden_size=128)
    backend, copies = GpuBackend({0: layer}, device), Copies(device, monkeypatch)
    with rings(backend) as ends:
        assert len(device.registered) == 4
        for seed in range(12):
            call = draw_call(seed, layer, 20, 2)
            assert_close(serve(ends, layer, backend, *call), reference_ffn(layer, *call), 1e-5)
    sizes = {each[1] for each in copies.seen if each[0] == "in from staging"}
    assert sizes == {512, 512 + 20 * 128 * 4}
    assert backend.memory_stats == MemoryStats(0, 0)


def test_a_device_that_takes_none(caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, counted always, and calls are computed."""
    caplog.set_level(logging.INFO)
    backend = GpuBackend({0: LAYER}, ChoosyDevice(0))
    call = draw_call(10, LAYER, 40, 2)
    for _ in range(2):
        with rings(backend) as ends:
            assert_close(serve(ends, LAYER, backend, *call), reference_ffn(LAYER, *call), 1e-5)
    assert backend.memory_stats == MemoryStats(0, 4 * RING_BYTES)
    assert [record.message for record in caplog.records] == [
        "the host copies activations for the device: "
        f"{RING_BYTES // 2} bytes cannot be page-locked for a card: not supported"
    ]


def test_a_device_that_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next call will say so; what it had registered is let go of."""
    device = SimtDevice()
    backend = GpuBackend({0: LAYER}, device)

    def lose() -> None:
        raise DeviceLost("simt is lost")

    with connected("shared") as ends:
        calls, replies = ends.worker.memory()
        before = backend.use_memory(calls)
        monkeypatch.setattr(device, "use", lose)
        after = backend.use_memory(replies)
        assert after.direct_bytes == 0
        before.close()
        assert "shared memory was not unregistered: simt is lost" in caplog.text
        after.close()
        del calls, replies
    assert backend.memory_stats.registered_bytes == 0


def test_other_transports_have_no_memory() -> None:
    with connected("stream") as ends:
        assert ends.worker.memory() == ends.client.memory() == []


@pytest.mark.parametrize("weight_dtype", DType)
@pytest.mark.parametrize("direct_bytes", [0, 16 << 10])
def test_calls_of_a_decode_are_made_ready_before_they_come(
    monkeypatch: pytest.MonkeyPatch, weight_dtype: DType, direct_bytes: int
) -> None:
    """From the host's memory and from rings: the first call of a size has nothing left to do."""
    monkeypatch.setattr(gpu_backend, "DIRECT_BYTES", direct_bytes)
    layer = random_layer(2, hidden_size=256, weight_dtype=weight_dtype, num_experts=9, top_k=2)
    backend = GpuBackend({0: layer}, IdleDevice())
    backend.warm_up()

    def refuse(_kind: object) -> None:
        raise AssertionError("a job was missing")

    monkeypatch.setattr(backend, "_make_job", refuse)
    with rings(backend, 1 << 20) as ends:
        for n_tokens in range(1, gpu_backend.PREPARED_TOKENS + 1):
            for dtype in DType:
                hidden = np.zeros((n_tokens, 256), dtype.numpy)
                ids = np.zeros((n_tokens, 2), np.int32)
                weights = np.ones(ids.shape, np.float32)
                backend.ffn(0, hidden, ids, weights, hidden.copy())
                serve(ends, layer, backend, hidden, ids, weights)
    many = np.zeros((gpu_backend.PREPARED_TOKENS + 1, 256), np.float32)
    ids = np.zeros((len(many), 2), np.int32)
    with pytest.raises(AssertionError, match="a job was missing"):
        backend.ffn(0, many, ids, np.ones(ids.shape, np.float32), many)
