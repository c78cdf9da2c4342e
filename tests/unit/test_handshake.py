"""Handshake messages: what they may say, and that nothing else is taken for one."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeshm import handshake
from moeshm.errors import ProtocolError
from moeshm.handshake import ControlMessage, Goodbye, Hello, Refusal, Welcome
from moeshm.layers import LayerInfo, fingerprint_of
from tests.wire import dense_info, partial_info

HELLO = Hello(protocol=1, version="0.1", transport="auto", batch_capacity=64)
WELCOME = Welcome(
    protocol=1,
    version="0.1",
    backend="null",
    transport="shared",
    stepped_down="",
    epoch=2**64 - 1,
    max_tokens=64,
    layers={0: dense_info(16, 4, 2), 61: partial_info(16, 9, (8, 0, 4), 3)},
)
MESSAGES: list[ControlMessage] = [HELLO, WELCOME, Refusal("no"), Goodbye("the end")]


def changed(message: Any, **fields: Any) -> Any:
    """The message, lying."""
    return msgspec.structs.replace(message, **fields)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda each: type(each).__name__)
def test_a_message_arrives_as_it_left(message: ControlMessage) -> None:
    assert handshake.decode_control(handshake.encode_control(message)) == message


def test_the_largest_models_fit() -> None:
    layers = {number: dense_info(7168, 256, 8) for number in range(3, 61)}
    data = handshake.encode_control(changed(WELCOME, layers=layers))
    assert len(data) < handshake.MAX_CONTROL_BYTES // 16
    decoded = handshake.decode_control(data)
    assert isinstance(decoded, Welcome)
    assert decoded.layers == layers


def test_a_worker_that_does_not_say_so_takes_no_orders() -> None:
    older = msgspec.to_builtins(WELCOME, str_keys=False)
    del older["takes_orders"]
    decoded = handshake.decode_control(msgspec.msgpack.encode(older))
    assert isinstance(decoded, Welcome)
    assert not decoded.takes_orders
    assert decoded == WELCOME


def test_a_placement_that_the_worker_does_not_hold() -> None:
    handshake.check_placement(HELLO, WELCOME.layers)
    layers = WELCOME.layers
    held = fingerprint_of({number: info.experts for number, info in layers.items()})
    handshake.check_placement(changed(HELLO, placement=held), layers)
    other = changed(HELLO, placement="0123456789abcdef")
    says = f"gives this worker '0123456789abcdef', and it holds {held}: .* was applied last"
    with pytest.raises(ProtocolError, match=says):
        handshake.check_placement(other, layers)


def test_a_hello_fits_its_limit() -> None:
    assert len(handshake.encode_control(HELLO)) < handshake.MAX_HELLO_BYTES // 4


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (Refusal("x"), "expected hello, got refusal"),
        (WELCOME, "expected hello, got welcome"),
        (changed(HELLO, protocol=2), r"speaks protocol 2 \(moeshm '0.1'\), this worker 1; install"),
        (changed(HELLO, protocol=0), "speaks protocol 0"),
        (changed(HELLO, transport="tcp"), "transport 'tcp'; choose auto, shared or stream"),
        (changed(HELLO, batch_capacity=0), r"batch_capacity=0; it must be 1\.\.4096"),
        (changed(HELLO, batch_capacity=4097), "batch_capacity=4097"),
        (changed(HELLO, batch_capacity=-(2**63)), "batch_capacity=-9223372036854775808"),
    ],
)
def test_a_hello_that_cannot_be_answered(message: ControlMessage, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        handshake.check_hello(message)


def test_a_version_cannot_forge_a_log_line() -> None:
    with pytest.raises(ProtocolError) as caught:
        handshake.check_hello(changed(HELLO, protocol=9, version="1\nworker: all is well"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ProtocolError) as caught:
        handshake.decode_control(msgspec.msgpack.encode({"type": "a\nb"}))
    assert "\n" not in str(caught.value)


def _layer(**fields: Any) -> dict[int, LayerInfo]:
    return {5: changed(dense_info(16, 4, 2), **fields)}


@pytest.mark.parametrize(
    ("fields", "n_fds", "says"),
    [
        ({"protocol": 2}, 2, "the worker speaks protocol 2"),
        ({}, 0, "transport 'shared' came with 0 fds"),
        ({}, 1, "came with 1 fds"),
        ({}, 3, "came with 3 fds"),
        ({"transport": "stream"}, 2, "transport 'stream' came with 2 fds"),
        ({"transport": "auto"}, 2, "transport 'auto'"),
        ({"max_tokens": 0}, 2, "max_tokens=0"),
        ({"max_tokens": 4097}, 2, "max_tokens=4097"),
        ({"epoch": -1}, 2, "epoch=-1"),
        ({"layers": {-1: dense_info(16, 4, 2)}}, 2, "layer -1 of the worker"),
        ({"layers": {2**32: dense_info(16, 4, 2)}}, 2, "layer 4294967296 of the worker"),
        ({"layers": _layer(hidden_size=2**32)}, 2, "'hidden_size': 4294967296"),
        ({"layers": _layer(num_experts=2**31)}, 2, "'num_experts': 2147483648"),
        ({"layers": _layer(num_experts=2**17, top_k=2**16)}, 2, "'top_k': 65536"),
    ],
)
def test_a_welcome_that_cannot_be_used(fields: dict[str, Any], n_fds: int, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        handshake.check_welcome(changed(WELCOME, **fields), n_fds)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("experts", [0, 0]),
        ("experts", [4]),
        ("experts", [-1]),
        ("experts", ["a"]),
        ("hidden_size", 0),
        ("intermediate_size", -1),
        ("num_experts", 1),
        ("top_k", 0),
        ("activation", 99),
        ("weight_dtype", 99),
    ],
)
def test_a_welcome_with_an_impossible_layer(field: str, value: Any) -> None:
    plain = msgspec.to_builtins(WELCOME)
    plain["layers"] = {1: {**msgspec.to_builtins(dense_info(16, 4, 2)), field: value}}
    with pytest.raises(ProtocolError, match="no handshake message"):
        handshake.decode_control(msgspec.msgpack.encode(plain))


def _map(*pairs: bytes) -> bytes:
    return bytes([0x80 + len(pairs) // 2]) + b"".join(pairs)


_encode = msgspec.msgpack.encode


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"hello",
        _encode([1, 2]),
        _encode({"reason": "no type"}),
        _encode({"type": "welcome"}),
        _encode({"type": "farewell", "reason": "x"}),
        _encode({"type": "refusal", "reason": 7}),
        _encode({"type": "refusal", "reason": "x"}) + b"\0",
        _encode({**msgspec.to_builtins(HELLO), "protocol": "1"}),
        _encode({**msgspec.to_builtins(HELLO), "batch_capacity": 1.5}),
        # Text that is no UTF-8, as a value and as the tag.
        _map(_encode("type"), _encode("refusal"), _encode("reason"), b"\xa2\xff\xfe"),
        _map(_encode("type"), b"\xa2\xff\xfe"),
        # Nested deeper than any stack.
        _map(_encode("type"), _encode("hello"), _encode("x"), b"\x91" * 100_000 + b"\0"),
        # Lengths of which nothing follows.
        _map(_encode("type"), _encode("welcome"), _encode("layers"), b"\xdf\xff\xff\xff\xff"),
        _map(_encode("type"), _encode("refusal"), _encode("reason"), b"\xdb\xff\xff\xff\xff"),
    ],
    ids=lambda data: repr(data[:24]),
)
def test_anything_else_is_no_message(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="no handshake message"):
        handshake.decode_control(data)


def test_a_declared_length_takes_no_memory() -> None:
    """Were the tuple made before its items are read, this would be 32 GiB."""
    lying = {
        **msgspec.to_builtins(WELCOME),
        "layers": {1: {**msgspec.to_builtins(dense_info(16, 4, 2)), "experts": []}},
    }
    name = _encode("experts")
    data = _encode(lying).replace(name + b"\x90", name + b"\xdd" + struct.pack(">I", 2**32 - 1))
    with pytest.raises(ProtocolError, match="experts"):
        handshake.decode_control(data)


def decode_hostile(data: bytes) -> None:
    """A message or a ProtocolError, which the checks then pass or refuse."""
    try:
        message = handshake.decode_control(data)
        handshake.check_hello(message)
    except ProtocolError:
        pass


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(MESSAGES),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(0, 600),
)
def test_mutated_messages(
    message: ControlMessage, mutations: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(handshake.encode_control(message))
    for at, value in mutations:
        data[at % len(data)] = value
    decode_hostile(bytes(data))
    decode_hostile(bytes(data[:length]))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    decode_hostile(data)
