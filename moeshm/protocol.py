"""The bytes of calls and replies; every check of what a peer sent in them is here.

They are little-endian: a header of 64 bytes, then arrays, and travel over any transport. A call is
`header, topk_ids, topk_weights, padding to 64, hidden_states`; a reply `header, rows`, or
`header, text` for an error. docs/protocol.md draws both. `orders.py` has the third record,
`handshake.py` what comes before all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from ._inputs import inspect_ids
from ._ring import Record, Reservation
from ._wire import MAX_COMPUTE_NS, fill_reply, read_plain_call, take_plain_reply
from .dtypes import Array, DType, narrow, widen
from .errors import CallError, DeadlineExceeded, InvalidCall, ProtocolError, WorkerFailed
from .layers import MAX_EXPERTS, LayerInfo

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: Of a call's header; a worker accepts this one and older ones.
CALL_VERSION = 1
MAX_TOKENS = 4096
#: Of a reply that says why there are no rows: the smallest ring holds it.
MAX_ERROR_BYTES = 4096
#: Of a reply that says what a view holds, and describes each layer.
MAX_ANSWER_BYTES = 64 << 10

_Decoded = TypeVar("_Decoded")
_layers_decoder = msgspec.msgpack.Decoder(dict[int, LayerInfo])
_encode = msgspec.msgpack.Encoder().encode


def decode(decoder: msgspec.msgpack.Decoder[_Decoded], data: bytes, what: str) -> _Decoded:
    """What the peer's msgpack says; ProtocolError when it is not what the decoder reads."""
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # Quoted and cut, as it may quote the peer: a log line must stay one.
        raise ProtocolError(f"no {what} ({str(error)!r:.200}), of {len(data)} bytes") from None


def check_layers(layers: Mapping[int, LayerInfo]) -> None:
    """ProtocolError names one that the worker cannot mean."""
    for number, info in layers.items():
        if not (
            0 <= number < 1 << 32
            and info.hidden_size < 1 << 32
            and info.top_k < 1 << 16
            and info.num_experts <= MAX_EXPERTS
        ):
            raise ProtocolError(f"layer {number} of the worker fits no call: {info.summary()}")


#: Types of the records that carry them.
CALL, REPLY, ORDER = 1, 2, 3
HEADER_BYTES = 64
# version, header bytes, layer, call id, deadline, tokens, hidden size, top k, id space, dtype,
# reply dtype, view
_CALL = struct.Struct("<HHIQqIIHBBB3xI20x")
# version, status, tokens, call id, time in the backend, hidden size, dtype
_REPLY = struct.Struct("<HHIQQIB35x")
_LOCAL, _GLOBAL = 0, 1
_OK, _INVALID, _FAILED, _EXPIRED, _HELD = range(5)
_DTYPES = {int(dtype): dtype for dtype in DType}
_PADDING = bytes(HEADER_BYTES)
_INT32 = np.dtype(np.int32)
_FLOAT32 = np.dtype(np.float32)


class Outgoing(Protocol):
    """Room for a record that is filled in place; `_ring.Reservation` is one."""

    def array(self, dtype: npt.DTypeLike, shape: tuple[int, ...], offset: int = 0) -> Array: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...


class Message(Protocol):
    """What a transport delivers; `_ring.Record` is one."""

    @property
    def type(self) -> int: ...
    def array(self, dtype: npt.DTypeLike, shape: tuple[int, ...], offset: int = 0) -> Array: ...
    def copy_to(self, destination: WriteableBuffer | Array, offset: int = 0) -> None: ...
    def release(self) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...


#: What a header holds after its version and length, as it came.
CallFields = tuple[int, ...]
#: Local id to the backend's slot, int32, and -1 in one place more: where the id -1 looks.
SlotTable = npt.NDArray[np.int32]
#: hidden_size, top_k, number of local experts, and their slots unless those are the local ids.
PlainShape = tuple[int, int, int, SlotTable | None]
_NO_TABLES: Mapping[int, SlotTable] = {}


class Call(msgspec.Struct, frozen=True, gc=False):
    """A checked call. `hidden_states` and `topk_weights` are views of the record, whose values
    the client can still change; `topk_ids` are the worker's own, and slots of its backend."""

    call_id: int
    layer: int
    hidden_states: Array
    topk_ids: npt.NDArray[np.int32]
    topk_weights: npt.NDArray[np.float32]
    #: Of the answer.
    dtype: DType
    #: CLOCK_MONOTONIC in ns; 0 for none.
    deadline_ns: int


