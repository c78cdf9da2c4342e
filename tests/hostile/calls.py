"""Good calls, orders and descriptors of an attacker's, but for what is changed in them."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np

from moeshm._words import wait_for_word
from moeshm.backends import Ids
from moeshm.dtypes import DType
from tests.crash.arithmetic import (
    FREE,
    HIDDEN_SIZE,
    WIDE,
    WIDE_HIDDEN_SIZE,
    assert_exact,
    make_inputs,
)
from tests.hostile.attacker import DESCRIPTOR, PATIENCE_S, Attacker

GOOD = make_inputs(FREE, 5, n_tokens=2)
CALL_FORM = "<HHIQqIIHBBB3xI20x"
_CALL_FIELDS = (
    *("version", "header_bytes", "layer", "call_id", "deadline_ns", "n_tokens", "hidden_size"),
    *("top_k", "id_space", "dtype", "reply_dtype", "view"),
)
_DESCRIPTOR_FORM = "<HHIQqIIHBBIII4Q48x"
_DESCRIPTOR_FIELDS = (
    *("version", "length", "layer", "call_id", "deadline_ns", "n_tokens", "hidden_size", "top_k"),
    *("are_global", "dtype", "view", "slot", "sequence", "x", "ids", "weights", "out"),
)
#: Of replies.
OK, INVALID, FAILED, EXPIRED = range(4)
#: Of a slab: where the flags of a slot are, and a flag's value that says "there is a reply".
FLAGS_BYTES, SLOT_BYTES, SLOTS = 16384, 512, 32
GIVEN, DONE, REFUSED = 0, 128, 256
TOLD = 0xFFFFFFFF
ROW_BYTES = HIDDEN_SIZE * 4
#: Where `descriptor` says that the output is.
OUT = 768


def call(ids: Any = GOOD.topk_ids, size: int | None = None, **changed: int) -> bytes:
    """A good call, but for what is changed; cut or filled up to a size."""
    header = dict.fromkeys(_CALL_FIELDS, 0)
    header.update(version=1, header_bytes=64, call_id=9, n_tokens=2, hidden_size=HIDDEN_SIZE)
    header.update({"top_k": 2, **changed})
    data = struct.pack(CALL_FORM, *header.values())
    data += np.asarray(ids, np.int32).tobytes() + GOOD.topk_weights.tobytes()
    data = data.ljust(-(-len(data) // 64) * 64, b"\0") + GOOD.hidden_states.tobytes()
    return data if size is None else data[:size].ljust(size, b"\0")


def wide_call(**changed: int) -> bytes:
    """One of 8 tokens and 33 KiB, whose reply takes twice as much."""
    wide = {"layer": WIDE, "n_tokens": 8, "hidden_size": WIDE_HIDDEN_SIZE, "dtype": int(DType.F16)}
    return call(**wide, **changed)[:64].ljust(192 + 8 * WIDE_HIDDEN_SIZE * 2, b"\0")


def hold(**changed: Any) -> bytes:
    """A good order to hold, but for what is changed."""
    fields = {"type": "hold", "call_id": 9, "view": 1, "experts": {FREE: [3, 0, 1, 2]}}
    return msgspec.msgpack.encode({**fields, **changed})


def assert_served(attacker: Attacker) -> None:
    """A good call of the attacker's own is answered exactly; in the slab, if it has one."""
    attacker.n_served += 1
    if attacker.has_slab:
        _assert_served_in_slab(attacker)
        return
    attacker.send(call())
    reply = attacker.receive()
    assert struct.unpack_from("<HHIQ", reply) == (1, OK, 2, 9)
    assert_exact(np.frombuffer(reply, np.float32, offset=64).reshape(2, HIDDEN_SIZE), GOOD)


def read_error(reply: bytes) -> tuple[int, str]:
    """Status and text of a reply without rows."""
    _, status, n_tokens = struct.unpack_from("<HHI", reply)
    assert n_tokens == 0
    return status, reply[64:].decode()


# --- slabs --------------------------------------------------------------------------------


def descriptor(sequence: int, **changed: int) -> bytes:
    """Of a good call, but for what is changed."""
    header = dict.fromkeys(_DESCRIPTOR_FIELDS, 0)
    header.update(version=1, length=128, call_id=9, n_tokens=2, hidden_size=HIDDEN_SIZE, top_k=2)
    header.update(sequence=sequence, x=0, ids=256, weights=512, out=OUT)
    header.update(changed)
    return struct.pack(_DESCRIPTOR_FORM, *header.values())


def give(attacker: Attacker, ids: Ids = GOOD.topk_ids) -> int:
    """Put a good call's arrays where its descriptor says; its sequence."""
    attacker.slab_sequence += 1
    for offset, array in ((0, GOOD.hidden_states), (256, ids), (512, GOOD.topk_weights)):
        data = array.tobytes()
        attacker.slab[FLAGS_BYTES + offset : FLAGS_BYTES + offset + len(data)] = data
    set_flag(attacker, GIVEN, attacker.slab_sequence)
    return attacker.slab_sequence


def set_flag(attacker: Attacker, flag: int, value: int, slot: int = 0) -> None:
    """Of a slot."""
    with memoryview(attacker.slab) as whole, whole.cast("I") as words:
        words[(slot * SLOT_BYTES + flag) // 4] = value


def read_flag(attacker: Attacker, flag: int, slot: int = 0) -> int:
    """Of a slot."""
    with memoryview(attacker.slab) as whole, whole.cast("I") as words:
        return words[(slot * SLOT_BYTES + flag) // 4]


def wait_until_done(attacker: Attacker) -> None:
    """Until the first slot's flag says that the last call is."""
    assert wait_for_word(attacker.slab, DONE, attacker.slab_sequence, int(PATIENCE_S * 1e9), 0)


def _assert_served_in_slab(attacker: Attacker) -> None:
    attacker.send(descriptor(give(attacker)), type=DESCRIPTOR)
    wait_until_done(attacker)
    at = FLAGS_BYTES + OUT
    found = np.frombuffer(attacker.slab[at : at + 2 * ROW_BYTES], np.float32)
    assert_exact(found.reshape(2, HIDDEN_SIZE), GOOD)
