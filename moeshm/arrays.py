"""What callers hand over, as the arrays that travel: NumPy as it is, torch without a copy."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from . import protocol
from ._inputs import count_empty_rows
from .dtypes import Array, DType, FloatArray, dtype_of, narrow
from .errors import InvalidCall
from .layers import LayerInfo

_INT32 = np.dtype(np.int32)
_FLOAT32 = np.dtype(np.float32)


class Inputs(msgspec.Struct, frozen=True, gc=False):
    """Checked, contiguous inputs of one call."""

    #: [n_tokens, hidden_size], as DType stores it.
    hidden_states: Array
    #: Local ids, int32 [n_tokens, top_k].
    topk_ids: npt.NDArray[np.int32]
    topk_weights: npt.NDArray[np.float32]
    dtype: DType
    #: Rows without any expert.
    n_empty: int
    is_torch: bool


def check(
    layer: int, info: LayerInfo, hidden_states: Any, topk_ids: Any, topk_weights: Any,
    global_ids: bool,
) -> Inputs:  # fmt: skip
    """The inputs of a call; InvalidCall names what is wrong, what is allowed, and the remedy."""
    if not global_ids:
        ready = count_empty_rows(
            hidden_states, topk_ids, topk_weights, info.hidden_size, info.top_k, len(info.experts)
        )
        if ready is not None:
            dtype = dtype_of(hidden_states)
            return Inputs(hidden_states, topk_ids, topk_weights, dtype, ready, False)
    is_torch = type(hidden_states) is not np.ndarray and _is_tensor(hidden_states)
    hidden = _floats(hidden_states, "hidden_states")
    ids = _integers(topk_ids)
    weights = _floats(topk_weights, "topk_weights")
    if weights.dtype != _FLOAT32:
        weights = _as_float32(topk_weights, weights)
    if hidden.ndim != 2 or hidden.shape[1] != info.hidden_size:
        raise InvalidCall(
            f"hidden_states has shape {list(hidden.shape)}; layer {layer} takes "
            f"[n_tokens, {info.hidden_size}]"
        )
    if ids.ndim != 2 or len(ids) != len(hidden) or not 1 <= ids.shape[1] <= info.top_k:
        raise InvalidCall(
            f"topk_ids has shape {list(ids.shape)}; layer {layer} takes "
            f"[{len(hidden)}, 1..{info.top_k}]: a row for each of hidden_states"
        )
    if weights.shape != ids.shape:
        raise InvalidCall(
            f"topk_weights has shape {list(weights.shape)}, topk_ids {list(ids.shape)}; "
            "pass one weight for each id"
        )
    local, n_empty = protocol.check_ids(ids, layer, info, global_ids)
    return Inputs(hidden, local, weights, dtype_of(hidden), n_empty, is_torch)


def make_output(inputs: Inputs, out: Any) -> tuple[Any, Array]:
    """What the caller gets, and the array behind it that the result goes into.

    `out`, if not None, must be writable and contiguous and like hidden_states; InvalidCall.
    """
    like = inputs.hidden_states
    if out is None:
        array = np.empty(like.shape, like.dtype)
        return (_as_tensor(array, inputs.dtype) if inputs.is_torch else array), array
    if _is_tensor(out) and out.device.type != "cpu":
        raise InvalidCall(
            f"out is a tensor on {out.device}; pass one in CPU memory, and copy the result over"
        )
    # A tensor that is not contiguous would be copied, and its copy written.
    is_usable = not _is_tensor(out) or out.is_contiguous()
    array = _stored(out) if _is_tensor(out) else out
    if (
        not isinstance(array, np.ndarray)
        or array.shape != like.shape
        or array.dtype != like.dtype
        or not (is_usable and array.flags.carray)
    ):
        found = f"{getattr(array, 'dtype', type(out))} {list(getattr(array, 'shape', ()))}"
        raise InvalidCall(
            f"out is {found}; pass a writable, contiguous {like.dtype} {list(like.shape)}"
        )
    return out, array


def as_output(total: FloatArray, inputs: Inputs) -> Any:
    """A sum in float32, contiguous and the caller's own, as what its caller gets for `inputs`."""
    array = narrow(total, inputs.dtype)
    return _as_tensor(array, inputs.dtype) if inputs.is_torch else array


def as_array(values: Any) -> Array:
    """A result of `make_output` as the array behind it."""
    return _stored(values) if _is_tensor(values) else values


def _floats(values: Any, name: str) -> Array:
    if not isinstance(values, np.ndarray):
        if not _is_tensor(values):
            raise InvalidCall(f"{name} is {type(values).__name__}; pass a NumPy array or a tensor")
        values = _stored(values)
    try:
        dtype_of(values)
    except TypeError as error:
        raise InvalidCall(f"{name} has {error}") from None
    return _plain(values)


def _integers(ids: Any) -> npt.NDArray[np.int32]:
    if not isinstance(ids, np.ndarray):
        if not _is_tensor(ids):
            raise InvalidCall(f"topk_ids is {type(ids).__name__}; pass a NumPy array or a tensor")
        ids = _stored(ids)
    if ids.dtype != _INT32:
        if ids.dtype.kind not in "iu":
            raise InvalidCall(f"topk_ids has dtype {ids.dtype}; pass int32")
        narrow: npt.NDArray[np.int32] = ids.astype(np.int32, order="C")
        if not np.array_equal(narrow, ids):
            raise InvalidCall("topk_ids holds a number that int32 cannot")
        return narrow
    return _plain(ids)


def _plain(values: Array) -> Array:
    """The values in C order, and aligned, which a view of bytes need not be."""
    is_plain = values.flags.c_contiguous and values.flags.aligned
    return values if is_plain else values.copy()


def _as_float32(given: Any, stored: Array) -> Array:
    if stored.dtype == np.uint16:
        if not _is_tensor(given):
            raise InvalidCall("topk_weights has dtype uint16; pass float32")
        return _stored(given.float())
    return stored.astype(np.float32)


# --- torch, which is looked at only when the caller has imported it -----------------------


def _is_tensor(values: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(values, torch.Tensor)


def _stored(tensor: Any) -> Array:
    """The tensor's memory as an array, bfloat16 as uint16; a copy only if not contiguous."""
    torch = sys.modules["torch"]
    if tensor.device.type != "cpu":
        raise InvalidCall(f"a tensor on {tensor.device}; pass it as tensor.cpu()")
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        array: Array = tensor.view(torch.int16).numpy().view(np.uint16)
        return array
    try:
        stored: Array = tensor.numpy()
    except TypeError:
        raise InvalidCall(
            f"a tensor of {tensor.dtype}; pass float32, float16 or bfloat16, and integer ids"
        ) from None
    return stored


def _as_tensor(array: Array, dtype: DType) -> Any:
    torch: Any = sys.modules["torch"]
    if dtype is DType.BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
