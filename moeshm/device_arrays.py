"""What callers hand over in a GPU's memory: checked, and located, without asking the GPU."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import numpy as np

from ._device_arrays import look
from .dtypes import DType
from .errors import InvalidCall
from .layers import LayerInfo

#: What kernels copy at once: rows have a multiple of so many bytes, and the first starts at one.
ALIGNMENT = 16
#: Of values, what rows have a multiple of: so many float16 are as long as that, and kernels take no
#: other rows of float32 either.
ROW_VALUES = 8
#: As torch names them, and as `__cuda_array_interface__` does, which has no bfloat16.
_FORMATS = {
    "torch.float32": DType.F32,
    "torch.float16": DType.F16,
    "torch.bfloat16": DType.BF16,
    "<f4": DType.F32,
    "<f2": DType.F16,
    "<u2": DType.BF16,
}
#: By vendor, DLPack's number for memory of its GPUs.
_DEVICE_TYPES = {"cuda": 2, "hip": 10}
#: Bytes of an id.
_IDS = {"torch.int32": 4, "torch.int64": 8, "<i4": 4, "<i8": 8}


class DeviceInputs(msgspec.Struct, frozen=True, gc=False):
    """Checked, contiguous inputs of one call, by their addresses in a GPU's memory."""

    #: [n_tokens, hidden_size] in `dtype`; the address and a row's bytes are multiples of 16.
    hidden_states: int
    #: [n_tokens, top_k]; ids are what the caller's are, and were not looked at.
    topk_ids: int
    topk_weights: int
    n_tokens: int
    hidden_size: int
    top_k: int
    dtype: DType
    #: 4 or 8.
    ids_itemsize: int
    weights_dtype: DType
    #: They keep the memory alive.
    owners: tuple[Any, Any, Any]
    #: None where the library of hidden_states does not say.
    device_index: int | None = None

    @property
    def n_bytes(self) -> int:
        """Of hidden_states, and of the output."""
        return self.n_tokens * self.hidden_size * self.dtype.itemsize

    def rows(self, first: int, end: int) -> DeviceInputs:
        """Some tokens of it."""
        n_pairs = first * self.top_k
        return msgspec.structs.replace(
            self,
            hidden_states=self.hidden_states + first * self.hidden_size * self.dtype.itemsize,
            topk_ids=self.topk_ids + n_pairs * self.ids_itemsize,
            topk_weights=self.topk_weights + n_pairs * self.weights_dtype.itemsize,
            n_tokens=end - first,
        )


class _Located(msgspec.Struct, frozen=True, gc=False):
    """An array, by what its library says of it."""

    address: int
    shape: tuple[int, ...]
    #: The library's name for it.
    dtype: str
    is_contiguous: bool
    is_writable: bool
    #: None where the library does not say.
    device_index: int | None


def is_device_array(values: Any) -> bool:
    """Whether these are in a GPU's memory."""
    if type(values) is np.ndarray:
        return False
    if _is_tensor(values):
        # Of ROCm's, too.
        return bool(values.is_cuda)
    # CuPy makes its arrays' interface each time that it is asked for.
    return _is_cupy(values) or hasattr(values, "__cuda_array_interface__")


def check_call(
    layer: int,
    info: LayerInfo,
    hidden_states: Any,
    topk_ids: Any,
    topk_weights: Any,
    out: Any,
    stream: Any,
    vendor: str,
    device_index: int,
) -> tuple[int, DeviceInputs, Any, int, int]:
    """The layer, a call's inputs, the output and its address, and the stream's handle.

    As of `check_device`, `make_device_output` and `stream_of`, in one pass where that goes.
    """
    seen = look(
        hidden_states, topk_ids, topk_weights, out, stream, info.hidden_size, info.top_k,
        _DEVICE_TYPES[vendor], device_index,
    )  # fmt: skip
    if seen is None:
        inputs = check_device(layer, info, hidden_states, topk_ids, topk_weights, device_index)
        handle = stream_of(stream, hidden_states, device_index)
        return layer, inputs, *make_device_output(inputs, hidden_states, out, handle), handle
    found, address, known, is_current = seen
    inputs = DeviceInputs(*found)
    handle = stream_of(stream, hidden_states, device_index) if known is None else known
    if address is None:
        made_on = None if is_current else handle
        out, address = make_device_output(inputs, hidden_states, None, made_on)
    return layer, inputs, out, address, handle


