"""Arrays of CuPy and torch to a slab and back on a GPU, while the host plays the worker."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeshm import device_arrays
from moeshm._words import load_word, store_word, wait_for_word
from moeshm.backends.gpu.cupy_device import open_device
from moeshm.backends.gpu.mover import Mover
from moeshm.dtypes import Array, DType, narrow, widen
from moeshm.transport import slab
from moeshm.transport.slab import DONE, FLAGS_BYTES, GIVEN, SLOT_BYTES, SLOTS, TAKEN, Places
from tests.wire import dense_info

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
DATA_BYTES = 32 << 20
HIDDEN_SIZE, TOP_K = 2048, 8
INFO = dense_info(HIDDEN_SIZE, 64, TOP_K)
AT = Places(3, hidden_states=256, topk_ids=13 << 20, topk_weights=14 << 20, out=15 << 20)
#: Far more than anything takes here.
_TIMEOUT_NS = 30 * 10**9
#: Above every sequence here.
_AFTER_ALL = 1000

#: A worker's device memory, until its input ends.
_EXPORTING = """
import sys
from moeshm.backends.gpu.cupy_device import open_device

device = open_device("auto")
memory = device.allocate(32 << 20)
print(device.export(memory).hex(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # CuPy may warn of what is installed beside it.
        warnings.simplefilter("ignore")
        yield


class Slab:
    """A slab, as both sides have it."""

    def __init__(self, handle: bytes = b"", worker_bus_id: str = "") -> None:
        pinned_bytes = 0 if handle else DATA_BYTES
        segment, fd = slab.Segment.create(pinned_bytes)
        theirs = slab.Segment.attach(fd, pinned_bytes)
        os.close(fd)
        self.memory = theirs.memory
        self.mover = Mover("auto", segment.memory, handle, worker_bus_id)

    def close(self) -> None:
        """No stream waits any more, if a test failed, and nothing is on its way."""
        for slot in range(SLOTS):
            store_word(self.memory, slot * SLOT_BYTES + DONE, _AFTER_ALL)
        synchronize(pytest.importorskip("cupy"))
        self.mover.close()
        self.memory = memoryview(b"")

    def wait(self, at: Places, which: int, sequence: int) -> None:
        """For that flag."""
        offset = at.slot * SLOT_BYTES + which
        assert wait_for_word(self.memory, offset, sequence, _TIMEOUT_NS, 0)

    def set_done(self, at: Places, sequence: int) -> None:
        """As the worker does."""
        store_word(self.memory, at.slot * SLOT_BYTES + DONE, sequence)

    def view(self, offset: int, like: Array) -> Array:
        """Of a pinned slab's data."""
        stored = np.frombuffer(self.memory, np.uint8)[FLAGS_BYTES + offset :][: like.nbytes]
        return stored.view(like.dtype).reshape(like.shape)


@pytest.fixture(params=["", "another"])
def opened(request: pytest.FixtureRequest) -> Iterator[Slab]:
    """A pinned slab; what waits is the stream, or, for a worker on another GPU, a kernel."""
    with contextlib.closing(Slab(worker_bus_id=request.param)) as made:
        yield made


@pytest.fixture(params=["cupy", "torch"])
def library(request: pytest.FixtureRequest) -> Any:
    """That arrays are of."""
    found = pytest.importorskip(request.param)
    if request.param == "torch" and not found.cuda.is_available():
        pytest.skip("this torch uses no GPU")
    return found


def to_gpu(library: Any, array: Array) -> Any:
    """A copy; bfloat16 as the library has it."""
    if library.__name__ == "cupy":
        return library.asarray(array)
    if array.dtype == np.uint16:
        return library.from_numpy(array.view(np.int16)).view(library.bfloat16).cuda()
    return library.from_numpy(array).cuda()


def to_host(library: Any, values: Any) -> Array:
    """The other way, once the GPU is done with everything."""
    if library.__name__ == "cupy":
        library.cuda.runtime.deviceSynchronize()
        found: Array = library.asnumpy(values)
    elif values.dtype == library.bfloat16:
        found = values.view(library.int16).cpu().numpy().view(np.uint16)
    else:
        found = values.cpu().numpy()
    return found


def own_stream(library: Any) -> Any:
    """One that does not wait for the default one, by itself."""
    cuda = library.cuda
    return cuda.Stream(non_blocking=True) if library.__name__ == "cupy" else cuda.Stream()


def synchronize(library: Any) -> None:
    """Wait for everything."""
    if library.__name__ == "cupy":
        library.cuda.runtime.deviceSynchronize()
    else:
        library.cuda.synchronize()


class Call:
    """One call's arrays on both sides."""

    def __init__(
        self,
        library: Any,
        n_tokens: int,
        dtype: DType,
        ids_dtype: Any = np.int64,
        weights_dtype: DType = DType.F32,
    ) -> None:
        rng = np.random.default_rng(n_tokens)
        rows, pairs = (n_tokens, HIDDEN_SIZE), (n_tokens, TOP_K)
        self.hidden = narrow(rng.standard_normal(rows, np.float32), dtype)
        self.ids = rng.integers(-1, 64, pairs).astype(ids_dtype)
        self.weights = narrow(rng.random(pairs, np.float32), weights_dtype)
        self.output = narrow(rng.standard_normal(rows, np.float32), dtype)
        hidden, ids, weights = (
            to_gpu(library, each) for each in (self.hidden, self.ids, self.weights)
        )
        self.on_gpu = hidden
        self.inputs = device_arrays.check_device(0, INFO, hidden, ids, weights, 0)
        self.made, self.address = device_arrays.make_device_output(self.inputs, hidden, None)

    def enqueue(self, to: Slab, stream: Any, at: Places, sequence: int) -> None:
        """Both ways, as `DeviceCalls` does: the stream waits for the worker."""
        handle = device_arrays.stream_of(stream, self.on_gpu)
        out, n_bytes = self.address, self.inputs.n_bytes
        if not to.mover.exchange(handle, self.inputs, out, n_bytes, at, sequence):
            to.mover.give(handle, self.inputs, at, sequence)
            to.mover.take(handle, out, n_bytes, at, sequence)

    def assert_equal(self, hidden: Array, ids: Array, weights: Array) -> None:
        """What the worker found."""
        np.testing.assert_array_equal(hidden, self.hidden)
        np.testing.assert_array_equal(ids, self.ids)
        np.testing.assert_array_equal(weights, widen(self.weights))


@pytest.mark.parametrize("is_default", [True, False])
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [0, 1, 7, 1500])
def test_a_call_goes_to_a_slab_and_comes_back(
    opened: Slab, library: Any, n_tokens: int, dtype: DType, is_default: bool
) -> None:
    call = Call(library, n_tokens, dtype)
    stream = None if is_default else own_stream(library)
    synchronize(library)
    call.enqueue(opened, stream, AT, 17)
    opened.wait(AT, GIVEN, 17)
    ids, weights = call.ids.astype(np.int32), widen(call.weights)
    places = zip(AT[1:], (call.hidden, ids, weights), strict=False)
    call.assert_equal(*(opened.view(offset, like) for offset, like in places))
    assert load_word(opened.memory, AT.slot * SLOT_BYTES + TAKEN) == 0
    opened.view(AT.out, call.output)[...] = call.output
    opened.set_done(AT, 17)
    opened.wait(AT, TAKEN, 17)
    np.testing.assert_array_equal(to_host(library, call.made), call.output)


@pytest.mark.parametrize("weights_dtype", DType)
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
def test_ids_and_weights_of_any_format(
    opened: Slab, library: Any, ids_dtype: Any, weights_dtype: DType
) -> None:
    call = Call(library, 40, DType.BF16, ids_dtype, weights_dtype)
    synchronize(library)
    opened.set_done(AT, 5)
    call.enqueue(opened, None, AT, 5)
    opened.wait(AT, TAKEN, 5)
    call.assert_equal(
        opened.view(AT.hidden_states, call.hidden),
        opened.view(AT.topk_ids, call.ids.astype(np.int32)),
        opened.view(AT.topk_weights, widen(call.weights)),
    )


@pytest.mark.parametrize(("n_tokens", "is_one"), [(8, True), (9, False)])
def test_small_calls_are_one_launch(library: Any, n_tokens: int, is_one: bool) -> None:
    """For a worker on another GPU, unless the driver ends long kernels."""
    call, stream = Call(library, n_tokens, DType.F16), own_stream(library)
    synchronize(library)
    handle = device_arrays.stream_of(stream, call.on_gpu)
    out, n_bytes = call.address, call.inputs.n_bytes
    with contextlib.closing(Slab(worker_bus_id="another")) as opened:
        may_wait = not open_device("auto").features.ends_long_kernels
        opened.set_done(AT, 3)
        found = opened.mover.exchange(handle, call.inputs, out, n_bytes, AT, 3)
        assert found == (is_one and may_wait)
    with contextlib.closing(Slab()) as opened:
        assert not opened.mover.exchange(handle, call.inputs, out, n_bytes, AT, 3)


def test_many_calls_are_on_their_way(opened: Slab, library: Any) -> None:
    """As many as there are slots, again and again, each answered with what it gave."""
    slot_bytes = DATA_BYTES // SLOTS
    places = [
        Places(slot, *(slot * slot_bytes + each for each in (0, 400 << 10, 500 << 10, 600 << 10)))
        for slot in range(SLOTS)
    ]
    n_rounds, stream = 10, own_stream(library)
    calls = [Call(library, 1 + slot % 50, DType.BF16) for slot in range(SLOTS)]
    synchronize(library)

    def answer() -> None:
        for round_ in range(1, 1 + n_rounds):
            for call, at in zip(calls, places, strict=True):
                opened.wait(at, GIVEN, round_)
                given = opened.view(at.hidden_states, call.hidden)
                opened.view(at.out, call.hidden)[...] = given
                opened.set_done(at, round_)

    worker = threading.Thread(target=answer)
    worker.start()
    for round_ in range(1, 1 + n_rounds):
        for call, at in zip(calls, places, strict=True):
            call.enqueue(opened, stream, at, round_)
        for at in places:
            opened.wait(at, TAKEN, round_)
        for call in calls:
            np.testing.assert_array_equal(to_host(library, call.made), call.hidden)
            call.made[...] = 0
        synchronize(library)
    worker.join()


@pytest.mark.parametrize("n_tokens", [8, 300])
@pytest.mark.parametrize("worker_bus_id", ["", "another"])
def test_a_slab_of_device_memory(library: Any, worker_bus_id: str, n_tokens: int) -> None:
    """Another process allocated it."""
    worker = subprocess.Popen(
        [sys.executable, "-c", _EXPORTING],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        with worker.stdin:
            handle = bytes.fromhex(worker.stdout.readline())
            assert handle
            with contextlib.closing(Slab(handle, worker_bus_id)) as opened:
                call = Call(library, n_tokens, DType.F16)
                synchronize(library)
                call.enqueue(opened, None, AT, 1)
                opened.wait(AT, GIVEN, 1)
                found = opened.mover.fetch(AT.hidden_states, call.hidden.nbytes)
                np.testing.assert_array_equal(found, call.hidden.reshape(-1).view(np.uint8))
                opened.mover.put(AT.out, call.output)
                opened.set_done(AT, 1)
                opened.wait(AT, TAKEN, 1)
                np.testing.assert_array_equal(to_host(library, call.made), call.output)


def test_the_callers_device_stays_current(opened: Slab) -> None:
    """Of an engine that uses several."""
    import cupy

    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU")
    call = Call(cupy, 3, DType.F32)
    synchronize(cupy)
    with cupy.cuda.Device(1):
        opened.set_done(AT, 1)
        call.enqueue(opened, own_stream_of(0), AT, 1)
        assert cupy.cuda.runtime.getDevice() == 1
        with contextlib.closing(Slab()):
            assert cupy.cuda.runtime.getDevice() == 1
        assert cupy.cuda.runtime.getDevice() == 1
    opened.wait(AT, TAKEN, 1)


def own_stream_of(device: int) -> Any:
    """CuPy's, of that GPU."""
    import cupy

    with cupy.cuda.Device(device):
        return own_stream(cupy)
