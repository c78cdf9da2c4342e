"""Attacks with descriptors: arrays that are not in the slab, flags that lie, ids in motion."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest

from moeshm._words import wait_for_word
from moeshm.backends import Ids
from tests.crash.arithmetic import FREE, HIDDEN_SIZE, NUM_EXPERTS, make_inputs
from tests.hostile.attacker import PATIENCE_S, Attacker, attacking, hello
from tests.hostile.conftest import Victim

pytestmark = pytest.mark.usefixtures("bystander")

DESCRIPTOR = 4
FORM = "<HHIQqIIHBBIII4Q48x"
FIELDS = (
    *("version", "length", "layer", "call_id", "deadline_ns", "n_tokens", "hidden_size", "top_k"),
    *("are_global", "dtype", "view", "slot", "sequence", "x", "ids", "weights", "out"),
)
FLAGS_BYTES, SLOT_BYTES = 16384, 512
GIVEN, DONE, REFUSED = 0, 128, 256
TOLD = 0xFFFFFFFF
GOOD = make_inputs(FREE, 5, n_tokens=2)
ROW_BYTES = HIDDEN_SIZE * 4


def descriptor(**changed: int) -> bytes:
    """Of a good call, but for what is changed."""
    header = dict.fromkeys(FIELDS, 0)
    header.update(version=1, length=128, call_id=9, n_tokens=2, hidden_size=HIDDEN_SIZE, top_k=2)
    header.update(sequence=1, x=0, ids=256, weights=512, out=768)
    header.update(changed)
    return struct.pack(FORM, *header.values())


def give(attacker: Attacker, ids: Ids = GOOD.topk_ids, sequence: int = 1) -> None:
    """Put a good call's arrays where the descriptor says."""
    for offset, array in ((0, GOOD.hidden_states), (256, ids), (512, GOOD.topk_weights)):
        data = array.tobytes()
        attacker.slab[FLAGS_BYTES + offset : FLAGS_BYTES + offset + len(data)] = data
    poke(attacker, GIVEN, sequence)


def poke(attacker: Attacker, flag: int, value: int, slot: int = 0) -> None:
    """Set a flag."""
    with memoryview(attacker.slab) as whole, whole.cast("I") as words:
        words[(slot * SLOT_BYTES + flag) // 4] = value


def flag(attacker: Attacker, which: int, slot: int = 0) -> int:
    """What it is."""
    with memoryview(attacker.slab) as whole, whole.cast("I") as words:
        return words[(slot * SLOT_BYTES + which) // 4]


def wait_for(attacker: Attacker, which: int, value: int) -> None:
    """Until the first slot's flag is that."""
    assert wait_for_word(attacker.slab, which, value, int(PATIENCE_S * 1e9), 0)


def assert_served(attacker: Attacker, sequence: int = 1) -> None:
    """A good call in the slab is computed exactly."""
    give(attacker, sequence=sequence)
    attacker.send(descriptor(sequence=sequence), type=DESCRIPTOR)
    wait_for(attacker, DONE, sequence)
    found = attacker.slab[FLAGS_BYTES + 768 : FLAGS_BYTES + 768 + 2 * ROW_BYTES]
    factors = ((GOOD.topk_ids + 1) * GOOD.topk_weights).sum(axis=1, keepdims=True)
    assert found == (GOOD.hidden_states * factors).astype(np.float32).tobytes()


def test_a_good_call(victim: Victim, transport: str) -> None:
    with attacking(victim.address, transport, "pinned") as attacker:
        assert_served(attacker)
    victim.expect_log("session ended after 1 calls")


#: Good calls before the attack: from the second on, the worker knows what to expect.
each_time = pytest.mark.parametrize("n_before", [0, 1])


@each_time
@pytest.mark.parametrize(
    "changed",
    [
        {"x": 8},
        {"out": 1 << 40},
        {"x": (1 << 64) - 256},
        {"ids": (1 << 64) - 256},
        {"out": (64 << 20) - 256},
        {"slot": 32},
        {"version": 2},
        {"length": 64},
    ],
)
def test_what_cannot_be_ends_the_session(
    victim: Victim, transport: str, changed: dict[str, int], n_before: int
) -> None:
    with attacking(victim.address, transport, "pinned") as attacker:
        for sequence in range(1, n_before + 1):
            assert_served(attacker, sequence)
        give(attacker, sequence=n_before + 1)
        attacker.send(descriptor(**{"sequence": n_before + 1, **changed}), type=DESCRIPTOR)
        assert "broke the protocol" in attacker.last_word()
    victim.expect_log(f"session ended after {n_before} calls")


@pytest.mark.parametrize("size", [0, 64, 127, 129, 192])
def test_a_descriptor_of_another_length(victim: Victim, transport: str, size: int) -> None:
    with attacking(victim.address, transport, "pinned") as attacker:
        attacker.send(descriptor().ljust(192, b"\0")[:size], type=DESCRIPTOR)
        assert "is no descriptor" in attacker.last_word()
    victim.expect_log("session ended after 0 calls")


def test_a_descriptor_without_a_slab(victim: Victim, transport: str) -> None:
    with attacking(victim.address, transport) as attacker:
        attacker.send(descriptor(), type=DESCRIPTOR)
        assert "without a slab" in attacker.last_word()
    victim.expect_log("session ended after 0 calls")


@each_time
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"layer": 77}, "layer 77 is not on this worker"),
        ({"hidden_size": 17}, "hidden_size=17"),
        ({"n_tokens": 0}, "n_tokens=0"),
        ({"n_tokens": 1 << 31}, "n_tokens="),
        ({"top_k": 3}, "top_k=3"),
        ({"top_k": 0}, "top_k=0"),
        ({"dtype": 9}, "dtype 9"),
        ({"are_global": 2}, "id space 2"),
        ({"view": 5}, "view 5 is not held"),
        ({"deadline_ns": 1}, "deadline passed"),
    ],
)
def test_what_contradicts_the_layer_is_an_error_of_that_call(
    victim: Victim, transport: str, changed: dict[str, int], says: str, n_before: int
) -> None:
    with attacking(victim.address, transport, "pinned") as attacker:
        for sequence in range(1, n_before + 1):
            assert_served(attacker, sequence)
        give(attacker, sequence=n_before + 1)
        attacker.send(descriptor(sequence=n_before + 1, **changed), type=DESCRIPTOR)
        assert says in attacker.receive()[64:].decode()
        wait_for(attacker, DONE, n_before + 1)
        assert flag(attacker, REFUSED) == TOLD
        poke(attacker, REFUSED, 0)
        assert_served(attacker, n_before + 2)
    victim.expect_log(f"session ended after {n_before + 1} calls")


