"""What an offload asks of CuPy and of torch: both play on the host, as far as they are used."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moeshm.dtypes import Array, DType, narrow, widen
from moeshm.engine_device import EngineDevice
from moeshm.errors import InvalidCall
from moeshm.offload import gpu_lanes
from moeshm.offload.gpu_lanes import CupyLane, Lane, Term, TorchLane
from tests.engine_gpu import GpuArray

ENGINE = EngineDevice("cuda:0", "cuda", 0, "auto")
STREAM = 4711


class CupyArray(np.ndarray[Any, Any]):
    """NumPy's, with what only CuPy's has."""

    device: Any = SimpleNamespace(id=0)

    @property
    def data(self) -> Any:
        """Where it is."""
        return SimpleNamespace(ptr=self.ctypes.data)

    def get(self, out: Array | None = None) -> Array:
        """A copy."""
        found = np.empty(self.shape, self.dtype) if out is None else out
        found[...] = self
        return found


class Driver:
    """Streams of both, and what is done with them."""

    def __init__(self) -> None:
        #: Of the block that runs.
        self.current: list[int] = []
        #: By whom, and for whom; 0 by the host.
        self.waits: list[tuple[int, int]] = []
        self.is_capturing = False
        self.n_made = 0

    def stream(self, handle: int) -> Any:
        """One."""

        @contextlib.contextmanager
        def entered() -> Iterator[None]:
            self.current.append(handle)
            yield
            self.current.pop()

        made = SimpleNamespace(ptr=handle, cuda_stream=handle, entered=entered)
        made.record = lambda: handle
        made.wait_event = lambda event: self.waits.append((handle, event))
        made.wait_stream = lambda other: self.waits.append((handle, other.ptr))
        made.synchronize = lambda: self.waits.append((handle, 0))
        return made

    def new(self) -> Any:
        """One that nobody has."""
        self.n_made += 1
        return self.stream(STREAM + self.n_made)

    def capturing(self) -> bool:
        """Of the current stream."""
        assert self.current
        return self.is_capturing


class _Stream:
    """CuPy's, which is entered itself."""

    def __init__(self, driver: Driver, handle: int) -> None:
        self._stream = driver.stream(handle)
        self.ptr = handle
        self._blocks: list[Any] = []

    def __enter__(self) -> None:
        self._blocks.append(self._stream.entered())
        self._blocks[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._blocks.pop().__exit__(None, None, None)

    def record(self) -> Any:
        return self._stream.record()

    def wait_event(self, event: Any) -> None:
        self._stream.wait_event(event)

    def synchronize(self) -> None:
        self._stream.synchronize()


def make_cupy(driver: Driver) -> Any:
    def new(non_blocking: bool) -> _Stream:
        assert non_blocking
        return _Stream(driver, driver.new().ptr)

    class Stream:
        def __new__(cls, non_blocking: bool) -> Any:
            return new(non_blocking)

        @staticmethod
        def from_external(holder: Any) -> _Stream:
            version, handle = holder.__cuda_stream__()
            assert version == 0
            return _Stream(driver, handle)

    def on_stream(function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            assert driver.current, "not on the lane's stream"
            return np.asarray(function(*arguments, **named)).view(CupyArray)

        return call

    runtime = SimpleNamespace(streamIsCapturing=lambda _handle: driver.is_capturing)
    cuda = SimpleNamespace(
        Device=lambda _index: contextlib.nullcontext(), Stream=Stream, runtime=runtime
    )
    return SimpleNamespace(
        cuda=cuda,
        ndarray=CupyArray,
        asarray=on_stream(np.array),
        empty=on_stream(np.empty),
        zeros=on_stream(np.zeros),
        where=on_stream(np.where),
        isnan=np.isnan,
        float32=np.float32,
        uint16=np.uint16,
        uint32=np.uint32,
    )


class HostTorch:
    """torch, whose GPU is the host."""

    def __init__(self, driver: Driver) -> None:
        self._torch: Any = pytest.importorskip("torch")
        self.cuda = SimpleNamespace(
            # As torch's: what has no handle is a new stream.
            ExternalStream=lambda handle, device: driver.stream(handle) if handle else driver.new(),  # noqa: ARG005
            default_stream=lambda device: driver.stream(0),  # noqa: ARG005
            Stream=lambda _device: driver.new(),
            stream=lambda stream: stream.entered(),
            is_current_stream_capturing=driver.capturing,
        )

    def device(self, kind: str, index: int) -> Any:
        """The host."""
        assert (kind, index) == ("cuda", 0)
        return self._torch.device("cpu", 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


@pytest.fixture
def driver() -> Driver:
    """Of both."""
    return Driver()


@pytest.fixture(params=["cupy", "torch"])
def lane(request: pytest.FixtureRequest, driver: Driver) -> Lane:
    """Of each library."""
    if request.param == "cupy":
        return CupyLane(make_cupy(driver), 0, STREAM)
    return TorchLane(HostTorch(driver), 0, STREAM)


def draw(seed: int, shape: tuple[int, int], dtype: DType) -> Array:
    """Values that need rounding in any shorter format."""
    return narrow(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


@pytest.mark.parametrize("dtype", DType)
def test_there_and_back(lane: Lane, dtype: DType) -> None:
    values = draw(1, (5, 8), dtype)
    there = lane.put(values, dtype)
    np.testing.assert_array_equal(lane.fetch(there), values)
    out = np.zeros_like(values)
    assert lane.fetch(there, out) is out
    np.testing.assert_array_equal(out, values)
    made = lane.empty((3, 8), dtype)
    assert lane.fetch(made).dtype == dtype.numpy
    assert lane.address_of(made) % 8 == 0
    ids = np.arange(10, dtype=np.int32).reshape(5, 2)
    np.testing.assert_array_equal(lane.fetch(lane.put(ids)), ids)


@pytest.mark.parametrize("dtype", DType)
def test_rows(lane: Lane, dtype: DType) -> None:
    values, rows = draw(2, (6, 8), dtype), np.array([1, 2, 5], np.int64)
    taken = lane.take(lane.put(values, dtype), lane.put(rows))
    np.testing.assert_array_equal(lane.fetch(taken), values[rows])


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("part", DType)
def test_sums_are_the_host_s_to_the_bit(lane: Lane, dtype: DType, part: DType) -> None:
    shape, rows = (6, 8), np.array([0, 3, 4], np.int64)
    whole, some, hot = draw(3, shape, part), draw(4, (3, 8), part), draw(5, shape, DType.F32)
    expected = hot.copy()
    expected[rows] += widen(some)
    expected += widen(whole)
    terms = [
        Term(None, lane.put(hot, DType.F32)),
        Term(lane.put(rows), lane.put(some, part)),
        Term(None, lane.put(whole, part)),
    ]
    found = lane.fetch(lane.add_up(shape, dtype, terms))
    assert found.dtype == dtype.numpy
    np.testing.assert_array_equal(found, narrow(expected, dtype))
    # One term of all rows is the sum.
    found = lane.fetch(lane.add_up(shape, dtype, terms[:1]))
    np.testing.assert_array_equal(found, narrow(hot, dtype))
    found = lane.fetch(lane.add_up(shape, dtype, terms[1:2]))
    assert not widen(found)[[1, 2, 5]].any()
    np.testing.assert_array_equal(lane.fetch(lane.add_up(shape, dtype, [])), np.zeros(shape))


@pytest.mark.parametrize("dtype", DType)
def test_a_sum_is_in_no_memory_that_was_lent(lane: Lane, dtype: DType) -> None:
    values = draw(6, (4, 8), dtype)
    there = lane.put(values, dtype)
    for is_lent in (False, True):
        found = lane.add_up((4, 8), dtype, [Term(None, there, is_lent)])
        assert (lane.address_of(found) != lane.address_of(there)) == is_lent
        np.testing.assert_array_equal(lane.fetch(found), values)


def test_bfloat16_is_rounded_to_nearest(lane: Lane) -> None:
    """Halves to even, no NaN becomes another number, and what is too large infinity."""
    bits = np.array(
        [0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x80000000],
        np.uint32,
    )
    values = np.concatenate([bits.view(np.float32), [np.nan]]).astype(np.float32).reshape(1, 8)
    values.view(np.uint32)[0, 7] = 0x7F800001
    found = lane.fetch(lane.add_up((1, 8), DType.BF16, [Term(None, lane.put(values, DType.F32))]))
    expected = narrow(values, DType.BF16)
    np.testing.assert_array_equal(found[0, :7], expected[0, :7])
    assert np.isnan(widen(found)[0, 7])


def test_streams(lane: Lane, driver: Driver) -> None:
    assert lane.stream == STREAM
    assert not lane.is_capturing()
    driver.is_capturing = True
    assert lane.is_capturing()
    other = lane.beside()
    assert other.stream == STREAM + 1
    other.follow(lane)
    assert driver.waits == [(STREAM + 1, STREAM)]
    other.wait()
    assert driver.waits[1:] == [(STREAM + 1, 0)]
    assert not driver.current


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_the_default_stream_is_itself(driver: Driver, library: str) -> None:
    """What the caller enqueues there comes after what is enqueued here."""
    lane: Lane = (
        CupyLane(make_cupy(driver), 0, 0)
        if library == "cupy"
        else TorchLane(HostTorch(driver), 0, 0)
    )
    lane.wait()
    assert driver.waits == [(0, 0)]
    assert driver.n_made == 0


def test_a_gradient_is_not_recorded(driver: Driver) -> None:
    torch = HostTorch(driver)
    lane = TorchLane(torch, 0, STREAM)
    values = torch.ones((2, 8), requires_grad=True)
    assert not lane.take(values, lane.put(np.array([1], np.int64))).requires_grad
    rows = lane.put(np.array([0, 1], np.int64))
    assert not lane.add_up((2, 8), DType.F32, [Term(rows, values)]).requires_grad


def test_the_library_is_that_of_the_rows(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    cupy = make_cupy(driver)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    rows = np.zeros((1, 8), np.float32).view(CupyArray)
    found = gpu_lanes.lane_of(rows, STREAM, ENGINE)
    assert isinstance(found, CupyLane)
    assert found.stream == STREAM
    assert found.holds(rows)
    assert not found.holds(GpuArray(np.asarray(rows)))
    with pytest.raises(InvalidCall, match="stream is 'main'"):
        gpu_lanes.lane_of(rows, "main", ENGINE)
    with pytest.raises(InvalidCall, match="GpuArray, whose rows moeshm cannot take; pass an array"):
        gpu_lanes.lane_of(GpuArray(np.asarray(rows)), STREAM, ENGINE)
    torch = HostTorch(driver)
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = gpu_lanes.lane_of(torch.zeros((1, 8)), STREAM, ENGINE)
    assert isinstance(found, TorchLane)
    assert found.holds(torch.zeros(1))
    assert not found.holds(rows)
