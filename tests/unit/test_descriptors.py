"""Descriptors: read, and checked; `test_claims.py` has how they are made."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from moeshm import descriptors
from moeshm._ring import RingConsumer, RingProducer
from moeshm.descriptors import DESCRIPTOR, Descriptor
from moeshm.dtypes import DType
from moeshm.errors import InvalidCall, ProtocolError
from moeshm.layers import LayerInfo
from moeshm.transport.slab import ALIGNMENT, Places

INFO = LayerInfo(
    hidden_size=64, intermediate_size=8, num_experts=9, top_k=3, experts=tuple(range(9))
)
GOOD = Descriptor(
    call_id=(1 << 64) - 2,
    layer=(1 << 32) - 3,
    deadline_ns=-4,
    n_tokens=5,
    hidden_size=64,
    top_k=3,
    are_global=1,
    dtype=DType.BF16,
    sequence=(1 << 32) - 5,
    places=Places(31, 256, 512, 1 << 40, 0),
    view=77,
)


def packed(each: Descriptor) -> bytes:
    """The record."""
    slot, *offsets = each.places
    return struct.pack(
        "<HHIQqIIHBBIII4Q48x", 1, 128, each.layer, each.call_id, each.deadline_ns, each.n_tokens,
        each.hidden_size, each.top_k, each.are_global, each.dtype, each.view, slot, each.sequence,
        *offsets,
    )  # fmt: skip


def through_a_ring(data: bytes, kind: int = DESCRIPTOR) -> Descriptor:
    """As the other side reads it."""
    with (
        RingProducer.create(None, 4096) as producer,
        RingConsumer.attach(producer.fileno()) as consumer,
    ):
        producer.write((data,), kind)
        with consumer.acquire(1.0) as record:
            return descriptors.read(record)


def test_it_arrives_as_it_was() -> None:
    assert through_a_ring(packed(GOOD)) == GOOD


@pytest.mark.parametrize("kind", [1, 2, 3, 5])
def test_another_type_is_refused(kind: int) -> None:
    with pytest.raises(ProtocolError, match=f"record type {kind} of 128 bytes"):
        through_a_ring(packed(GOOD), kind)


def check(most: int = 8, data_bytes: int = 1 << 20, **changed: Any) -> DType:
    """Of one that is right but for that."""
    right = GOOD._replace(places=Places(0, 0, 1024, 1280, 2048))
    return descriptors.check(right._replace(**changed), {GOOD.layer: INFO}, most, data_bytes)


def test_what_is_right() -> None:
    assert check() is DType.BF16
    # To the last byte.
    assert check(data_bytes=2048 + 5 * 64 * 2) is DType.BF16


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"hidden_size": 65}, InvalidCall, "hidden_size=65"),
        ({"n_tokens": 9}, InvalidCall, r"1\.\.8"),
        ({"top_k": 4}, InvalidCall, "top_k=4"),
        ({"dtype": 3}, InvalidCall, "dtype 3"),
        ({"data_bytes": 2048 + 5 * 64 * 2 - 1}, ProtocolError, "of 640 bytes at 2048"),
        ({"places": Places(0, 0, 1024, 1280, 2049)}, ProtocolError, f"multiple of {ALIGNMENT}"),
        ({"places": Places(0, 0, 1 << 30, 1280, 2048)}, ProtocolError, "of 60 bytes"),
    ],
)
def test_what_is_wrong(changed: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        check(**changed)
