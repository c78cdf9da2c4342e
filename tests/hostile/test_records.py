"""Attacks inside a session: lying calls, lying headers, memory changed under the worker's feet."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from moeshm.dtypes import DType
from tests.crash.arithmetic import (
    FREE,
    HIDDEN_SIZE,
    WIDE,
    WIDE_HIDDEN_SIZE,
    assert_exact,
    make_inputs,
)
from tests.hostile.attacker import (
    CONSUMER_STATE,
    CONSUMER_WORD,
    ORDER,
    PAGE,
    PRODUCER_STATE,
    PRODUCER_WORD,
    REPLY,
    Attacker,
    attacking,
    hello,
)
from tests.hostile.conftest import Victim

pytestmark = pytest.mark.usefixtures("bystander")

GOOD = make_inputs(FREE, 5, n_tokens=2)
CALL_FORM = "<HHIQqIIHBBB3xI20x"
FIELDS = (
    *("version", "header_bytes", "layer", "call_id", "deadline_ns", "n_tokens", "hidden_size"),
    *("top_k", "id_space", "dtype", "reply_dtype", "view"),
)


def call(ids: Any = GOOD.topk_ids, size: int | None = None, **changed: int) -> bytes:
    """A good call, but for what is changed; cut or filled up to a size."""
    header = dict.fromkeys(FIELDS, 0)
    header.update(version=1, header_bytes=64, call_id=9, n_tokens=2, hidden_size=HIDDEN_SIZE)
    header.update({"top_k": 2, **changed})
    data = struct.pack(CALL_FORM, *header.values())
    data += np.asarray(ids, np.int32).tobytes() + GOOD.topk_weights.tobytes()
    data = data.ljust(-(-len(data) // 64) * 64, b"\0") + GOOD.hidden_states.tobytes()
    return data if size is None else data[:size].ljust(size, b"\0")


def assert_served(attacker: Attacker) -> None:
    """A good call of the attacker's own is answered exactly."""
    attacker.send(call())
    reply = attacker.receive()
    assert struct.unpack_from("<HHIQ", reply) == (1, 0, 2, 9)
    assert_exact(np.frombuffer(reply, np.float32, offset=64).reshape(2, HIDDEN_SIZE), GOOD)


# --- calls that lie -----------------------------------------------------------------------

BREAKS_THE_PROTOCOL = {
    "no header": call(size=63),
    "nothing": b"",
    "an unknown version": call(version=2),
    "an impossible version": call(version=0),
    "another header length": call(header_bytes=65),
    "more tokens than came": call(n_tokens=8),
    "fewer tokens than came": call(n_tokens=1),
    "a narrower dtype": call(dtype=int(DType.BF16)),
    "a byte too few": call(size=len(call()) - 1),
    "a byte too many": call(size=len(call()) + 1),
    "only a header": call(size=64),
}


@pytest.mark.parametrize("lie", BREAKS_THE_PROTOCOL)
def test_a_call_that_contradicts_itself_ends_its_session(
    victim: Victim, transport: str, lie: str
) -> None:
    with attacking(victim.address, transport) as attacker:
        assert_served(attacker)
        attacker.send(BREAKS_THE_PROTOCOL[lie])
        assert "the client broke the protocol" in attacker.last_word()
        assert "after 1 calls" in victim.expect_log("the client broke the protocol")


def test_a_reply_is_no_call(victim: Victim, transport: str) -> None:
    with attacking(victim.address, transport) as attacker:
        attacker.send(call(), type=REPLY)
        assert "record type 2" in attacker.last_word()
        victim.expect_log("record type 2")


INVALID = {
    "an unknown layer": (call(layer=99), "layer 99"),
    "no tokens": (call(n_tokens=0), "n_tokens=0"),
    "more tokens than allowed": (call(n_tokens=9), "n_tokens=9; this worker takes 1..8"),
    "countless tokens": (call(n_tokens=2**32 - 1), "n_tokens=4294967295"),
    "another hidden size": (call(hidden_size=2**31), "hidden_size=2147483648"),
    "no experts": (call(top_k=0), "top_k=0"),
    "too many experts": (call(top_k=65535), "top_k=65535"),
    "an unknown dtype": (call(dtype=200), "dtype 200"),
    "an unknown reply dtype": (call(reply_dtype=3), "reply dtype 3"),
    "an unknown id space": (call(id_space=2), "id space 2"),
    "an id too large": (call([[0, 1], [2, 4]]), "expert id 4"),
    "an id too small": (call([[0, 1], [2, -2]]), "expert id -2"),
    "the largest id": (call([[2**31 - 1, 1], [2, 3]]), "expert id 2147483647"),
    "the smallest id": (call([[-(2**31), 1], [2, 3]], id_space=1), "expert id -2147483648"),
    "an unknown view": (call(view=1), "view 1 is not held"),
    "the largest view": (call(view=2**32 - 1), "view 4294967295 is not held"),
    "a deadline long past": (call(deadline_ns=1), "the deadline passed"),
}


