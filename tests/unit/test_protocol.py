"""The bytes of calls and replies: they arrive as they left, and anything else is refused."""

from __future__ import annotations

import struct
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeshm import protocol
from moeshm._ring import Record
from moeshm.dtypes import DType
from moeshm.errors import (
    CallError,
    DeadlineExceeded,
    InvalidCall,
    ProtocolError,
    WorkerFailed,
)
from moeshm.layers import LayerInfo, without_experts
from moeshm.protocol import CALL, HEADER_BYTES, REPLY, Call, Outgoing
from moeshm.transport.stream import StreamMessage
from tests.wire import call_message, connected, dense_info, message, partial_info

MAX_TOKENS = 8
HIDDEN_SIZE = 6
TOP_K = 3
LAYERS = {0: dense_info(HIDDEN_SIZE, 5, TOP_K), 7: partial_info(HIDDEN_SIZE, 9, (8, 0, 4), TOP_K)}
#: Where a call's header keeps each field, and how; docs/protocol.md.
FIELDS = {
    "version": (0, "H"),
    "header bytes": (2, "H"),
    "layer": (4, "I"),
    "n_tokens": (24, "I"),
    "hidden_size": (28, "I"),
    "top_k": (32, "H"),
    "id space": (34, "B"),
    "dtype": (35, "B"),
    "reply dtype": (36, "B"),
    "view": (40, "I"),
}
#: View 5 has two of layer 7's experts, in other slots than their local ids.
VIEWS: dict[int, tuple[dict[int, LayerInfo], dict[int, protocol.SlotTable]]] = {
    0: (LAYERS, {}),
    5: (
        {7: partial_info(HIDDEN_SIZE, 9, (4, 8), TOP_K)},
        {7: np.array([2, 0, -1], np.int32)},
    ),
}


def a_call(dtype: DType = DType.F32, **changed: Any) -> StreamMessage:
    """Two tokens for layer 0, the first with an empty slot."""
    arguments: dict[str, Any] = {
        "call_id": 11,
        "layer": 0,
        "hidden_states": np.arange(2 * HIDDEN_SIZE).reshape(2, HIDDEN_SIZE).astype(dtype.numpy),
        "topk_ids": np.array([[4, -1, 0], [1, 2, 3]], np.int32),
        "topk_weights": np.array([[0.5, 0.0, 0.25], [1, 2, 3]], np.float32),
        "dtype": dtype,
    }
    return call_message(**{**arguments, **changed})


SHAPES = {
    key: shape
    for view, (layers, tables) in VIEWS.items()
    for key, shape in protocol.plain_shapes(layers, tables, view).items()
}


def parse(record: StreamMessage) -> Call:
    """As the worker does; what comes in a ring is judged just the same."""
    with connected("shared", 4096) as (client, worker):
        client.write((record,), record.type)
        with cast("Record", worker.acquire(0.0)) as in_ring:
            plain = protocol.read_plain(in_ring, SHAPES, MAX_TOKENS)
            try:
                call = _parse(record)
            except (InvalidCall, ProtocolError):
                assert plain is None
                raise
            is_global = record[FIELDS["id space"][0]] == 1
            assert (plain is None) == is_global
            if plain is not None:
                _assert_same(plain, call)
            del plain
    return call


def _parse(record: StreamMessage) -> Call:
    assert protocol.read_plain(record, SHAPES, MAX_TOKENS) is None
    _, fields = protocol.read_call_header(record)
    view = protocol.view_of(fields)
    if view not in VIEWS:
        raise InvalidCall(f"view {view} is not held")
    layers, tables = VIEWS[view]
    return protocol.parse_call(record, fields, layers, MAX_TOKENS, tables)


def _assert_same(call: Call, other: Call) -> None:
    for name in Call.__struct_fields__:
        value, others = getattr(call, name), getattr(other, name)
        if isinstance(value, np.ndarray):
            assert (value.dtype, value.shape) == (others.dtype, others.shape)
            assert value.tobytes() == others.tobytes()
        else:
            assert value == others


def with_field(record: StreamMessage, name: str, value: int) -> StreamMessage:
    """The same record, lying about one thing."""
    offset, kind = FIELDS[name]
    struct.pack_into(f"<{kind}", record, offset, value)
    return record