def check_device(
    layer: int, info: LayerInfo, hidden_states: Any, topk_ids: Any, topk_weights: Any,
    device_index: int,
) -> DeviceInputs:  # fmt: skip
    """The inputs of a call, all of them on that GPU.

    hidden_states [n_tokens, hidden_size] float32, float16 or bfloat16 (CuPy's as uint16), topk_ids
    [n_tokens, 1..top_k] int32 or int64, topk_weights like the ids, in any format of hidden_states.
    InvalidCall names what is wrong, what is allowed, and the remedy.
    """
    hidden = _locate("hidden_states", hidden_states, device_index)
    ids = _locate("topk_ids", topk_ids, device_index)
    weights = _locate("topk_weights", topk_weights, device_index)
    dtype, weights_dtype = _format("hidden_states", hidden), _format("topk_weights", weights)
    ids_itemsize = _IDS.get(ids.dtype, 0)
    if not ids_itemsize:
        raise InvalidCall(f"topk_ids has dtype {ids.dtype}; pass int32 or int64")
    _check_shapes(layer, info, hidden.shape, ids.shape, weights.shape)
    _check_contiguous("hidden_states", hidden, ALIGNMENT)
    _check_contiguous("topk_ids", ids, ids_itemsize)
    _check_contiguous("topk_weights", weights, weights_dtype.itemsize)
    if info.hidden_size % ROW_VALUES:
        raise InvalidCall(
            f"hidden_size={info.hidden_size}; on a GPU it must be a multiple of {ROW_VALUES}: pass "
            "arrays in the host's memory"
        )
    return DeviceInputs(
        hidden.address, ids.address, weights.address, ids.shape[0], info.hidden_size, ids.shape[1],
        dtype, ids_itemsize, weights_dtype, (hidden_states, topk_ids, topk_weights),
        hidden.device_index,
    )  # fmt: skip


def make_device_output(
    inputs: DeviceInputs, hidden_states: Any, out: Any, stream: int | None = None
) -> tuple[Any, int]:
    """What the caller gets, and the address that the result goes to.

    `out`, if not None, must be contiguous and like hidden_states, on the same GPU; InvalidCall.
    `stream`: the handle of the one that a new array is for, None for the library's current one.
    """
    if out is None:
        made = _empty_like(hidden_states, stream)
        return made, made.data_ptr() if _is_tensor(made) else made.data.ptr
    found = _locate("out", out, inputs.device_index)
    if (
        _FORMATS.get(found.dtype) is not inputs.dtype
        or found.shape != (inputs.n_tokens, inputs.hidden_size)
        or not found.is_writable
    ):
        like = _locate("hidden_states", hidden_states, None)
        what = "" if found.is_writable else "read-only "
        raise InvalidCall(
            f"out is {what}{found.dtype} {list(found.shape)}; pass a writable, contiguous "
            f"{like.dtype} {list(like.shape)}"
        )
    _check_contiguous("out", found, ALIGNMENT)
    return out, found.address


def stream_of(stream: Any, hidden_states: Any, device_index: int | None = None) -> int:
    """The driver's handle of a stream; InvalidCall if it is none, or another GPU's.

    `stream`: CuPy's, torch's, a handle, or None for the one that is current in the library of
    `hidden_states`, on their GPU. 0 is the default stream.
    """
    if stream is None:
        return _current_stream(hidden_states)
    index = getattr(getattr(stream, "device", None), "index", getattr(stream, "device_id", None))
    if index is not None and device_index not in (None, -1) and index not in (device_index, -1):
        raise InvalidCall(f"stream is of GPU {index}; pass one of GPU {device_index}")
    # torch's name for it, and CuPy's.
    for handle in (stream, getattr(stream, "cuda_stream", None), getattr(stream, "ptr", None)):
        if isinstance(handle, int) and handle >= 0 and handle is not True:
            return handle
    raise InvalidCall(
        f"stream is {stream!r}; pass a cupy.cuda.Stream, a torch.cuda.Stream, its handle, or None "
        "for the current one"
    )


def torch_stream(torch: Any, handle: int, device: Any) -> Any:
    """torch's name for the stream with that handle. `torch`: the module."""
    if handle == 0:
        # For that ExternalStream makes a new stream, of which the default one knows nothing.
        return torch.cuda.default_stream(device)
    return torch.cuda.ExternalStream(handle, device=device)


# --- checks -------------------------------------------------------------------------------


def _format(name: str, found: _Located) -> DType:
    dtype = _FORMATS.get(found.dtype)
    if dtype is None:
        raise InvalidCall(
            f"{name} has dtype {found.dtype}; pass float32, float16, or bfloat16 (of CuPy's arrays "
            "as uint16 bit patterns)"
        )
    return dtype


