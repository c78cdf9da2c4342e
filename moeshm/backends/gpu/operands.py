"""The arrays of a call, in the host's memory or in the device's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...dtypes import Array, DType
from ...errors import InvalidCall

#: By their names there, what arrays may hold; int32 is no format of values.
ROWS = {"<f4": DType.F32, "<f2": DType.F16, "<u2": DType.BF16}
WEIGHTS = {"<f4": DType.F32}
IDS = {"<i4": DType.F32}
#: What kernels load at once.
_ALIGNMENT = 16


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


Operand = Array | DeviceArray


def locate(name: str, array: Any, formats: Mapping[str, DType]) -> Operand:
    """The array, as it is if it is NumPy's, else where it is in device memory.

    `array`: anything with `__cuda_array_interface__`, used in place. InvalidCall unless it is
    contiguous, aligned, and of one of the formats.
    """
    interface: dict[str, Any] | None = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        host: Array = array
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
    if formats is ROWS and address % _ALIGNMENT:
        raise InvalidCall(
            f"{name} starts at {address:#x} in device memory; pass an array that starts at a "
            f"multiple of {_ALIGNMENT}"
        )
    return found
