"""Orders arrive as they left, and anything else is refused."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeshm.errors import InvalidCall, ProtocolError
from moeshm.orders import (
    MAX_ORDER_BYTES,
    Hold,
    Offer,
    Order,
    Release,
    check_experts,
    pack_order,
    parse_order,
)
from moeshm.protocol import CALL, ORDER
from tests.wire import message

HOLD = Hold(7, 3, {0: (4, 0, 2), 39: (255,)})


def parse(data: bytes, kind: int = ORDER) -> Order:
    return parse_order(message(data, kind))


@pytest.mark.parametrize("order", [HOLD, Hold(2**64 - 1, 2**32 - 1, {}), Release(0), Offer(5)])
def test_an_order_arrives_as_it_left(order: Order) -> None:
    assert parse(pack_order(order)) == order


def test_all_experts_of_a_large_model_fit_an_order() -> None:
    experts = dict.fromkeys(range(3, 61), tuple(range(384)))
    assert len(pack_order(Hold(2**64 - 1, 2**32 - 1, experts))) <= MAX_ORDER_BYTES


def test_a_record_of_another_type_is_no_order() -> None:
    with pytest.raises(ProtocolError, match="record type 1 is no order"):
        parse(pack_order(HOLD), CALL)


def changed(**fields: Any) -> bytes:
    """An order to hold, but for one field."""
    return msgspec.msgpack.encode({**msgspec.to_builtins(HOLD), **fields})


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (changed(experts={0: [0] * MAX_ORDER_BYTES}), f"{MAX_ORDER_BYTES} is the most"),
        (b"", "no order"),
        (b"\xc1", "no order"),
        (b"\x90", "no order"),
        (b"\x91" * 5000, "no order"),
        (pack_order(HOLD)[:-1], "no order"),
        (pack_order(HOLD) + b"\0", "no order"),
        (changed(type="hello"), "no order"),
        (changed(view=-1), "view or layer -1"),
        (changed(view=2**32), "view or layer 4294967296"),
        (changed(view=1.5), "no order"),
        (changed(call_id=-1), "call id -1"),
        (changed(experts={-1: [0]}), "view or layer -1"),
        (changed(experts={2**32: [0]}), "view or layer 4294967296"),
        (changed(experts={0: "all"}), "no order"),
        (changed(experts=[[0]]), "no order"),
        (msgspec.msgpack.encode({"type": "release", "view": 2**63}), "view or layer"),
        (msgspec.msgpack.encode({"type": "offer", "view": -1}), "view or layer -1"),
    ],
)
def test_an_order_that_cannot_be_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        parse(data)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_mutated_order_is_refused_or_harmless(mutations: list[tuple[int, int]]) -> None:
    data = bytearray(pack_order(HOLD))
    for at, value in mutations:
        data[at % len(data)] = value
    parse_hostile(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_no_order(data: bytes) -> None:
    parse_hostile(data)


def parse_hostile(data: bytes) -> None:
    """Only ProtocolError comes out, and nothing out of range goes on."""
    try:
        order = parse(data)
    except ProtocolError:
        return
    assert 0 <= order.view < 1 << 32
    if isinstance(order, Hold):
        assert 0 <= order.call_id < 1 << 64
        assert all(0 <= layer < 1 << 32 for layer in order.experts)


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        ({-1: [0]}, r"layer: -1; it must be a whole number, 0\.\.4294967295"),
        ({2**32: [0]}, "layer: 4294967296"),
        ({"x": [0]}, "layer: 'x'"),
        ({3: [2**70]}, r"expert of layer 3: 1180591620717411303424; .* 0\.\.1048575"),
        ({3: [0, -1]}, "expert of layer 3: -1"),
        ({3: [0.5]}, r"expert of layer 3: 0\.5"),
    ],
)
def test_what_no_order_can_carry_is_not_packed(experts: Any, says: str) -> None:
    with pytest.raises(InvalidCall, match=says):
        check_experts(experts)


def test_any_whole_numbers_can_be_ordered() -> None:
    numbers = np.arange(3)
    assert check_experts({numbers[2]: numbers, 0: range(1)}) == {2: (0, 1, 2), 0: (0,)}
    assert pack_order(Hold(1, 1, check_experts({2: numbers})))