@pytest.mark.parametrize("lie", INVALID)
def test_a_call_that_is_not_allowed_is_answered(victim: Victim, transport: str, lie: str) -> None:
    data, says = INVALID[lie]
    with attacking(victim.address, transport) as attacker:
        attacker.send(data)
        assert says in attacker.receive()[64:].decode()
        assert_served(attacker)
    assert "after 1 calls" in victim.expect_log("session ended after")


# --- orders that lie ----------------------------------------------------------------------


def hold(**changed: Any) -> bytes:
    """A good order to hold, but for what is changed."""
    fields = {"type": "hold", "call_id": 9, "view": 1, "experts": {FREE: [3, 0, 1, 2]}}
    return msgspec.msgpack.encode({**fields, **changed})


NO_ORDERS = {
    "nothing": b"",
    "a call": call(),
    "no msgpack": b"\xc1" * 64,
    "nested without end": b"\x91" * 60_000,
    "half of one": hold()[:-3],
    "an unknown order": hold(type="drop"),
    "a view too large": hold(view=2**32),
    "a view below 0": hold(view=-1),
    "a layer below 0": hold(experts={-1: [0]}),
    "no list of experts": hold(experts={0: "all"}),
    "experts without end": hold(experts={0: [0] * 125_000}) + b"\0",
}


@pytest.mark.parametrize("lie", NO_ORDERS)
def test_an_order_that_cannot_be_ends_its_session(victim: Victim, transport: str, lie: str) -> None:
    with attacking(victim.address, transport) as attacker:
        assert_served(attacker)
        attacker.send(NO_ORDERS[lie], type=ORDER)
        assert "the client broke the protocol" in attacker.last_word()
        victim.expect_log("session ended after 1 calls")


REFUSED = {
    "an unknown layer": (hold(experts={99: [0]}), "expert 0 of layer 99 is not on this worker"),
    "an unknown expert": (hold(experts={FREE: [4]}), "layer 0 has no expert 4"),
    "a huge expert": (hold(experts={FREE: [2**64 - 1]}), "has no expert 18446744073709551615"),
    "a negative expert": (hold(experts={FREE: [-1]}), "layer 0 has no expert -1"),
    "an expert twice": (hold(experts={FREE: [1, 1]}), "asked for twice"),
    "no layer": (hold(experts={}), "a view of no layer"),
    "the welcome's view": (hold(view=0), "view 0 is in use"),
}


@pytest.mark.parametrize("lie", REFUSED)
def test_an_order_that_is_not_allowed_is_answered(victim: Victim, transport: str, lie: str) -> None:
    data, says = REFUSED[lie]
    with attacking(victim.address, transport) as attacker:
        for _ in range(20):
            attacker.send(data, type=ORDER)
            assert says in attacker.receive()[64:].decode()
        assert_served(attacker)
    assert "after 1 calls" in victim.expect_log("session ended after")


def test_orders_without_end(victim: Victim, transport: str) -> None:
    """Views are bounded, and those that are released come free; nobody waits for their answers."""
    with attacking(victim.address, transport) as attacker:
        for number in range(1, 40):
            attacker.send(hold(view=number), type=ORDER)
        says = [attacker.receive()[64:] for _ in range(39)]
        assert sum(b"is the most" in each for each in says) == 32
        for number in range(40):
            attacker.send(msgspec.msgpack.encode({"type": "release", "view": number}), type=ORDER)
        attacker.send(call())
        assert b"view 0 is not held in this session; it holds []" in attacker.receive()
    assert "after 0 calls" in victim.expect_log("session ended after")


# --- headers of records, overwritten ------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        {"length": 2**64 - 1},
        {"length": 2**40},
        {"length": 2**63},
        {"epoch": 0},
        {"sequence": 0},
        {"sequence": 2},
        {"sequence": 2**64 - 1},
    ],
    ids=str,
)
def test_a_record_that_cannot_be_ends_its_session(
    victim: Victim, transport: str, lie: dict[str, int]
) -> None:
    with attacking(victim.address, transport) as attacker:
        assert_served(attacker)
        attacker.send(call(), **lie)
        ((_, value),) = lie.items()
        assert str(value) in attacker.last_word()
        assert "the client broke the protocol" in victim.expect_log("session ended after 1 calls")


def test_a_length_alone_takes_no_memory(victim: Victim) -> None:
    """A stream could make the worker hold what a header announces."""
    with attacking(victim.address, "stream") as attacker:
        attacker.send(b"", length=200 << 20)
        assert f"{200 << 20} bytes" in attacker.last_word()
        victim.expect_log("session ended after 0 calls")


# --- control words ------------------------------------------------------------------------


def calls_word(value: int) -> Callable[[Attacker], None]:
    """Says how far the attacker has written."""
    return lambda attacker: attacker.poke(attacker.calls, PRODUCER_WORD, value)