class Reply(msgspec.Struct, frozen=True, gc=False):
    """A reply's header; when `error` and `layers` are None the rows follow at HEADER_BYTES."""

    call_id: int
    n_tokens: int
    hidden_size: int
    dtype: DType
    compute_ns: int
    error: CallError | None
    #: Of the view that is held now, without their experts: the answer to an order, not a call.
    layers: Mapping[int, LayerInfo] | None = None

    def copy_rows(self, record: Message, into: Array, dtype: DType) -> None:
        """Copy the rows out of the record, unless there is an error instead; ProtocolError when
        they are not of `into`'s shape and `dtype`, or it answers an order."""
        if self.error is None:
            self._check(into.shape, dtype)
            record.copy_to(into, HEADER_BYTES)

    def rows(self, record: Message, shape: tuple[int, int], dtype: DType) -> Array:
        """A view of the rows in the record, which the peer can still change; ProtocolError as
        `copy_rows`."""
        self._check(shape, dtype)
        return record.array(dtype.numpy, shape, HEADER_BYTES)

    def _check(self, shape: tuple[int, ...], dtype: DType) -> None:
        if self.layers is not None:
            raise ProtocolError(f"call {self.call_id} was answered by what a view holds, not rows")
        if (self.n_tokens, self.hidden_size) != shape or self.dtype is not dtype:
            raise ProtocolError(
                f"call {self.call_id} was answered by {self.dtype} "
                f"[{self.n_tokens}, {self.hidden_size}] instead of {dtype} {list(shape)}"
            )


def call_bytes(n_tokens: int, top_k: int, hidden_size: int, dtype: DType) -> int:
    """Length of a call."""
    return _rows_offset(n_tokens, top_k) + n_tokens * hidden_size * dtype.itemsize


def reply_bytes(n_tokens: int, hidden_size: int, dtype: DType) -> int:
    """Length of a reply that holds rows."""
    return HEADER_BYTES + n_tokens * hidden_size * dtype.itemsize


def _rows_offset(n_tokens: int, top_k: int) -> int:
    return (HEADER_BYTES + n_tokens * top_k * 8 + 63) & ~63


def pack_call(
    call_id: int,
    layer: int,
    hidden_states: Array,
    topk_ids: Array,
    topk_weights: Array,
    dtype: DType,
    deadline_ns: int = 0,
    view: int = 0,
    are_global: bool = False,
) -> tuple[bytes, Array, Array, bytes, Array]:
    """The parts of a call, from contiguous arrays of checked shapes; the answer's dtype is that
    of `hidden_states`. `deadline_ns`: of CLOCK_MONOTONIC, 0 for none. `view`: what local ids
    mean; 0 for the welcome's layers."""
    n_tokens, hidden_size = hidden_states.shape
    top_k = topk_ids.shape[1]
    header = _CALL.pack(
        CALL_VERSION, HEADER_BYTES, layer, call_id, deadline_ns, n_tokens, hidden_size,
        top_k, are_global, dtype, dtype, view,
    )  # fmt: skip
    n_padding = -n_tokens * top_k * 8 % 64
    return header, topk_ids, topk_weights, _PADDING[:n_padding], hidden_states


def pack_rows(
    call_id: int,
    layer: int,
    hidden_states: Array,
    topk_ids: Array,
    topk_weights: Array,
    dtype: DType,
    deadline_ns: int,
    view: int,
    rows: npt.NDArray[np.int64] | None,
) -> tuple[bytes, Array, Array, bytes, Array]:
    """As `pack_call`, of these rows (None for all), converted to `dtype`: what a transport does
    that cannot gather in place."""
    if rows is not None:
        hidden_states = hidden_states[rows]
        topk_ids, topk_weights = topk_ids[rows], topk_weights[rows]
    if hidden_states.dtype != dtype.numpy:
        hidden_states = narrow(widen(hidden_states), dtype)
    return pack_call(
        call_id, layer, hidden_states, topk_ids, topk_weights, dtype, deadline_ns, view
    )


def read_call_header(record: Message) -> tuple[int, CallFields]:
    """The id and the fields of a call that may be wrong in everything else; ProtocolError if it is
    no call."""
    if record.type != CALL or len(record) < HEADER_BYTES:
        raise ProtocolError(f"record type {record.type} of {len(record)} bytes is no call")
    version, header_bytes, layer, call_id, *fields = _CALL.unpack_from(record)
    if not 1 <= version <= CALL_VERSION or header_bytes != HEADER_BYTES:
        raise ProtocolError(
            f"call version {version} with a header of {header_bytes} bytes; this worker reads "
            f"versions 1..{CALL_VERSION}: update it"
        )
    return call_id, (layer, call_id, *fields)