def _check_shapes(
    layer: int,
    info: LayerInfo,
    hidden: tuple[int, ...],
    ids: tuple[int, ...],
    weights: tuple[int, ...],
) -> None:
    if len(hidden) != 2 or hidden[1] != info.hidden_size:
        raise InvalidCall(
            f"hidden_states has shape {list(hidden)}; layer {layer} takes "
            f"[n_tokens, {info.hidden_size}]"
        )
    if len(ids) != 2 or ids[0] != hidden[0] or not 1 <= ids[1] <= info.top_k:
        raise InvalidCall(
            f"topk_ids has shape {list(ids)}; layer {layer} takes [{hidden[0]}, 1..{info.top_k}]: "
            "a row for each of hidden_states"
        )
    if weights != ids:
        raise InvalidCall(
            f"topk_weights has shape {list(weights)}, topk_ids {list(ids)}; pass one weight for "
            "each id"
        )


def _check_contiguous(name: str, found: _Located, alignment: int) -> None:
    if not found.is_contiguous:
        remedy = "a contiguous array" if name == "out" else f"{name}.contiguous() or a copy"
        raise InvalidCall(f"{name} {list(found.shape)} is not contiguous; pass {remedy}")
    if found.address % alignment:
        raise InvalidCall(
            f"{name} starts at {found.address:#x}; pass an array that starts at a multiple of "
            f"{alignment} bytes, as new ones do"
        )


# --- libraries: torch and CuPy are looked at only when the caller has imported them -----------


def _is_tensor(values: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


def _is_cupy(values: Any) -> bool:
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(values, cupy.ndarray)


def _locate(name: str, values: Any, device_index: int | None) -> _Located:
    """Where the array is; InvalidCall unless it is on that GPU, or on any if that is None."""
    if _is_tensor(values):
        found = _of_tensor(values) if values.is_cuda else None
    elif _is_cupy(values):
        found = _of_cupy(values)
    else:
        interface = getattr(values, "__cuda_array_interface__", None)
        found = None if interface is None else _of_interface(values, interface)
    if found is None:
        raise InvalidCall(
            f"{name} is {_describe(values)}, and other arrays of the call are on a GPU; pass all "
            "of them on that GPU, or all in the host's memory"
        )
    if found.device_index != device_index and None not in (found.device_index, device_index):
        raise InvalidCall(
            f"{name} is on GPU {found.device_index}; pass an array on GPU {device_index}"
        )
    return found


def _describe(values: Any) -> str:
    if _is_tensor(values):
        return f"a tensor on {values.device}"
    if isinstance(values, np.ndarray):
        return "an array in the host's memory"
    return f"{type(values).__name__}"


def _of_tensor(tensor: Any) -> _Located:
    return _Located(
        tensor.data_ptr(),
        tuple(tensor.shape),
        str(tensor.dtype),
        tensor.is_contiguous(),
        True,
        tensor.device.index,
    )


def _of_cupy(array: Any) -> _Located:
    return _Located(
        array.data.ptr,
        array.shape,
        array.dtype.str,
        array.flags.c_contiguous,
        True,
        array.device.id,
    )


def _of_interface(values: Any, interface: dict[str, Any]) -> _Located:
    shape, dtype = tuple(interface["shape"]), interface["typestr"]
    address, is_read_only = interface["data"]
    strides = interface.get("strides")
    return _Located(
        address,
        shape,
        dtype,
        strides is None or _is_contiguous(shape, tuple(strides), int(dtype[2:])),
        not is_read_only,
        # CuPy's; the interface itself does not say.
        getattr(getattr(values, "device", None), "id", None),
    )


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """In C order; strides along a length of 1 say nothing."""
    if 0 in shape:
        return True
    expected = itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _empty_like(values: Any, stream: int | None) -> Any:
    """On that stream, as libraries give out what was freed there, where its last use is known."""
    other = None if stream is None or stream == _current_stream(values) else stream
    if _is_tensor(values):
        torch = sys.modules["torch"]
        if other is None:
            return torch.empty_like(values)
        with torch.cuda.stream(torch_stream(torch, other, values.device)):
            return torch.empty_like(values)
    if _is_cupy(values):
        cupy = sys.modules["cupy"]
        # CuPy allocates on the current device, whichever the array is on.
        with values.device:
            if other is None:
                return cupy.empty_like(values)
            with cupy.cuda.Stream.from_external(_Handle(other)):
                return cupy.empty_like(values)
    raise InvalidCall(
        f"hidden_states is {type(values).__name__}, which moeshm cannot make; pass `out`, or an "
        "array of CuPy's or torch's"
    )


class _Handle:
    """A stream that is known by its handle, as CuPy takes those of others."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        # The protocol's version.
        return 0, self._stream


def _current_stream(values: Any) -> int:
    if _is_tensor(values):
        handle: int = sys.modules["torch"].cuda.current_stream(values.device).cuda_stream
    elif _is_cupy(values):
        handle = sys.modules["cupy"].cuda.get_current_stream(values.device.id).ptr
    else:
        raise InvalidCall(
            f"hidden_states is {type(values).__name__}, whose stream moeshm does not know; pass "
            "`stream`"
        )
    return handle
