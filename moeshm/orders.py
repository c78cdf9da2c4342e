"""Orders: the records by which a client changes which experts a worker holds for it.

They travel among the calls, so that there is never a doubt which of them a call came after.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import msgspec

from . import protocol
from .errors import InvalidCall, ProtocolError
from .layers import MAX_EXPERTS
from .protocol import Message

#: Room for an order that lists every expert of the largest models, three bytes each.
MAX_ORDER_BYTES = 128 << 10
#: Views that one session may have at a time, those that are being loaded included.
MAX_VIEWS = 8


class Hold(msgspec.Struct, tag="hold", frozen=True):
    """The client asks for a new view; the worker loads what it lacks, and then answers with what
    the view's layers are, or with an error."""

    call_id: int
    #: Its number in later calls: one that the session does not use.
    view: int
    #: By layer, the model's experts in local order.
    experts: dict[int, tuple[int, ...]]


class Offer(msgspec.Struct, tag="offer", frozen=True):
    """New sessions begin with the experts of this view, from now on; not answered. A worker that
    cannot load keeps what it was started with."""

    view: int


class Release(msgspec.Struct, tag="release", frozen=True):
    """The client will send no more calls of this view; not answered."""

    view: int


Order = Hold | Offer | Release
_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
pack_order = msgspec.msgpack.Encoder().encode


def parse_order(record: Message) -> Order:
    """ProtocolError when it is none, or holds a number that no record can."""
    if record.type != protocol.ORDER:
        raise ProtocolError(f"record type {record.type} is no order")
    if len(record) > MAX_ORDER_BYTES:
        raise ProtocolError(f"an order of {len(record)} bytes; {MAX_ORDER_BYTES} is the most")
    # Copied first: the client could change it while it is read.
    order = protocol.decode(_decoder, bytes(memoryview(record)), "order")
    numbers = [order.view]
    if isinstance(order, Hold):
        numbers += order.experts
        if not 0 <= order.call_id < 1 << 64:
            raise ProtocolError(f"an order with call id {order.call_id}")
    wrong = [number for number in numbers if not 0 <= number < 1 << 32]
    if wrong:
        raise ProtocolError(f"an order with view or layer {wrong[0]}; both are u32")
    return order


def check_experts(experts: Mapping[int, Iterable[int]]) -> dict[int, tuple[int, ...]]:
    """What a `Hold` can carry; InvalidCall names a layer or an expert that cannot be."""
    checked = {}
    for layer, ids in experts.items():
        number = _whole(layer, "layer", 1 << 32)
        checked[number] = tuple(
            _whole(each, f"expert of layer {number}", MAX_EXPERTS) for each in ids
        )
    return checked


def _whole(value: int, what: str, limit: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < limit:
        raise InvalidCall(f"{what}: {value!r:.50}; it must be a whole number, 0..{limit - 1}")
    return number