@pytest.mark.parametrize("wrong", [-2, NUM_EXPERTS, 1 << 30, -(1 << 31)])
def test_ids_that_are_none(victim: Victim, transport: str, wrong: int) -> None:
    ids = GOOD.topk_ids.copy()
    ids[1, 1] = wrong
    with attacking(victim.address, transport, "pinned") as attacker:
        give(attacker, ids)
        attacker.send(descriptor(), type=DESCRIPTOR)
        assert f"expert id {wrong}" in attacker.receive()[64:].decode()
        wait_for(attacker, DONE, 1)
        assert_served(attacker, 2)
    victim.expect_log("session ended after 1 calls")


def test_leaving_without_giving_the_arrays(victim: Victim, transport: str) -> None:
    """The worker waits for the arrays no longer than for the client."""
    with attacking(victim.address, transport, "pinned") as attacker:
        attacker.send(descriptor(), type=DESCRIPTOR)
    victim.expect_log("the arrays of its call will not come")


def test_flags_that_run_ahead(victim: Victim, transport: str) -> None:
    """All set at once, to everything: they are the client's own calls that it spoils."""
    with attacking(victim.address, transport, "pinned") as attacker:
        give(attacker)
        for slot in range(32):
            for which in (GIVEN, DONE, REFUSED):
                poke(attacker, which, TOLD >> 1, slot)
        attacker.send(descriptor(), type=DESCRIPTOR)
        assert_served(attacker, (TOLD >> 1) + 1)
    victim.expect_log("session ended after")


@pytest.mark.parametrize("wish", ["device", "auto", "pinned", "", "huge", 7])
def test_wishes(victim: Victim, transport: str, wish: str | int) -> None:
    """A worker without a GPU has no device memory to give, and `auto` is what there is."""
    with attacking(victim.address) as attacker:
        attacker.control.send(hello(transport=transport, slab=wish, vendor="cuda"))
        if wish in ("huge", 7):
            assert "slab" in attacker.last_word()
            victim.expect_log("got no session")
            return
        answer, fds = attacker.receive_control()
        expected = {"shared": 2, "stream": 1}[transport] + (wish in ("auto", "pinned"))
        for fd in fds:
            os.close(fd)
        assert answer["type"] == "welcome"
        assert len(fds) == expected
        kind = None if answer["slab"] is None else answer["slab"]["kind"]
        assert kind == ("pinned" if wish in ("auto", "pinned") else None)
        assert ("no device slab" in answer["slab_refused"]) == (wish in ("device", "auto"))
    victim.expect_log("session ended after 0 calls")
