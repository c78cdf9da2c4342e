"""Arrays of a library that is made up, whose type has DLPack's functions in C: nothing is there.

They have `__cuda_array_interface__` as well, which is the way that Python asks.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

CUDA = 2
READ_ONLY, COPIED = 1, 2
#: By kinds as NumPy writes them, DLPack's codes; "bf" is bfloat16.
_CODES = {"i": 0, "u": 1, "f": 2, "b": 4}
_CAPSULE = b"dlpack_exchange_api"


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint32), ("minor", ctypes.c_uint32))


class _ValueType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("n_dimensions", ctypes.c_int32),
        ("dtype", _ValueType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("version", _Version),
        ("context", ctypes.c_void_p),
        ("free", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


class Exchange(ctypes.Structure):
    """DLPackExchangeAPI. A field that is 0 is NULL."""

    _fields_ = (
        ("version", _Version),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("export", ctypes.c_void_p),
        ("import_", ctypes.c_void_p),
        ("look_at", ctypes.c_void_p),
        ("current_stream", ctypes.c_void_p),
    )


class Array:
    """An array of `library`, whose strides are bytes; contiguous if they are None."""

    library: Library
    #: What stands for the library's functions.
    __dlpack_c_exchange_api__: Any

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        kind: str,
        device: int = 0,
        strides: tuple[int, ...] | None = None,
        is_read_only: bool = False,
        device_type: int = CUDA,
        lanes: int = 1,
        flags: int = 0,
        byte_offset: int = 0,
        has_strides: bool = True,
    ) -> None:
        self.shape = shape
        self.device = SimpleNamespace(id=device)
        self.flags = flags | (READ_ONLY if is_read_only else 0)
        itemsize = 2 if kind == "bf" else int(kind[1:])
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<u2" if kind == "bf" else f"<{kind}",
            "data": (address, is_read_only),
            "strides": strides,
            "version": 3,
        }
        self._lengths = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = (ctypes.c_int64 * len(shape))()
        expected = 1
        for place in reversed(range(len(shape))):
            self._strides[place] = strides[place] // itemsize if strides else expected
            expected *= shape[place]
        self.tensor = _Tensor(
            (address - byte_offset) or None,
            device_type,
            device,
            len(shape),
            _ValueType(_CODES[kind[0]], 8 * itemsize, lanes),
            self._lengths,
            self._strides if has_strides else None,
            byte_offset,
        )

    def __bool__(self) -> bool:
        """For `Library.fail`."""
        raise self.library.error


class Library:
    """Its functions, and what was called: `type` is a type of arrays that has them.

    `changes`: of fields of the functions' table.
    """

    def __init__(self, **changes: Any) -> None:
        #: Handle of the stream that is current, and what `current_stream` returns.
        self.stream, self.stream_status = 4711, 0
        self.n_looked = self.n_exported = self.n_freed = 0
        self.error: BaseException = ValueError("no array of that kind")
        self._exported: dict[int, _ManagedTensor] = {}
        void, i32 = ctypes.c_void_p, ctypes.c_int32
        self._functions = {
            "export": ctypes.PYFUNCTYPE(i32, void, ctypes.POINTER(void))(self._export),
            "look_at": ctypes.PYFUNCTYPE(i32, void, ctypes.POINTER(_Tensor))(self._look_at),
            "current_stream": ctypes.PYFUNCTYPE(i32, i32, i32, ctypes.POINTER(void))(
                self._current_stream
            ),
        }
        self._free = ctypes.PYFUNCTYPE(None, void)(self._note_freed)
        addresses = {name: _address(function) for name, function in self._functions.items()}
        self.exchange = Exchange(version=_Version(1, 3), **{**addresses, **changes})
        self.type: type[Array] = type("Array", (Array,), {"library": self})
        self.type.__dlpack_c_exchange_api__ = self.capsule()

    def capsule(self, name: bytes = _CAPSULE) -> Any:
        """It holds the functions."""
        new, void = ctypes.pythonapi.PyCapsule_New, ctypes.c_void_p
        new.restype, new.argtypes = ctypes.py_object, (void, ctypes.c_char_p, void)
        # The capsule has only a pointer to its name.
        self._name = name
        return new(ctypes.addressof(self.exchange), name, None)

    def fail(self, function: str, error: BaseException) -> None:
        """From now on, it raises that when it is told of an array."""
        self.error = error
        # Of CPython's functions, one that returns -1 with an exception that a test can choose.
        setattr(self.exchange, function, _address(ctypes.pythonapi.PyObject_IsTrue))

    def _look_at(self, array: int, found: Any) -> int:
        self.n_looked += 1
        found[0] = _object(array).tensor
        return 0

    def _export(self, array: int, made: Any) -> int:
        self.n_exported += 1
        of_it = _object(array)
        tensor = _ManagedTensor(_Version(1, 3), None, _address(self._free), of_it.flags)
        tensor.tensor = of_it.tensor
        self._exported[ctypes.addressof(tensor)] = tensor
        made[0] = ctypes.addressof(tensor)
        return 0

    def _note_freed(self, tensor: int) -> None:
        del self._exported[tensor]
        self.n_freed += 1

    def _current_stream(self, device_type: int, device: int, stream: Any) -> int:
        stream[0] = self.stream + device
        return self.stream_status if device_type == CUDA else -1


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _object(address: int) -> Any:
    return ctypes.cast(address, ctypes.py_object).value