def everything(value: int) -> Callable[[Attacker], None]:
    """Overwrites both control pages."""

    def attack(attacker: Attacker) -> None:
        for ring in (attacker.replies, attacker.calls):
            ring[:PAGE] = bytes([value]) * PAGE

    return attack


def states(ring: str, offset: int) -> Callable[[Attacker], None]:
    """Says that an end is closed."""
    return lambda attacker: attacker.poke(getattr(attacker, ring), offset, 1)


WORDS = {
    "a position beyond the ring": calls_word((1 << 40) << 1),
    "a position not aligned": calls_word((64 + 8) << 1),
    "a position that goes back": calls_word(0),
    "all ones": calls_word(2**64 - 1),
    "impossible bits": calls_word((320 << 1) | 0x40),
    "records that were never written": calls_word(4096 << 1),
    "every word zero": everything(0),
    "every word all ones": everything(0xFF),
    "closed as it goes on": states("calls", PRODUCER_STATE),
    "closed for replies": states("replies", CONSUMER_STATE),
}


@pytest.mark.parametrize("attack", WORDS)
@pytest.mark.parametrize("transport", ["shared"], indirect=True)
def test_a_control_word_that_cannot_be_ends_its_session(victim: Victim, attack: str) -> None:
    with attacking(victim.address, "shared") as attacker:
        assert_served(attacker)
        WORDS[attack](attacker)
        if attack == "closed for replies":
            attacker.send(call())
        attacker.last_word()
        victim.expect_log("session ended after 1 calls")


@pytest.mark.parametrize("position", [1 << 40, 64 + 8, 1 << 62])
@pytest.mark.parametrize("transport", ["shared"], indirect=True)
def test_more_replies_read_than_written(victim: Victim, position: int) -> None:
    """The worker looks once it may have no room by what it knew; three replies are too many."""
    wide = call(layer=WIDE, n_tokens=8, hidden_size=WIDE_HIDDEN_SIZE, dtype=int(DType.F16))
    with attacking(victim.address, "shared") as attacker:
        attacker.poke(attacker.replies, CONSUMER_WORD, position << 1)
        for _ in range(3):
            attacker.send(wide[:64].ljust(192 + 8 * WIDE_HIDDEN_SIZE * 2, b"\0"))
        assert "the client broke the protocol" in attacker.last_word()
        victim.expect_log("session ended after")


@pytest.mark.parametrize("transport", ["shared"], indirect=True)
def test_rings_cannot_be_shrunk_under_the_worker(victim: Victim) -> None:
    with attacking(victim.address) as attacker:
        attacker.control.send(hello(transport="shared"))
        _, fds = attacker.receive_control()
        for fd in fds:
            for size in (0, PAGE, 1 << 30):
                with pytest.raises(PermissionError):
                    os.ftruncate(fd, size)
            os.close(fd)
    victim.expect_log("session ended after 0 calls")


# --- leaving ------------------------------------------------------------------------------


def test_closing_in_the_middle_of_a_call(victim: Victim, transport: str) -> None:
    for _ in range(5):
        with attacking(victim.address, transport) as attacker:
            attacker.send(call())
    for _ in range(5):
        victim.expect_log("session ended after")


def test_closing_in_the_middle_of_a_record(victim: Victim) -> None:
    for size in (1, 31, 32, 33, 200):
        with attacking(victim.address, "stream") as attacker:
            assert attacker.stream is not None
            attacker.stream.sendall(attacker.record(call())[:size])
        victim.expect_log("session ended after 0 calls")


def test_closing_the_control_socket_alone(victim: Victim, transport: str) -> None:
    with attacking(victim.address, transport) as attacker:
        assert_served(attacker)
        attacker.control.close()
        if attacker.stream is not None:
            attacker.stream.close()
        victim.expect_log("session ended after 1 calls")


def test_noise_on_the_control_socket_disturbs_nobody(victim: Victim, transport: str) -> None:
    with attacking(victim.address, transport) as attacker:
        attacker.control.setblocking(False)
        try:
            while True:
                attacker.control.send(b"\1 noise")
        except BlockingIOError:
            pass
        assert_served(attacker)
    victim.expect_log("session ended after 1 calls")


# --- anything at all ----------------------------------------------------------------------


def test_random_changes(victim: Victim, transport: str) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(60):
        with attacking(victim.address, transport) as attacker:
            for _ in range(rng.randint(1, 3)):
                data = bytearray(call())
                for _ in range(rng.randint(1, 8)):
                    # Mostly in the header and the ids; the backend takes the first value for a tag.
                    at = rng.choice((rng.randrange(80), rng.randrange(132, len(data))))
                    data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
                order = bytearray(hold())
                order[rng.randrange(len(order))] = rng.randrange(256)
                try:
                    attacker.send(bytes(data))
                    attacker.send(bytes(order), type=ORDER)
                except (BrokenPipeError, ConnectionResetError):
                    break
        victim.expect_log("session ended after")