# --- calls --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 2, MAX_TOKENS])
@pytest.mark.parametrize("top_k", [1, TOP_K])
def test_a_call_arrives_as_it_left(dtype: DType, n_tokens: int, top_k: int) -> None:
    rng = np.random.default_rng(n_tokens)
    hidden = rng.integers(0, 1 << 14, (n_tokens, HIDDEN_SIZE)).astype(dtype.numpy)
    ids = rng.integers(-1, 5, (n_tokens, top_k), np.int32)
    weights = rng.random((n_tokens, top_k), np.float32)
    record = call_message(1 << 63, 0, hidden, ids, weights, dtype, 12_500_000_000)
    assert len(record) == protocol.call_bytes(n_tokens, top_k, HIDDEN_SIZE, dtype)
    call = parse(record)
    assert (call.call_id, call.layer, call.dtype) == (1 << 63, 0, dtype)
    assert call.deadline_ns == 12_500_000_000
    for sent, got in (
        (hidden, call.hidden_states),
        (ids, call.topk_ids),
        (weights, call.topk_weights),
    ):
        assert got.dtype == sent.dtype
        np.testing.assert_array_equal(got, sent)


def test_hidden_states_are_aligned_to_a_cache_line() -> None:
    for n_tokens in range(1, 5):
        for top_k in range(1, TOP_K + 1):
            arrays_end = HEADER_BYTES + n_tokens * top_k * 8
            rows = n_tokens * HIDDEN_SIZE * 4
            start = protocol.call_bytes(n_tokens, top_k, HIDDEN_SIZE, DType.F32) - rows
            assert start % 64 == 0
            assert 0 <= start - arrays_end < 64


def test_ids_are_the_workers_own() -> None:
    """What a client writes after the check changes nothing."""
    with connected("shared", 4096) as (client, worker):
        client.write((a_call(),), CALL)
        with cast("Record", worker.acquire(0.0)) as in_ring:
            plain = protocol.read_plain(in_ring, SHAPES, MAX_TOKENS)
            assert plain is not None
            assert plain.topk_ids.flags.owndata
            del plain
    record = a_call()
    call = parse(record)
    before = call.topk_ids.copy()
    record[HEADER_BYTES : HEADER_BYTES + 24] = b"\x7f" * 24
    np.testing.assert_array_equal(call.topk_ids, before)


def test_global_ids_become_local_ones() -> None:
    ids = np.array([[8, 4, -1], [0, 0, 8]], np.int32)
    call = parse(a_call(layer=7, topk_ids=ids, are_global=True))
    np.testing.assert_array_equal(call.topk_ids, [[0, 2, -1], [1, 1, 0]])


def test_local_ids_are_of_the_calls_view() -> None:
    ids = np.array([[0, 1, -1], [1, 1, 0]], np.int32)
    call = parse(a_call(layer=7, topk_ids=ids, view=5))
    np.testing.assert_array_equal(call.topk_ids, [[2, 0, -1], [0, 0, 2]])
    call = parse(a_call(layer=7, topk_ids=ids))
    np.testing.assert_array_equal(call.topk_ids, ids)
    with pytest.raises(InvalidCall, match=r"expert id 2; local ids of layer 7 are 0\.\.1"):
        parse(a_call(layer=7, topk_ids=ids + 1, view=5))
    with pytest.raises(InvalidCall, match="layer 0 is not on this worker; it holds 7"):
        parse(a_call(layer=0, topk_ids=ids, view=5))


def test_global_ids_become_slots() -> None:
    ids = np.array([[8, 4, -1], [4, 4, 8]], np.int32)
    call = parse(a_call(layer=7, topk_ids=ids, view=5, are_global=True))
    np.testing.assert_array_equal(call.topk_ids, [[0, 2, -1], [2, 2, 0]])


def test_a_global_id_that_is_not_held_is_refused() -> None:
    ids = np.array([[8, 4, -1], [0, 5, 8]], np.int32)
    with pytest.raises(InvalidCall, match=r"expert 5 of layer 7 .*it holds 0, 4, 8"):
        parse(a_call(layer=7, topk_ids=ids, are_global=True))


