"""The three number formats of weights and activations, and exact conversions between them.

NumPy has no bfloat16. Inside moeshm an array of bfloat16 is an array of uint16 that holds the
bit patterns; uint16 means nothing else here.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import numpy.typing as npt

from ._formats import convert

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]


class DType(enum.IntEnum):
    """A number format; the value is its code on the wire."""

    #: The NumPy dtype that stores it (uint16 bit patterns for bf16).
    numpy: np.dtype[Any]
    #: Bytes per element.
    itemsize: int

    def __new__(cls, code: int, storage: type[np.generic]) -> DType:
        member = int.__new__(cls, code)
        member._value_ = code
        member.numpy = np.dtype(storage)
        member.itemsize = member.numpy.itemsize
        return member

    F32 = 0, np.float32
    F16 = 1, np.float16
    BF16 = 2, np.uint16

    @classmethod
    def parse(cls, name: str) -> DType:
        """The format named `f32`, `f16` or `bf16`; ValueError names the choices."""
        try:
            return cls[name.upper()]
        except KeyError:
            raise ValueError(f"dtype {name!r}; choose f32, f16 or bf16") from None

    def __str__(self) -> str:
        return self.name.lower()


_OF_STORAGE: dict[np.dtype[Any], DType] = {dtype.numpy: dtype for dtype in DType}


def dtype_of(array: Array) -> DType:
    """The format that a stored array holds; TypeError for any other NumPy dtype."""
    try:
        return _OF_STORAGE[array.dtype]
    except KeyError:
        raise TypeError(
            f"dtype {array.dtype}; pass float32, float16, or bfloat16 as uint16 bit patterns"
        ) from None


def widen(array: Array, out: FloatArray | None = None) -> FloatArray:
    """The stored values as float32, exactly. float32 input comes back as it is if `out` is None.

    `out`: float32 of the same shape; it is returned. TypeError for any other stored dtype.
    """
    if out is None:
        if array.dtype == np.float32:
            return array
        dtype_of(array)
        out = np.empty(array.shape, np.float32)
    _convert(array, out)
    return out


def narrow(values: Array, dtype: DType, out: Array | None = None) -> Array:
    """float32 values in the given format, rounded to nearest, ties to even; NaN stays NaN.

    `out`: an array of the same shape and of `dtype.numpy`; it is returned, and the values may be in
    any format. Without it, F32 gives `values` back as they are. f16 overflows to infinity without a
    warning.
    """
    if out is None:
        if dtype is DType.F32:
            return values
        out = np.empty(values.shape, dtype.numpy)
    _convert(values, out)
    return out


def _convert(source: Array, target: Array) -> None:
    """As `convert`, for arrays of any strides."""
    if not (source.flags.c_contiguous and source.flags.aligned):
        source = source.copy()
    if target.flags.carray:
        convert(source, target)
        return
    dtype_of(source)
    values = np.empty(target.shape, target.dtype)
    convert(source, values)
    np.copyto(target, values)
