"""Plain descriptors, read in one step: neither laxer nor stricter than the long way."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moeshm import descriptors
from moeshm._descriptors import read_plain_descriptor
from moeshm._ring import Record, RingConsumer, RingProducer
from moeshm.descriptors import DESCRIPTOR
from moeshm.dtypes import DType
from moeshm.errors import InvalidCall, ProtocolError
from moeshm.layers import LayerInfo

INFO = LayerInfo(
    hidden_size=64, intermediate_size=8, num_experts=9, top_k=3, experts=tuple(range(9))
)
FORM = "<HHIQqIIHBBIII4Q48x"
FIELDS = (
    *("version", "length", "layer", "call_id", "deadline_ns", "n_tokens", "hidden_size", "top_k"),
    *("are_global", "dtype", "view", "slot", "sequence", "x", "ids", "weights", "out"),
)
VIEW, LAYER, CALL_ID, SEQUENCE = 77, (1 << 32) - 3, (1 << 64) - 2, (1 << 32) - 5
PLACES = 31, 0, 1024, 1280, 2048
#: The output ends with it.
DATA_BYTES = 2048 + 5 * 64 * 2
MOST_TOKENS = 8
SLOTS_OF_IDS = np.arange(10, dtype=np.int32)
LOCAL, GLOBAL = (64, 3, 4, None), (64, 3, 9, SLOTS_OF_IDS)
#: Numbers where a check may be one off, or an addition may wrap.
EDGES = (0, 1, 2, 3, 4, 5, 8, 31, 32, 63, 64, 65, 255, 256, 512, 1024, 1280, 2048, 2049, 2304)
HUGE = (1 << 16, (1 << 32) - 256, 1 << 32, 1 << 63, (1 << 64) - 256, (1 << 64) - 1)


def pack(**changed: int) -> bytes:
    """One that is right, but for what is changed."""
    slot, *offsets = PLACES
    numbers = 1, 128, LAYER, CALL_ID, -4, 5, 64, 3, 1, DType.BF16, VIEW, slot, SEQUENCE, *offsets
    right = dict(zip(FIELDS, numbers, strict=True))
    return struct.pack(FORM, *({**right, **changed}[name] for name in FIELDS))


def through_a_ring(data: bytes, kind: int, read: Callable[[Record], Any]) -> Any:
    """What is read of it."""
    with (
        RingProducer.create(None, 4096) as producer,
        RingConsumer.attach(producer.fileno()) as consumer,
    ):
        producer.write((data,), kind)
        record = consumer.acquire(1.0)
        try:
            return read(record)
        finally:
            record.release()


def read_plain(data: bytes, kind: int = DESCRIPTOR) -> Any:
    """In one step."""
    key = VIEW << 32 | LAYER
    known = {key: LOCAL}, {key: GLOBAL}
    return through_a_ring(
        data, kind, lambda record: read_plain_descriptor(record, known, MOST_TOKENS, DATA_BYTES)
    )


def read_long(data: bytes) -> Any:
    """As `descriptors` judges it; None where that is an error, or is of another layer."""
    try:
        each = through_a_ring(data, DESCRIPTOR, descriptors.read)
        if (each.view, each.layer) != (VIEW, LAYER):
            return None
        descriptors.check(each, {LAYER: INFO}, MOST_TOKENS, DATA_BYTES)
    except (InvalidCall, ProtocolError):
        return None
    return each


def test_one_that_is_right() -> None:
    found = read_plain(pack())
    assert found == (
        *(LAYER, 5, 64, 3, DType.BF16, PLACES, SEQUENCE, 9, SLOTS_OF_IDS),
        *(CALL_ID, -4),
    )
    assert found[8] is SLOTS_OF_IDS
    assert read_plain(pack(are_global=0))[7:9] == (4, None)


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("length", [0, 64, 127, 128, 129])
def test_another_type_or_length(kind: int, length: int) -> None:
    found = read_plain(pack().ljust(129, b"\0")[:length], kind)
    assert (found is not None) == ((kind, length) == (DESCRIPTOR, 128))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [*EDGES, *HUGE])
def test_what_is_plain_is_what_the_long_way_finds_right(field: str, value: int) -> None:
    bits = 8 * struct.calcsize("<" + FORM[1:-3].replace("4Q", "QQQQ")[FIELDS.index(field)])
    if field == "deadline_ns":
        bits -= 1
    compare(pack(**{field: value % (1 << bits)}))


def test_bytes_that_are_changed_at_random() -> None:
    """Two of the numbers, as one offset may be wrong by another field."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    outcomes = set()
    for _ in range(2000):
        data = bytearray(pack())
        for _ in range(2):
            size = rng.choice((1, 2, 4, 8))
            value = rng.choice((*EDGES, *HUGE)) % (1 << 8 * size)
            at = rng.randrange(0, 80, size)
            data[at : at + size] = value.to_bytes(size, "little")
        outcomes.add(compare(bytes(data)))
    assert outcomes == {True, False}


def compare(data: bytes) -> bool:
    """Both ways say the same; whether it is right."""
    found, each = read_plain(data), read_long(data)
    assert (found is None) == (each is None), (found, each)
    if each is None:
        return False
    sizes = each.n_tokens, each.hidden_size, each.top_k, each.dtype
    assert found[:7] == (each.layer, *sizes, tuple(each.places), each.sequence)
    assert found[9:] == (each.call_id, each.deadline_ns)
    assert found[7] == (9 if each.are_global else 4)
    return True
