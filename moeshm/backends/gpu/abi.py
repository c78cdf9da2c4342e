"""What kernels are called with: the structs of kernels/ffn.cuh, admit.cuh and resident.cu, field by
field."""

from __future__ import annotations

import ctypes


class Call(ctypes.Structure):
    """One call; addresses are the device's, 0 where a kernel does not use them."""

    _fields_ = (
        ("x", ctypes.c_uint64),
        ("ids", ctypes.c_uint64),
        ("weights", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("experts", ctypes.c_uint64),
        ("inner", ctypes.c_uint64),
        ("partial", ctypes.c_uint64),
        ("n_tokens", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("n_slots", ctypes.c_int32),
        ("x_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
    )


class Route(ctypes.Structure):
    """Where `route` puts the pairs of each expert."""

    _fields_ = (
        ("begin", ctypes.c_uint64),
        ("pairs", ctypes.c_uint64),
        ("n_tiles", ctypes.c_uint64),
        ("tiles", ctypes.c_uint64),
    )


class Asked(ctypes.Structure):
    """Ids, weights and activations as a client wrote them, and what ids stand for."""

    _fields_ = (
        ("ids", ctypes.c_uint64),
        ("weights", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("x", ctypes.c_uint64),
        ("n_pairs", ctypes.c_int32),
        ("n_ids", ctypes.c_int32),
        ("first_pair", ctypes.c_int32),
        ("x_dtype", ctypes.c_int32),
    )


class Admitted(ctypes.Structure):
    """Where `admit` puts them, checked, and where it tells of an id that is wrong."""

    _fields_ = (
        ("ids", ctypes.c_uint64),
        ("weights", ctypes.c_uint64),
        ("refused", ctypes.c_uint64),
        ("x", ctypes.c_uint64),
        ("n_values", ctypes.c_int64),
        ("x_dtype", ctypes.c_int32),
    )


#: Of `Command`: pairs of a single token that it has room for.
COMMAND_PAIRS = 16


class Command(ctypes.Structure):
    """What a resident kernel is asked for."""

    _fields_ = (
        ("call", Call),
        ("asked", Asked),
        ("admitted", Admitted),
        ("done", ctypes.c_uint64),
        ("done_value", ctypes.c_uint32),
        ("what", ctypes.c_uint32),
        ("launch", ctypes.c_uint32),
        ("number", ctypes.c_uint32),
        ("expert", ctypes.c_uint64 * COMMAND_PAIRS),
        ("weight", ctypes.c_float * COMMAND_PAIRS),
        ("slot", ctypes.c_int16 * COMMAND_PAIRS),
        ("padding", ctypes.c_uint32 * 20),
    )


class Resident(ctypes.Structure):
    """What a resident kernel is launched with."""

    _fields_ = (
        ("mailbox", ctypes.c_uint64),
        ("rooms", ctypes.c_uint64),
        ("idle_ns", ctypes.c_uint64),
        ("launch", ctypes.c_uint32),
    )


#: Of `Rooms` of resident.cu. It begins with the numbers of the next command and of the next round,
#: both 1 at first; all else is 0.
ROOMS_BYTES = 5 * 32 + 1024