def view_of(fields: CallFields) -> int:
    """The number of the view that the call's local ids, and its layers, are of."""
    return fields[-1]


def read_plain(record: Message, shapes: dict[int, PlainShape], max_tokens: int) -> Call | None:
    """A call that came in a ring, has local ids and is right in everything, at once; None for
    any other, which `read_call_header` and `parse_call` then judge. `shapes`: as `plain_shapes`."""
    if type(record) is not Record:
        return None
    found = read_plain_call(record, shapes, max_tokens)
    if found is None:
        return None
    call_id, layer, hidden_states, ids, weights, reply, deadline_ns = found
    return Call(call_id, layer, hidden_states, ids, weights, _DTYPES[reply], deadline_ns)


def plain_shapes(
    layers: Mapping[int, LayerInfo], tables: Mapping[int, SlotTable] = _NO_TABLES, view: int = 0
) -> dict[int, PlainShape]:
    """What `read_plain` needs of a view's layers, by `view << 32 | layer`: hidden_size, top_k,
    local experts, and the table of slots, if there is one."""
    return {
        view << 32 | n: (info.hidden_size, info.top_k, len(info.experts), tables.get(n))
        for n, info in layers.items()
    }


def parse_call(
    record: Message,
    fields: CallFields,
    layers: Mapping[int, LayerInfo],
    max_tokens: int,
    tables: Mapping[int, SlotTable] = _NO_TABLES,
) -> Call:
    """Check a call and read its arrays. `layers`, `tables`: of the call's view; a layer without a
    table has its experts in the slots of their local ids.

    InvalidCall: it contradicts the layer, with the value and what is allowed. ProtocolError: its
    length contradicts its header.
    """
    layer, call_id, deadline_ns, n_tokens, hidden_size, top_k, id_space, dtype, reply, _ = fields
    info = find_layer(layers, layer)
    if dtype not in _DTYPES or reply not in _DTYPES or id_space > _GLOBAL:
        raise InvalidCall(f"dtype {dtype}, reply dtype {reply}, id space {id_space}: unknown")
    check_sizes(layer, info, n_tokens, hidden_size, top_k, max_tokens)
    wire = _DTYPES[dtype]
    rows_offset = _rows_offset(n_tokens, top_k)
    expected = rows_offset + n_tokens * hidden_size * wire.itemsize
    if len(record) != expected:
        raise ProtocolError(
            f"a call of {n_tokens} tokens, top_k {top_k} and {hidden_size} x {wire} holds "
            f"{len(record)} bytes instead of {expected}"
        )
    slots = (n_tokens, top_k)
    # Copied before they are checked: the client could change them in between.
    ids = record.array(_INT32, slots, HEADER_BYTES).copy()
    local_ids, _ = check_ids(ids, layer, info, id_space == _GLOBAL)
    table = tables.get(layer)
    return Call(
        call_id,
        layer,
        record.array(wire.numpy, (n_tokens, hidden_size), rows_offset),
        local_ids if table is None else table[local_ids],
        record.array(_FLOAT32, slots, HEADER_BYTES + n_tokens * top_k * 4),
        _DTYPES[reply],
        deadline_ns,
    )


def find_layer(layers: Mapping[int, LayerInfo], layer: int) -> LayerInfo:
    """The one that a call names; InvalidCall says which there are."""
    info = layers.get(layer)
    if info is None:
        raise InvalidCall(f"layer {layer} is not on this worker; it holds {_listed(layers)}")
    return info


def check_sizes(
    layer: int, info: LayerInfo, n_tokens: int, hidden_size: int, top_k: int, max_tokens: int
) -> None:
    """InvalidCall names what in a call's header contradicts its layer."""
    if hidden_size != info.hidden_size:
        raise InvalidCall(f"hidden_size={hidden_size}; layer {layer} has {info.hidden_size}")
    if not 1 <= n_tokens <= max_tokens:
        raise InvalidCall(f"n_tokens={n_tokens}; this worker takes 1..{max_tokens} in one call")
    if not 1 <= top_k <= info.top_k:
        raise InvalidCall(
            f"top_k={top_k} but layer {layer} has top_k={info.top_k}; "
            f"pass ids of shape [n_tokens, {info.top_k}]"
        )


