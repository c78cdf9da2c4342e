"""What an offload does with arrays on the engine's GPU, by the library that they are of.

A lane is that library bound to one stream. CuPy and torch gather, add and convert; there is no
kernel of ours in it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..device_arrays import stream_of, torch_stream
from ..dtypes import Array, DType
from ..engine_device import EngineDevice
from ..errors import DeviceError, InvalidCall

Rows = npt.NDArray[np.int64]


class Term(NamedTuple):
    """A part of a sum, on the GPU."""

    #: Which rows these are, as `put` made them, each once; None for all.
    rows: Any
    #: [n_rows, hidden_size], in any of the formats.
    values: Any
    #: They are in memory of another lane's, which has it back in the end.
    is_lent: bool = False


class Lane(Protocol):
    """Arrays of one library on one GPU, in the order of one stream."""

    #: The driver's handle.
    stream: int

    def is_capturing(self) -> bool:
        """Whether what is enqueued is recorded into a graph instead of done."""
        ...

    def fetch(self, array: Any, out: Array | None = None) -> Array:
        """A copy in the host's memory, bfloat16 as uint16; waits for this stream alone."""
        ...

    def put(self, array: Array, dtype: DType | None = None) -> Any:
        """A copy on the GPU. `dtype`: what the stored values are, None for ids."""
        ...

    def take(self, array: Any, rows: Any) -> Any:
        """Those rows of it, as `put` made their numbers."""
        ...

    def empty(self, shape: tuple[int, int], dtype: DType) -> Any:
        """To be written."""
        ...

    def address_of(self, array: Any) -> int:
        """Where it is."""
        ...

    def add_up(self, shape: tuple[int, int], dtype: DType, terms: Sequence[Term]) -> Any:
        """The terms' sum, added in float32 in their order, in `dtype`; in no memory of a lane's
        that lent it."""
        ...

    def beside(self) -> Lane:
        """On a stream of its own, which waits for no other."""
        ...

    def follow(self, other: Lane) -> None:
        """What is enqueued here from now on comes after what is enqueued there by now."""
        ...

    def wait(self) -> None:
        """Until all that is enqueued here is done."""
        ...

    def holds(self, array: Any) -> bool:
        """Whether it is of this library."""
        ...


def lane_of(hidden_states: Any, stream: Any, engine: EngineDevice) -> Lane:
    """The library of hidden_states, on that stream; None for the library's current one.

    InvalidCall: it is neither CuPy nor torch, or that is no stream of this GPU.
    """
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(hidden_states, torch.Tensor):
        return TorchLane(torch, engine.number, stream_of(stream, hidden_states, engine.number))
    if cupy is not None and isinstance(hidden_states, cupy.ndarray):
        return CupyLane(cupy, engine.number, stream_of(stream, hidden_states, engine.number))
    raise InvalidCall(
        f"hidden_states is {type(hidden_states).__name__}, whose rows moeshm cannot take; pass an "
        "array of CuPy's or torch's"
    )


def open_gpu(engine: EngineDevice) -> tuple[Lane, str]:
    """A lane of CuPy's on a stream of its own, and the GPU's place on the PCI bus, if it is known.

    DeviceError: the GPU is not there.
    """
    from ..backends.gpu.cupy_device import open_device

    # Says what is missing.
    device = open_device(engine.name)
    import cupy

    return _new_cupy_lane(cupy, engine.number), device.features.bus_id


