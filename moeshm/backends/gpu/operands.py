"""The arrays of a call: in the host's memory, in a part that is registered, or in the device's."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ...dtypes import Array, DType, dtype_of
from ...errors import InvalidCall

#: By their names there, what arrays may hold; int32 is no format of values.
ROWS = {"<f4": DType.F32, "<f2": DType.F16, "<u2": DType.BF16}
WEIGHTS = {"<f4": DType.F32}
IDS = {"<i4": DType.F32}
#: What kernels load at once.
ALIGNMENT = 16


class DeviceArray(NamedTuple):
    """A contiguous array in device memory."""

    address: int
    shape: tuple[int, ...]
    #: Of ids F32, which is as wide.
    dtype: DType
    #: Whose work fills it, as `Device.wait_for_stream` takes it; None when it is there.
    stream: int | None

    def rows(self, first: int, end: int) -> DeviceArray:
        """Some rows of it."""
        row_bytes = self.shape[1] * self.dtype.itemsize
        return self._replace(
            address=self.address + first * row_bytes, shape=(end - first, self.shape[1])
        )


class RegisteredArray(NamedTuple):
    """A contiguous array in registered memory, aligned as kernels take it."""

    array: Array
    #: The host's and the device's.
    address: int
    device_address: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.shape

    def rows(self, first: int, end: int) -> RegisteredArray:
        """Some rows of it."""
        rows = self.array[first:end]
        skipped = first * self.array.strides[0]
        return RegisteredArray(rows, self.address + skipped, self.device_address + skipped)


Operand = Array | RegisteredArray | DeviceArray


class Place(enum.IntEnum):
    """From where, or to where, an array travels."""

    #: The host copies it, by way of pinned memory.
    HOST = 0
    #: The device copies it, or kernels use it across the bus.
    REGISTERED = 1
    #: It is in the device's memory, and stays there.
    DEVICE = 2


def place_of(operand: Operand) -> Place:
    """What its type says."""
    if isinstance(operand, DeviceArray):
        return Place.DEVICE
    return Place.REGISTERED if isinstance(operand, RegisteredArray) else Place.HOST


def format_of(operand: Operand) -> DType:
    """Of rows, how their values are stored."""
    if isinstance(operand, DeviceArray):
        return operand.dtype
    return dtype_of(operand.array if isinstance(operand, RegisteredArray) else operand)


def rows_of(operand: Operand, first: int, end: int) -> Operand:
    """Some rows of it."""
    return operand[first:end] if isinstance(operand, np.ndarray) else operand.rows(first, end)


def locate(name: str, array: Any, formats: Mapping[str, DType]) -> Operand:
    """The array, as it is if it is NumPy's, else where it is in device memory.

    `array`: anything with `__cuda_array_interface__`, used in place. InvalidCall unless it is
    contiguous, aligned, and of one of the formats.
    """
    host: Array = array
    # What most are: to look for an attribute that is not there takes longer.
    if type(array) is np.ndarray:
        return host
    interface: dict[str, Any] | None = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        return host
    kind = interface["typestr"]
    if kind not in formats:
        raise InvalidCall(f"{name} is {kind} in device memory; pass {', '.join(formats)}")
    shape, (address, _) = tuple(interface["shape"]), interface["data"]
    # Interfaces before 3 know no streams: 1 is the default one.
    stream = interface.get("stream") if interface["version"] >= 3 else 1
    found = DeviceArray(address, shape, formats[kind], stream)
    itemsize = found.dtype.itemsize
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != (shape[1] * itemsize, itemsize):
        raise InvalidCall(f"{name} has strides {strides} in device memory; pass a contiguous array")
    if formats is ROWS and address % ALIGNMENT:
        raise InvalidCall(
            f"{name} starts at {address:#x} in device memory; pass an array that starts at a "
            f"multiple of {ALIGNMENT}"
        )
    return found
