"""Arrays that end where memory ends, so that reading past them is an error and not luck."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import TypeVar

import numpy as np
import numpy.typing as npt

_Scalar = TypeVar("_Scalar", bound=np.generic)

_PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
#: Address of the first byte to what is there, of every guarded array that lives.
_guarded: dict[int, tuple[int, str]] = {}


def guarded(array: npt.NDArray[_Scalar], alignment: int = 16) -> npt.NDArray[_Scalar]:
    """A copy of `array`, C-contiguous, that ends where an inaccessible page begins.

    It starts at a multiple of `alignment` bytes, so up to `alignment - 1` bytes may lie between.
    """
    page = mmap.PAGESIZE
    usable = (array.nbytes + page) // page * page
    pages = mmap.mmap(-1, usable + page)
    offset = usable - (array.nbytes + alignment - 1) // alignment * alignment
    copy = np.frombuffer(pages, array.dtype, array.size, offset).reshape(array.shape)
    copy[...] = array
    start = copy.ctypes.data
    if _libc.mprotect(start - offset + usable, page, _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    _guarded[start] = (array.nbytes, f"{array.dtype} array of shape {array.shape}")
    weakref.finalize(pages, _guarded.pop, start)
    return copy


def describe(address: int) -> str:
    """Which guarded array lies before or around `address`, or nothing."""
    near = [(address - start, *what) for start, what in _guarded.items()]
    for offset, nbytes, what in sorted(near):
        if 0 <= offset < nbytes + mmap.PAGESIZE:
            return f"byte {offset} of a {what}, which has {nbytes}"
    return "in no guarded array"