class CupyLane:
    """CuPy's, where bfloat16 is uint16. `cupy`: the module."""

    def __init__(self, cupy: Any, index: int, stream: int, owner: Any = None) -> None:
        self.stream = stream
        self._cupy = cupy
        self._index = index
        self._stream = owner
        if owner is None:
            # It is taken for one of the current device.
            with cupy.cuda.Device(index):
                self._stream = cupy.cuda.Stream.from_external(_Handle(stream))

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        with self._cupy.cuda.Device(self._index), self._stream:
            yield

    def is_capturing(self) -> bool:
        """As `Lane.is_capturing`."""
        try:
            return bool(self._cupy.cuda.runtime.streamIsCapturing(self.stream))
        except RuntimeError:
            # The default stream, while another one is captured.
            return True

    def fetch(self, array: Any, out: Array | None = None) -> Array:
        """As `Lane.fetch`."""
        with self._current():
            fetched: Array = array.get(out=out)
        return fetched

    def put(self, array: Array, dtype: DType | None = None) -> Any:  # noqa: ARG002
        """As `Lane.put`."""
        with self._current():
            return self._cupy.asarray(array)

    def take(self, array: Any, rows: Any) -> Any:
        """As `Lane.take`."""
        with self._current():
            return array[rows]

    def empty(self, shape: tuple[int, int], dtype: DType) -> Any:
        """As `Lane.empty`."""
        with self._current():
            return self._cupy.empty(shape, dtype.numpy)

    def address_of(self, array: Any) -> int:
        """As `Lane.address_of`."""
        return int(array.data.ptr)

    def add_up(self, shape: tuple[int, int], dtype: DType, terms: Sequence[Term]) -> Any:
        """As `Lane.add_up`."""
        cupy = self._cupy
        with self._current():
            if len(terms) == 1 and terms[0].rows is None:
                values = terms[0].values
                made = self._as(values, dtype)
                return made.copy() if made is values and terms[0].is_lent else made
            total = cupy.zeros(shape, cupy.float32)
            for rows, values, _ in terms:
                total[slice(None) if rows is None else rows] += self._widened(values)
            return self._as(total, dtype)

    def beside(self) -> Lane:
        """As `Lane.beside`."""
        return _new_cupy_lane(self._cupy, self._index)

    def follow(self, other: Lane) -> None:
        """As `Lane.follow`."""
        assert isinstance(other, CupyLane)
        with self._current():
            self._stream.wait_event(other._stream.record())

    def wait(self) -> None:
        """As `Lane.wait`."""
        self._stream.synchronize()

    def holds(self, array: Any) -> bool:
        """As `Lane.holds`."""
        return isinstance(array, self._cupy.ndarray)

    def _widened(self, values: Any) -> Any:
        cupy = self._cupy
        if values.dtype != cupy.uint16:
            return values.astype(cupy.float32, copy=False)
        return (values.astype(cupy.uint32) << 16).view(cupy.float32)

    def _as(self, values: Any, dtype: DType) -> Any:
        """Rounded to nearest, ties to even; NaN stays NaN."""
        cupy = self._cupy
        if values.dtype == dtype.numpy:
            return values
        values = self._widened(values)
        if dtype is not DType.BF16:
            return values.astype(dtype.numpy, copy=False)
        bits = values.view(cupy.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        return cupy.where(cupy.isnan(values), quiet, rounded).astype(cupy.uint16)


class TorchLane:
    """torch's. `torch`: the module."""

    def __init__(self, torch: Any, index: int, stream: int, owner: Any = None) -> None:
        self.stream = stream
        self._torch = torch
        self._device = torch.device("cuda", index)
        self._stream = owner or torch_stream(torch, stream, self._device)
        self._formats = {
            DType.F32: torch.float32,
            DType.F16: torch.float16,
            DType.BF16: torch.bfloat16,
        }

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        # Not recorded for a backward pass, of which workers know nothing.
        with self._torch.no_grad(), self._torch.cuda.stream(self._stream):
            yield

    def is_capturing(self) -> bool:
        """As `Lane.is_capturing`."""
        with self._current():
            return bool(self._torch.cuda.is_current_stream_capturing())

    def fetch(self, array: Any, out: Array | None = None) -> Array:
        """As `Lane.fetch`."""
        torch = self._torch
        is_bf16 = array.dtype is torch.bfloat16
        with self._current():
            stored = array.detach().view(torch.int16) if is_bf16 else array.detach()
            if out is None:
                fetched: Array = stored.cpu().numpy()
                return fetched.view(np.uint16) if is_bf16 else fetched
            # Returns when it is done, as `out` is not pinned.
            torch.from_numpy(out.view(np.int16) if is_bf16 else out).copy_(stored)
        return out

    def put(self, array: Array, dtype: DType | None = None) -> Any:
        """As `Lane.put`."""
        torch = self._torch
        is_bf16 = dtype is DType.BF16
        with self._current():
            # The driver has taken the array when this returns, as it is not pinned either.
            moved = torch.from_numpy(array.view(np.int16) if is_bf16 else array).to(
                self._device, non_blocking=True
            )
        return moved.view(torch.bfloat16) if is_bf16 else moved

    def take(self, array: Any, rows: Any) -> Any:
        """As `Lane.take`."""
        with self._current():
            return array.detach().index_select(0, rows)

    def empty(self, shape: tuple[int, int], dtype: DType) -> Any:
        """As `Lane.empty`."""
        with self._current():
            return self._torch.empty(shape, dtype=self._formats[dtype], device=self._device)

    def address_of(self, array: Any) -> int:
        """As `Lane.address_of`."""
        return int(array.data_ptr())

    def add_up(self, shape: tuple[int, int], dtype: DType, terms: Sequence[Term]) -> Any:
        """As `Lane.add_up`."""
        torch = self._torch
        with self._current():
            if len(terms) == 1 and terms[0].rows is None:
                values = terms[0].values
                made = values.to(self._formats[dtype])
                return made.clone() if made is values and terms[0].is_lent else made
            total = torch.zeros(shape, dtype=torch.float32, device=self._device)
            for rows, values, _ in terms:
                if rows is None:
                    total += values
                else:
                    total.index_add_(0, rows, values.to(torch.float32))
            return total.to(self._formats[dtype])

    def beside(self) -> Lane:
        """As `Lane.beside`."""
        made = self._torch.cuda.Stream(self._device)
        return TorchLane(self._torch, self._device.index, made.cuda_stream, made)

    def follow(self, other: Lane) -> None:
        """As `Lane.follow`."""
        assert isinstance(other, TorchLane)
        self._stream.wait_stream(other._stream)

    def wait(self) -> None:
        """As `Lane.wait`."""
        self._stream.synchronize()

    def holds(self, array: Any) -> bool:
        """As `Lane.holds`."""
        return isinstance(array, self._torch.Tensor)


def _new_cupy_lane(cupy: Any, index: int) -> CupyLane:
    try:
        with cupy.cuda.Device(index):
            made = cupy.cuda.Stream(non_blocking=True)
    except RuntimeError as error:
        raise DeviceError(f"GPU {index}: {error}") from error
    return CupyLane(cupy, index, made.ptr, made)


class _Handle:
    """A stream that is known by its handle, as CuPy takes those of others."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        # The protocol's version.
        return 0, self._stream