@pytest.mark.parametrize("wrong", [-2, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("at", [0, 5])
def test_a_local_id_out_of_range_is_refused(wrong: int, at: int) -> None:
    record = a_call()
    struct.pack_into("<i", record, HEADER_BYTES + 4 * at, wrong)
    with pytest.raises(InvalidCall, match=rf"expert id {wrong}; local ids of layer 0 are 0\.\.4"):
        parse(record)


@pytest.mark.parametrize("wrong", [-2, 9, 2**31 - 1])
def test_a_global_id_out_of_range_is_refused(wrong: int) -> None:
    record = a_call(layer=7, topk_ids=np.zeros((2, 3), np.int32), are_global=True)
    struct.pack_into("<i", record, HEADER_BYTES + 20, wrong)
    with pytest.raises(InvalidCall, match=rf"expert id {wrong}; global ids of layer 7 are 0\.\.8"):
        parse(record)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("layer", 3, "layer 3 is not on this worker; it holds 0, 7"),
        ("layer", 2**32 - 1, "layer 4294967295"),
        ("n_tokens", 0, r"n_tokens=0; this worker takes 1\.\.8"),
        ("n_tokens", 9, r"n_tokens=9; this worker takes 1\.\.8"),
        ("n_tokens", 2**32 - 1, "n_tokens=4294967295"),
        ("hidden_size", 7, "hidden_size=7; layer 0 has 6"),
        ("hidden_size", 0, "hidden_size=0"),
        ("top_k", 0, "top_k=0"),
        ("top_k", 4, "top_k=4 but layer 0 has top_k=3"),
        ("id space", 2, "id space 2"),
        ("dtype", 3, "dtype 3"),
        ("reply dtype", 255, "reply dtype 255"),
    ],
)
def test_a_call_that_contradicts_its_layer_is_invalid(field: str, value: int, says: str) -> None:
    with pytest.raises(InvalidCall, match=says):
        parse(with_field(a_call(), field, value))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("version", 0, "call version 0"),
        ("version", 2, "call version 2"),
        ("header bytes", 32, "header of 32 bytes"),
        ("n_tokens", 1, "holds 176 bytes instead of 152"),
        ("n_tokens", 8, "holds 176 bytes instead of"),
        ("dtype", DType.F16, "x f16 holds 176 bytes"),
    ],
)
def test_a_call_that_contradicts_itself_ends_the_session(field: str, value: int, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        parse(with_field(a_call(), field, value))


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1])
def test_a_record_without_a_header_is_no_call(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"of {size} bytes is no call"):
        protocol.read_call_header(message(bytes(size), CALL))


def test_a_record_of_another_type_is_no_call() -> None:
    with pytest.raises(ProtocolError, match="record type 2"):
        protocol.read_call_header(message(bytes(HEADER_BYTES), REPLY))
    with pytest.raises(ProtocolError, match="record type 1"):
        protocol.parse_reply(message(bytes(HEADER_BYTES), CALL))


# --- replies ------------------------------------------------------------------------------


def a_reply(dtype: DType = DType.F32, n_tokens: int = 2) -> StreamMessage:
    """Rows that answer call 11."""
    record = message(bytes(protocol.reply_bytes(n_tokens, HIDDEN_SIZE, dtype)), REPLY)
    protocol.pack_reply(cast("Outgoing", record), 11, n_tokens, HIDDEN_SIZE, dtype, 1234)
    return record


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_a_reply_arrives_as_it_left(dtype: DType, n_tokens: int) -> None:
    reply = protocol.parse_reply(a_reply(dtype, n_tokens))
    assert reply == protocol.Reply(11, n_tokens, HIDDEN_SIZE, dtype, 1234, None)


@pytest.mark.parametrize("kind", [InvalidCall, WorkerFailed, DeadlineExceeded])
@pytest.mark.parametrize("text", ["", "héllo, %s {}", "x" * 100_000, "é" * 5000])
def test_an_error_arrives_as_the_same_class(kind: type[CallError], text: str) -> None:
    record = message(b"".join(protocol.pack_error(5, kind(text))), REPLY)
    # Any ring has this much: whatever the backend says, it can be told.
    assert len(record) <= 4096
    reply = protocol.parse_reply(record)
    assert reply.call_id == 5
    assert type(reply.error) is kind
    said = str(reply.error).rstrip("\N{REPLACEMENT CHARACTER}")
    assert text.startswith(said)
    assert said == text or len(said) > 1000


def test_what_is_held_arrives_as_it_left() -> None:
    layers = {n: without_experts(info) for n, info in LAYERS.items()}
    reply = protocol.parse_reply(message(b"".join(protocol.pack_held(5, layers)), REPLY))
    assert reply == protocol.Reply(5, 0, 0, DType.F32, 0, None, layers)


@pytest.mark.parametrize("text", [b"", b"\xc1", b"\x81\x00\x00", b"\x90"])
def test_layers_that_are_none_are_refused(text: bytes) -> None:
    header, _ = protocol.pack_held(5, {})
    with pytest.raises(ProtocolError, match="no layers"):
        protocol.parse_reply(message(header + text, REPLY))


def test_a_held_layer_that_fits_no_call_is_refused() -> None:
    layers = {1 << 32: LAYERS[0]}
    with pytest.raises(ProtocolError, match="layer 4294967296 of the worker fits no call"):
        protocol.parse_reply(message(b"".join(protocol.pack_held(5, layers)), REPLY))


@pytest.mark.parametrize(
    ("offset", "kind", "value", "says"),
    [
        (0, "H", 0, "reply version 0"),
        (0, "H", 2, "reply version 2"),
        (2, "H", 5, "status 5"),
        (4, "I", 3, "a reply of 3 tokens of 6 x f32 holds 112 bytes"),
        (4, "I", 2**32 - 1, "4294967295 tokens"),
        (24, "I", 5, "2 tokens of 5 x f32"),
        (28, "B", DType.BF16, "x bf16 holds 112 bytes"),
        (28, "B", 3, "dtype 3"),
    ],
)
def test_a_reply_that_contradicts_itself_is_refused(
    offset: int, kind: str, value: int, says: str
) -> None:
    record = a_reply()
    struct.pack_into(f"<{kind}", record, offset, value)
    with pytest.raises(ProtocolError, match=says):
        protocol.parse_reply(record)


