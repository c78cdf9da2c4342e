"""The three number formats of weights and activations, and exact conversions between them.

NumPy has no bfloat16. Inside moeshm an array of bfloat16 is an array of uint16 that holds the
bit patterns; uint16 means nothing else here.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import numpy.typing as npt

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
    if array.dtype == np.float32:
        if out is None:
            return array
        np.copyto(out, array)
        return out
    dtype = dtype_of(array)
    if out is None:
        out = np.empty(array.shape, np.float32)
    if dtype is DType.BF16:
        # A bfloat16 is the upper half of a float32.
        bits = out.view(np.uint32)
        np.copyto(bits, array)
        np.left_shift(bits, _SIXTEEN, out=bits)
    elif array.size < _VECTOR_MIN or not _widen_finite_f16(array, out):
        np.copyto(out, array)
    return out


def _widen_finite_f16(array: Array, out: FloatArray) -> bool:
    """Widen through integer registers, which NumPy vectorises; False if a value is not finite.

    Shifted right by 3 with its sign, a half in the upper 16 bits is a float32 whose exponent
    is 112 too small, subnormals included, so that one exact multiplication finishes it.
    """
    stored = array.view(np.uint16)
    if np.bitwise_and(stored, _F16_EXPONENT).max() == _F16_EXPONENT:
        return False
    bits = out.view(np.uint32)
    np.copyto(bits, stored)
    np.left_shift(bits, _SIXTEEN, out=bits)
    signed = out.view(np.int32)
    np.right_shift(signed, np.int32(3), out=signed)
    np.bitwise_and(bits, _SIGN_AND_13_UP, out=bits)
    np.multiply(out, F16_RESCALE, out=out)
    return True


def narrow(values: FloatArray, dtype: DType, out: Array | None = None) -> Array:
    """float32 values in the given format, rounded to nearest, ties to even; NaN stays NaN.

    `out`: an array of the same shape and of `dtype.numpy`; it is returned. Without it, F32
    gives `values` back as they are. f16 overflows to infinity without a warning.
    """
    if dtype is DType.F32:
        if out is None:
            return values
        np.copyto(out, values)
        return out
    if out is None:
        out = np.empty(values.shape, dtype.numpy)
    if dtype is DType.BF16:
        _narrow_to_bf16(np.ascontiguousarray(values).reshape(values.shape), out)
    elif values.size < _VECTOR_MIN:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            np.copyto(out, values, casting="same_kind")
    else:
        _narrow_to_f16(np.ascontiguousarray(values), out)
    return out


def _narrow_to_bf16(values: FloatArray, out: Array) -> None:
    bits = values.view(np.uint32)
    rounded = np.right_shift(bits, _SIXTEEN, out=np.empty(bits.shape, np.uint32))
    np.bitwise_and(rounded, _ONE, out=rounded)
    np.add(rounded, np.uint32(0x7FFF), out=rounded)
    np.add(rounded, bits, out=rounded)
    np.right_shift(rounded, _SIXTEEN, out=rounded)
    np.copyto(out, rounded, casting="unsafe")
    is_nan = np.isnan(values)
    if is_nan.any():
        # Rounding may carry a NaN's mantissa over into infinity or zero: keep sign, make quiet.
        out[is_nan] = (bits[is_nan] >> _SIXTEEN) | 0x40


def _narrow_to_f16(values: FloatArray, out: Array) -> None:
    """Round the normal range through integers, which NumPy vectorises, and the rest slowly."""
    bits = values.view(np.uint32)
    half = np.bitwise_and(bits, np.uint32(0x7FFFFFFF))
    # Below 2^-14 (f16 subnormals and zero) or from 2^16 up (infinity, NaN).
    is_special = (half - _F16_MIN_NORMAL) >= _F16_NORMAL_SPAN
    odd = np.right_shift(half, np.uint32(13))
    np.bitwise_and(odd, _ONE, out=odd)
    np.add(half, odd, out=half)
    np.add(half, _F16_REBIAS_AND_ROUND, out=half)
    np.right_shift(half, np.uint32(13), out=half)
    sign = np.right_shift(bits, _SIXTEEN, out=odd)
    np.bitwise_and(sign, np.uint32(0x8000), out=sign)
    np.bitwise_or(half, sign, out=half)
    np.copyto(out.view(np.uint16), half, casting="unsafe")
    if is_special.any():
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            out[is_special] = values[is_special].astype(np.float16)


#: Fewer elements than this convert faster by NumPy's own scalar loop than by several ufuncs.
_VECTOR_MIN = 4096
_ONE = np.uint32(1)
_SIXTEEN = np.uint32(16)
_F16_EXPONENT = np.uint16(0x7C00)
#: Exponent bias 127 to 15, plus just under half a unit in the last place, modulo 2^32.
_F16_REBIAS_AND_ROUND = np.uint32((1 << 32) - ((127 - 15) << 23) + 0xFFF)
_F16_MIN_NORMAL = np.uint32((127 - 14) << 23)
_F16_NORMAL_SPAN = np.uint32(30 << 23)
_SIGN_AND_13_UP = np.uint32(0x8FFFE000)
#: What a float16's bits, moved into float32 position, must be multiplied by.
F16_RESCALE = np.float32(2.0**112)