def check_ids(
    ids: npt.NDArray[np.int32], layer: int, info: LayerInfo, are_global: bool
) -> tuple[npt.NDArray[np.int32], int]:
    """Local ids, each in range or -1, and how many rows hold nothing but -1.

    InvalidCall names the first id that is not here.
    """
    limit = info.num_experts if are_global else len(info.experts)
    n_empty, wrong = inspect_ids(ids, limit)
    if wrong is not None:
        kind = "global" if are_global else "local"
        raise InvalidCall(
            f"expert id {wrong}; {kind} ids of layer {layer} are 0..{limit - 1}, and -1 for an "
            "empty slot"
        )
    if not are_global or info.holds_all_experts:
        return ids, n_empty
    table = np.full(info.num_experts + 1, -1, np.int32)
    table[list(info.experts)] = np.arange(len(info.experts))
    local = table[ids]
    missing = ids[(local < 0) & (ids >= 0)]
    if missing.size:
        raise InvalidCall(
            f"expert {missing[0]} of layer {layer} is not on this worker; it holds "
            f"{_listed(sorted(info.experts))}"
        )
    return local, n_empty


def pack_reply(
    into: Outgoing,
    call_id: int,
    n_tokens: int,
    hidden_size: int,
    dtype: DType,
    compute_ns: int,
) -> None:
    """Write the header of a reply whose rows follow it."""
    if type(into) is Reservation:
        fill_reply(into, call_id, n_tokens, hidden_size, dtype, compute_ns)
        return
    _REPLY.pack_into(into, 0, CALL_VERSION, _OK, n_tokens, call_id, compute_ns, hidden_size, dtype)


def pack_error(call_id: int, error: CallError) -> tuple[bytes, bytes]:
    """The parts of a reply that says why there are no rows."""
    status = _FAILED
    if isinstance(error, InvalidCall):
        status = _INVALID
    elif isinstance(error, DeadlineExceeded):
        status = _EXPIRED
    text = str(error).encode("utf-8", "replace")[: MAX_ERROR_BYTES - HEADER_BYTES]
    return _REPLY.pack(CALL_VERSION, status, 0, call_id, 0, 0, 0), text


def pack_held(call_id: int, layers: Mapping[int, LayerInfo]) -> tuple[bytes, bytes]:
    """The parts of a reply that says that a view of these layers, without experts, is held."""
    return _REPLY.pack(CALL_VERSION, _HELD, 0, call_id, 0, 0, 0), _encode(dict(layers))


def take_plain(record: Message, call_id: int, into: Array, dtype: DType) -> int:
    """Copy the rows of the reply to `call_id` into `into`, if it came in a ring and is just that;
    the worker's time in ns, or -1 for any other, which `parse_reply` then judges."""
    if type(record) is not Record:
        return -1
    return take_plain_reply(record, call_id, into, dtype)


def parse_reply(record: Message) -> Reply:
    """ProtocolError when it is no reply, or its length contradicts its header."""
    if record.type != REPLY or len(record) < HEADER_BYTES:
        raise ProtocolError(f"record type {record.type} of {len(record)} bytes is no reply")
    version, status, n_tokens, call_id, compute_ns, hidden_size, dtype = _REPLY.unpack_from(record)
    if version != CALL_VERSION or dtype not in _DTYPES or status > _HELD:
        raise ProtocolError(f"reply version {version}, status {status}, dtype {dtype}: unknown")
    if compute_ns > MAX_COMPUTE_NS:
        raise ProtocolError(f"a reply that took {compute_ns} ns to compute; no call lasts so long")
    wire = _DTYPES[dtype]
    error = layers = None
    # Looked at before they are copied.
    most = {_OK: len(record), _HELD: MAX_ANSWER_BYTES}.get(status, MAX_ERROR_BYTES)
    if len(record) > most:
        raise ProtocolError(
            f"a reply of status {status} and {len(record)} bytes; {most} is the most of such"
        )
    if status == _HELD:
        layers = decode(_layers_decoder, bytes(memoryview(record)[HEADER_BYTES:]), "layers")
        check_layers(layers)
    elif status != _OK:
        error = _error_of(status, bytes(memoryview(record)[HEADER_BYTES:]))
    elif len(record) != reply_bytes(n_tokens, hidden_size, wire):
        raise ProtocolError(
            f"a reply of {n_tokens} tokens of {hidden_size} x {wire} holds {len(record)} bytes"
        )
    return Reply(call_id, n_tokens, hidden_size, wire, compute_ns, error, layers)


def _error_of(status: int, text: bytes) -> CallError:
    kind = {_INVALID: InvalidCall, _EXPIRED: DeadlineExceeded}.get(status, WorkerFailed)
    return kind(text.decode("utf-8", "replace"))


def _listed(numbers: Mapping[int, LayerInfo] | list[int]) -> str:
    shown = ", ".join(map(str, list(numbers)[:16]))
    return f"{shown}, …" if len(numbers) > 16 else shown