# --- anything at all ----------------------------------------------------------------------


_MUTATIONS = st.lists(st.tuples(st.integers(0, 175), st.integers(0, 255)), min_size=1, max_size=6)


def assert_ids_in_range(call: Call) -> None:
    """What a backend takes for granted."""
    info = LAYERS[call.layer]
    n_tokens, hidden_size = call.hidden_states.shape
    assert hidden_size == info.hidden_size
    assert 1 <= n_tokens <= MAX_TOKENS
    assert call.topk_ids.shape == call.topk_weights.shape
    assert call.topk_ids.shape[0] == n_tokens
    assert 1 <= call.topk_ids.shape[1] <= info.top_k
    assert call.topk_ids.min() >= -1
    assert call.topk_ids.max() < len(info.experts)


def parse_hostile(record: StreamMessage) -> None:
    """Only the documented exceptions come out, and nothing out of range goes on."""
    try:
        call = parse(record)
    except (InvalidCall, ProtocolError):
        return
    assert_ids_in_range(call)


def parse_hostile_reply(record: StreamMessage) -> None:
    """The same for what a worker sends."""
    try:
        reply = protocol.parse_reply(record)
    except ProtocolError:
        return
    if reply.error is None and reply.layers is None:
        size = protocol.reply_bytes(reply.n_tokens, reply.hidden_size, reply.dtype)
        assert size == len(record)


@settings(max_examples=400, deadline=None)
@given(_MUTATIONS, st.sampled_from([DType.F32, DType.F16]), st.sampled_from([0, 7]), st.booleans())
def test_a_mutated_call_is_refused_or_harmless(
    mutations: list[tuple[int, int]], dtype: DType, layer: int, are_global: bool
) -> None:
    ids = np.zeros((2, 3), np.int32)
    record = a_call(dtype, layer=layer, topk_ids=ids, are_global=are_global)
    for at, value in mutations:
        record[at % len(record)] = value
    parse_hostile(record)


@st.composite
def _lying_calls(draw: st.DrawFn) -> StreamMessage:
    """Mostly plausible headers over anything."""
    header = struct.pack(
        "<HHIQqIIHBBB3xI20x",
        draw(st.sampled_from([1, 1, 1, 0, 2])),
        draw(st.sampled_from([64, 64, 64, 0, 128])),
        draw(st.sampled_from([0, 7, 1])),
        draw(st.integers(0, 2**64 - 1)),
        draw(st.integers(-(2**63), 2**63 - 1)),
        n_tokens := draw(st.integers(0, MAX_TOKENS + 1)),
        draw(st.sampled_from([HIDDEN_SIZE, HIDDEN_SIZE, 0, 2**32 - 1])),
        top_k := draw(st.integers(0, TOP_K + 1)),
        draw(st.integers(0, 2)),
        dtype := draw(st.integers(0, 3)),
        draw(st.integers(0, 3)),
        draw(st.sampled_from([0, 0, 5, 1, 2**32 - 1])),
    )
    body = -(-n_tokens * top_k * 8 // 64) * 64 + n_tokens * HIDDEN_SIZE * (4 if dtype == 0 else 2)
    size = body if draw(st.booleans()) else draw(st.integers(0, 400))
    ids = st.sampled_from([0, 1, 2, 4, 5, 8, 9, -1, -2, 2**31 - 1, -(2**31)])
    listed = draw(st.lists(ids, min_size=0, max_size=n_tokens * top_k))
    bytes_of_ids = b"".join(struct.pack("<i", each) for each in listed)
    return message(header + bytes_of_ids[:size].ljust(size, b"\0"), CALL)


@settings(max_examples=400, deadline=None)
@given(_lying_calls())
def test_a_lying_call_is_refused_or_harmless(record: StreamMessage) -> None:
    parse_hostile(record)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 3))
def test_random_bytes_are_no_call_and_no_reply(data: bytes, kind: int) -> None:
    parse_hostile(message(data, kind))
    parse_hostile_reply(message(data, kind))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=5), st.booleans())
def test_a_mutated_reply_is_refused_or_right_in_size(
    mutations: list[tuple[int, int]], is_error: bool
) -> None:
    record = a_reply()
    if is_error:
        record = message(b"".join(protocol.pack_error(1, InvalidCall("no such expert"))), REPLY)
    for at, value in mutations:
        record[at % len(record)] = value
    parse_hostile_reply(record)
