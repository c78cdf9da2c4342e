"""Target: the parsers of calls, replies, orders and descriptors.

What is parsed out of a ring in one compiled step must be what the Python parser makes of the same
bytes, whatever they are. What is accepted lies in the record, is in range, and packs to the same.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from moeshm import descriptors, orders, protocol
from moeshm._descriptors import read_plain_descriptor
from moeshm._ring import Record, RingConsumer, RingProducer
from moeshm._wire import MAX_COMPUTE_NS
from moeshm.descriptors import Descriptor
from moeshm.dtypes import DType
from moeshm.errors import CallError, InvalidCall, ProtocolError
from moeshm.layers import MAX_EXPERTS, LayerInfo
from moeshm.protocol import Call, Message, Reply
from tests.fuzz.choices import Choices
from tests.wire import dense_info, message, partial_info

MAX_TOKENS = 8
CAPACITY = 1 << 18
#: Of the slab that descriptors speak of.
DATA_BYTES = 1 << 16

LAYERS: dict[int, LayerInfo] = {
    0: dense_info(hidden_size=16, num_experts=4, top_k=2),
    7: partial_info(hidden_size=8, num_experts=8, experts=(5, 1, 7), top_k=3),
}
#: Of layer 7, where its experts are in the backend.
TABLES = {7: np.array([9, 4, 6, -1], np.int32)}
#: By their numbers: one whose experts are where their local ids say, and one with tables.
VIEWS: dict[int, tuple[dict[int, LayerInfo], dict[int, Any]]] = {
    0: (LAYERS, {}),
    3: (LAYERS, TABLES),
}
SHAPES = {**protocol.plain_shapes(LAYERS), **protocol.plain_shapes(LAYERS, TABLES, 3)}
#: As `SlabServer` has it, for local and for global ids; the last two are only handed back.
_KNOWN = {
    view << 32 | number: (info.hidden_size, info.top_k, 0, None)
    for view in VIEWS
    for number, info in LAYERS.items()
}
KNOWN = (_KNOWN, _KNOWN)
#: By their codes.
DTYPES = {int(dtype): dtype for dtype in DType}

#: What a call and a descriptor have alike, in the same order.
_CALL_WIDTHS = {
    "layer": 32,
    "call_id": 64,
    "deadline_ns": 63,
    "n_tokens": 32,
    "hidden_size": 32,
    "top_k": 16,
    "id_space": 8,
    "dtype": 8,
}
CALL_FORM = struct.Struct("<HHIQqIIHBBB3sI20s")
CALL_WIDTHS = {
    "version": 16,
    "header_bytes": 16,
    **_CALL_WIDTHS,
    "reply_dtype": 8,
    "view": 32,
}
REPLY_FORM = struct.Struct("<HHIQQIB35s")
REPLY_WIDTHS = {
    "version": 16,
    "status": 16,
    "n_tokens": 32,
    "call_id": 64,
    "compute_ns": 64,
    "hidden_size": 32,
    "dtype": 8,
}
DESCRIPTOR_FORM = struct.Struct("<HHIQqIIHBBIII4Q48s")
DESCRIPTOR_WIDTHS = {
    "version": 16,
    "length": 16,
    **_CALL_WIDTHS,
    "view": 32,
    "slot": 32,
    "sequence": 32,
    "hidden_states": 64,
    "topk_ids": 64,
    "topk_weights": 64,
    "out": 64,
}


@functools.cache
def _ring() -> tuple[RingProducer, RingConsumer]:
    producer = RingProducer.create(None, CAPACITY, spin_us=0)
    return producer, RingConsumer.attach(producer.fileno(), spin_us=0)


def close() -> None:
    """Let go of what is kept between executions."""
    if _ring.cache_info().currsize:
        for end in _ring():
            end.close()
        _ring.cache_clear()


def seeds() -> list[bytes]:
    """One of each kind, right and slightly wrong."""
    kinds = range(len(_KINDS))
    return [bytes([kind, *more]) for kind in kinds for more in ([], [0] * 8, [1] * 24, [2, 3, 200])]


def test_one(data: bytes) -> str:
    """What became of one record; AssertionError for what must not."""
    choices = Choices(data)
    make, judge, kind = _KINDS[choices.below(len(_KINDS))]
    packed = make(choices)
    kind = choices.near(kind, 32)
    outcomes = []
    producer, consumer = _ring()
    producer.write([packed], kind, timeout_s=0)
    for record in (consumer.acquire(0), message(packed, kind)):
        outcomes.append(judge(record, packed))
        # Fails while anything still refers to its memory.
        record.release()
    assert outcomes[0] == outcomes[1], outcomes
    return outcomes[0]


# --- calls ------------------------------------------------------------------------------------


def make_call(choices: Choices) -> bytes:
    """A call that is right but for what is chosen."""
    layer = (0, 7)[choices.below(2)]
    info = LAYERS[layer]
    n_tokens, top_k = 2 + choices.below(7), 1 + choices.below(info.top_k)
    fields = dict.fromkeys(CALL_WIDTHS, 0)
    dtype = choices.below(3)
    fields.update(version=1, header_bytes=64, layer=layer, call_id=9, n_tokens=n_tokens)
    fields.update(hidden_size=info.hidden_size, top_k=top_k, dtype=dtype, reply_dtype=dtype)
    fields.update(view=3 * choices.below(2), id_space=choices.below(2))
    choices.change(fields, CALL_WIDTHS)
    n_slots = n_tokens * top_k
    known: Sequence[int] = range(4)
    if layer == 7:
        known = (5, 1, 7) if fields["id_space"] == 1 else range(3)
    ids = [known[-1 - each % len(known)] for each in range(n_slots)]
    for _ in range(choices.below(3)):
        at = choices.below(n_slots)
        ids[at] = choices.near(ids[at], 32)
    *numbers, view = fields.values()
    packed = CALL_FORM.pack(*numbers, b"", view, b"") + struct.pack(f"<{n_slots}I", *ids)
    packed += np.arange(n_slots, dtype=np.float32).tobytes()
    packed += bytes(-len(packed) % 64)
    packed += bytes(range(n_tokens)) * (info.hidden_size * DTYPES[dtype].itemsize)
    return choices.edit(packed)


def judge_call(record: Message, packed: bytes) -> str:
    """Both parsers agree, and what they accept is what came."""
    plain = protocol.read_plain(record, SHAPES, MAX_TOKENS)
    try:
        _, fields = protocol.read_call_header(record)
        layers, tables = _held(protocol.view_of(fields))
        call = protocol.parse_call(record, fields, layers, MAX_TOKENS, tables)
    except (ProtocolError, InvalidCall) as error:
        return f"call: {_refused(error, plain)}"
    id_space = fields[6]
    if type(record) is Record and id_space == 0:
        assert plain is not None, f"{call} is plain"
        assert _called(plain) == _called(call)
    _check_call(call, record, fields, packed, tables)
    return "call"


def _called(call: Call) -> tuple[Any, ...]:
    return (
        *(call.call_id, call.layer, call.dtype, call.deadline_ns, call.topk_ids.tolist()),
        *(call.hidden_states.tobytes(), call.topk_weights.tobytes(), call.hidden_states.dtype),
        *(call.hidden_states.shape, call.topk_weights.shape),
    )


def _check_call(
    call: Call, record: Message, fields: tuple[int, ...], packed: bytes, tables: dict[int, Any]
) -> None:
    """It is what came, in range and inside the record."""
    info = LAYERS[call.layer]
    n_tokens, top_k = call.topk_ids.shape
    assert 1 <= n_tokens <= MAX_TOKENS
    assert 1 <= top_k <= info.top_k
    assert call.hidden_states.shape == (n_tokens, info.hidden_size)
    assert call.topk_weights.shape == (n_tokens, top_k)
    table = tables.get(call.layer)
    allowed = range(len(info.experts)) if table is None else table.tolist()
    assert {-1, *allowed}.issuperset(call.topk_ids.ravel().tolist())
    _check_inside(call.hidden_states, record)
    _check_inside(call.topk_weights, record)
    assert not np.may_share_memory(call.topk_ids, np.frombuffer(memoryview(record), np.uint8))
    wire, reply, view = DTYPES[fields[7]], DTYPES[fields[8]], fields[9]
    assert reply is call.dtype
    if wire is reply:
        ids = np.frombuffer(packed, np.int32, n_tokens * top_k, 64).reshape(n_tokens, top_k)
        again = protocol.pack_call(
            call.call_id, call.layer, call.hidden_states, ids, call.topk_weights, reply,
            call.deadline_ns, view, bool(fields[6]),
        )  # fmt: skip
        # Padding is not looked at.
        repacked = b"".join(bytes(each) for each in again)
        at = 64 + n_tokens * top_k * 8
        assert repacked[:37] + repacked[40:44] + repacked[64:at] == (
            packed[:37] + packed[40:44] + packed[64:at]
        )
        assert len(repacked) == len(packed)
        assert repacked[-call.hidden_states.nbytes :] == packed[-call.hidden_states.nbytes :]


# --- replies ----------------------------------------------------------------------------------

SHAPE = (2, 16)


def make_reply(choices: Choices) -> bytes:
    """A reply to call 9 that is right but for what is chosen."""
    fields = dict.fromkeys(REPLY_WIDTHS, 0)
    fields.update(version=1, n_tokens=SHAPE[0], call_id=9, hidden_size=SHAPE[1])
    fields["compute_ns"] = (0, MAX_COMPUTE_NS)[choices.below(2)]
    status = choices.below(5)
    fields["status"] = status
    choices.change(fields, REPLY_WIDTHS)
    if status == 0:
        body = np.arange(32, dtype=np.float32).tobytes()
    elif status == 4:
        body = _make_layers(choices)
    else:
        body = "what is wrong: é".encode()
    return choices.edit(REPLY_FORM.pack(*fields.values(), b"") + body)


def _make_layers(choices: Choices) -> bytes:
    fields: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 4,
        "num_experts": (4, MAX_EXPERTS)[choices.below(2)],
        "top_k": 2,
        "experts": [0, 3],
        "activation": 0,
        "weight_dtype": 0,
    }
    for _ in range(choices.below(3)):
        name = tuple(fields)[choices.below(len(fields))]
        known = fields[name]
        if isinstance(known, list):
            fields[name] = [choices.near(each, 64) for each in known]
        else:
            fields[name] = choices.near(known, 64)
    return msgspec.msgpack.encode({choices.near(0, 64): fields})


def judge_reply(record: Message, packed: bytes) -> str:
    """Both ways to take a reply agree."""
    plain, taken = np.full(SHAPE, 7, np.float32), np.full(SHAPE, 7, np.float32)
    compute_ns = protocol.take_plain(record, 9, plain, DType.F32)
    if compute_ns < 0:
        assert (plain == 7).all(), "copied, and not taken"
    try:
        reply = protocol.parse_reply(record)
        reply.copy_rows(record, taken, DType.F32)
    except ProtocolError as error:
        gist = _gist(error)
    else:
        return _check_reply(reply, record, compute_ns, plain, taken, packed)
    assert compute_ns == -1, f"taken, and refused: {gist}"
    assert (taken == 7).all()
    return f"reply: {gist}"


def _check_reply(
    reply: Reply, record: Message, compute_ns: int, plain: Any, taken: Any, packed: bytes
) -> str:
    """`plain`, `taken`: where the compiled way and the other have put the rows."""
    assert 0 <= reply.compute_ns <= MAX_COMPUTE_NS
    if reply.error is not None:
        assert compute_ns == -1
        assert (taken == 7).all()
        assert protocol.parse_reply(
            message(b"".join(protocol.pack_error(reply.call_id, reply.error)), protocol.REPLY)
        ).error.__class__ is type(reply.error)
        return f"reply: {type(reply.error).__name__}"
    _check_rows(reply, record, taken, packed)
    if type(record) is Record and reply.call_id == 9:
        assert compute_ns == reply.compute_ns
        assert plain.tobytes() == taken.tobytes()
    return "reply"


def _check_rows(reply: Reply, record: Message, taken: Any, packed: bytes) -> None:
    rows = reply.rows(record, SHAPE, DType.F32)
    _check_inside(rows, record)
    assert rows.tobytes() == taken.tobytes() == packed[64:]


# --- orders -----------------------------------------------------------------------------------


def make_order(choices: Choices) -> bytes:
    """An order that is right but for what is chosen."""
    kind = ("hold", "offer", "release", "other")[choices.below(4)]
    fields: dict[str, Any] = {"type": kind, "view": choices.near(1, 64)}
    if kind == "hold":
        experts = [choices.near(each, 64) for each in range(choices.below(5))]
        fields.update(call_id=choices.near(9, 64), experts={choices.near(0, 64): experts})
    return choices.edit(msgspec.msgpack.encode(fields))


def judge_order(record: Message, _packed: bytes) -> str:
    """What is accepted is in range, and is the same when it is packed and read again."""
    try:
        order = orders.parse_order(record)
    except ProtocolError as error:
        return f"order: {_gist(error)}"
    assert orders.parse_order(message(orders.pack_order(order), protocol.ORDER)) == order
    assert 0 <= order.view < 1 << 32
    if isinstance(order, orders.Hold):
        assert 0 <= order.call_id < 1 << 64
        assert all(0 <= layer < 1 << 32 for layer in order.experts)
        try:
            assert orders.check_experts(order.experts) == order.experts
        except InvalidCall as error:
            return f"order: {_gist(error)}"
    return f"order: {type(order).__name__}"


# --- descriptors ------------------------------------------------------------------------------


def make_descriptor(choices: Choices) -> bytes:
    """A descriptor that is right but for what is chosen."""
    layer = (0, 7)[choices.below(2)]
    info = LAYERS[layer]
    fields = dict.fromkeys(DESCRIPTOR_WIDTHS, 0)
    n_tokens = (2, MAX_TOKENS)[choices.below(2)]
    fields.update(version=1, length=128, layer=layer, call_id=9, n_tokens=n_tokens, top_k=2)
    fields.update(hidden_size=info.hidden_size, slot=(3, 31)[choices.below(2)], sequence=5)
    fields.update(dtype=choices.below(3), view=3 * choices.below(2), id_space=choices.below(2))
    fields.update(hidden_states=0, topk_ids=512, topk_weights=1024)
    # Of any format, the last place that has room is one of these.
    fields["out"] = (1536, DATA_BYTES - 512, DATA_BYTES - 256)[choices.below(3)]
    wrapping = choices.below(8)
    if wrapping >= 4:
        # With its size it comes out small.
        name = ("hidden_states", "topk_ids", "topk_weights", "out")[wrapping - 4]
        fields[name] = (1 << 64) - 256 * (1 + choices.below(2))
    choices.change(fields, DESCRIPTOR_WIDTHS)
    return choices.edit(DESCRIPTOR_FORM.pack(*fields.values(), b""))


def judge_descriptor(record: Message, _packed: bytes) -> str:
    """Both parsers agree, and arrays that are accepted lie in the slab."""
    plain = None
    if type(record) is Record:
        plain = read_plain_descriptor(record, KNOWN, MAX_TOKENS, DATA_BYTES)
    try:
        found = descriptors.read(record)
        layers, _ = _held(found.view)
        dtype = descriptors.check(found, layers, MAX_TOKENS, DATA_BYTES)
    except (ProtocolError, CallError) as error:
        return f"descriptor: {_refused(error, plain)}"
    _check_descriptor(found, dtype, record, plain)
    return "descriptor"


def _check_descriptor(found: Descriptor, dtype: DType, record: Message, plain: Any) -> None:
    """Its arrays are in the slab."""
    n_rows = found.n_tokens * found.hidden_size * dtype.itemsize
    n_pairs = found.n_tokens * found.top_k * 4
    for offset, size in zip(found.places[1:], (n_rows, n_pairs, n_pairs, n_rows), strict=True):
        assert 0 <= offset <= offset + size <= DATA_BYTES
        assert offset % 256 == 0
    if type(record) is Record:
        assert plain is not None, f"{found} is plain"
        assert plain == (
            *(found.layer, found.n_tokens, found.hidden_size, found.top_k, found.dtype),
            *(tuple(found.places), found.sequence, 0, None, found.call_id, found.deadline_ns),
        )


# --- anything ---------------------------------------------------------------------------------


def judge_any(record: Message, packed: bytes) -> str:
    """Every parser takes it for its own."""
    judges = judge_call, judge_reply, judge_order, judge_descriptor
    return "; ".join(judge(record, packed) for judge in judges)


def _held(view: int) -> tuple[dict[int, LayerInfo], dict[int, Any]]:
    """Its layers and tables; InvalidCall as the worker has it."""
    found = VIEWS.get(view)
    if found is None:
        raise InvalidCall("no such view")
    return found


def _refused(error: Exception, plain: Any) -> str:
    """The gist of the Python parser's refusal; the compiled one did not accept it, either."""
    gist = _gist(error)
    assert plain is None, f"{plain} was accepted, and refused: {gist}"
    return gist


def _gist(error: Exception) -> str:
    """Its kind and its first words, without the numbers."""
    words = str(error).split()[:4]
    return f"{type(error).__name__}: {' '.join(word for word in words if word.isalpha())}"


def _check_inside(array: Any, record: Message) -> None:
    whole = np.frombuffer(memoryview(record), np.uint8)
    begin = whole.__array_interface__["data"][0]
    at = array.__array_interface__["data"][0]
    assert begin <= at <= at + array.nbytes <= begin + whole.nbytes


_Kind = tuple[Callable[[Choices], bytes], Callable[[Message, bytes], str], int]
_KINDS: tuple[_Kind, ...] = (
    (make_call, judge_call, protocol.CALL),
    (make_reply, judge_reply, protocol.REPLY),
    (make_order, judge_order, protocol.ORDER),
    (make_descriptor, judge_descriptor, descriptors.DESCRIPTOR),
    *((Choices.rest, judge_any, kind) for kind in (1, 2, 3, 4)),
)
