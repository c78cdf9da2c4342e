"""Attacks before there is a session: each refused by itself, none of them felt by anyone else."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

import msgspec
import pytest

import moeshm
from tests.crash.arithmetic import FREE, assert_exact, make_inputs
from tests.crash.processes import open_fds
from tests.hostile.attacker import Attacker, attacking, hello
from tests.hostile.conftest import Victim

pytestmark = pytest.mark.usefixtures("bystander")

_encode = msgspec.msgpack.encode


def packets(*data: bytes) -> Callable[[Attacker], None]:
    """Sends these."""

    def attack(attacker: Attacker) -> None:
        for each in data:
            attacker.control.send(each)

    return attack


def with_fds(*counts: int) -> Callable[[Attacker], None]:
    """Sends so many fds with each of several packets that announce more."""

    def attack(attacker: Attacker) -> None:
        with open("/dev/null", "rb") as null:
            for count in counts:
                socket.send_fds(attacker.control, [b"\1x"], [null.fileno()] * count)

    return attack


def map_of(*pairs: bytes) -> bytes:
    """msgpack of keys and values that are msgpack already."""
    return b"\0" + bytes([0x80 + len(pairs) // 2]) + b"".join(pairs)


REFUSED = {
    "another protocol": (packets(b"GET / HTTP/1.1\r\n\r\n"), "handshake packet"),
    "no msgpack": (packets(b"\0\xc1\xc1\xc1"), "no handshake message"),
    "nothing": (packets(b"\0"), "no handshake message"),
    "random bytes": (packets(b"\0" + os.urandom(1000)), "no handshake message"),
    "nested without end": (
        packets(map_of(_encode("type"), _encode("hello"), _encode("x"), b"\x91" * 3000)),
        "no handshake message",
    ),
    "text that is none": (
        packets(map_of(_encode("type"), _encode("refusal"), _encode("reason"), b"\xa2\xff\xfe")),
        "no handshake message",
    ),
    "a length of which nothing follows": (
        packets(
            map_of(_encode("type"), _encode("welcome"), _encode("layers"), b"\xdf" + b"\xff" * 4)
        ),
        "no handshake message",
    ),
    "the worker's part": (
        packets(b"\0" + _encode({"type": "goodbye", "reason": "x"})),
        "expected hello, got goodbye",
    ),
    "another version": (packets(hello(protocol=2)), "speaks protocol 2"),
    "a forged log line": (
        packets(hello(protocol=2, version="\nINFO all is well")),
        r"\nINFO all is well",
    ),
    "an unknown transport": (packets(hello(transport="carrier pigeon")), "carrier pigeon"),
    "no room wanted": (packets(hello(batch_capacity=0)), "batch_capacity=0"),
    "too much room wanted": (packets(hello(batch_capacity=1 << 40)), "batch_capacity=109951"),
    "numbers that are text": (packets(hello(batch_capacity="8")), "Expected `int`"),
    "a packet too long": (packets(b"\0" + b"x" * 60_000), "too long"),
    "a message too long": (packets(b"\1" + b"x" * 3000, b"\1" + b"x" * 3000), "at most 4096"),
    "too many fds": (with_fds(5), "too many fds"),
    "too many fds in parts": (with_fds(4, 4), "8 fds"),
}


@pytest.mark.parametrize("attack", REFUSED)
@pytest.mark.parametrize("transport", ["shared"], indirect=True)
def test_a_broken_hello_is_refused_with_a_reason(victim: Victim, attack: str) -> None:
    act, says = REFUSED[attack]
    fds = open_fds(victim.process.pid)
    with attacking(victim.address) as attacker:
        act(attacker)
        assert says in attacker.last_word()
    assert says in victim.expect_log("got no session")
    assert open_fds(victim.process.pid) == fds


def test_half_a_handshake_and_away(victim: Victim) -> None:
    for data in ([], [b"\1"], [b"\1" + hello()[1:9]]):
        with attacking(victim.address) as attacker:
            packets(*data)(attacker)
        victim.expect_log("closed the connection during the handshake")


def test_a_hello_and_away(victim: Victim, transport: str) -> None:
    """Before or after the welcome comes: nobody knows."""
    for _ in range(10):
        with attacking(victim.address) as attacker:
            attacker.control.send(hello(transport=transport))
    victim.expect_ends(10)


def test_silent_connections_keep_nobody_waiting(victim: Victim, transport: str) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(attacking(victim.address))
        inputs = make_inputs(FREE, 77)
        with moeshm.connect(victim.address, transport=transport) as client:
            assert_exact(client.compute(*inputs), inputs)
    victim.expect_ends(41)


def test_a_hundred_quick_connections(victim: Victim, transport: str) -> None:
    fds = open_fds(victim.process.pid)
    for n in range(100):
        with attacking(victim.address, transport if n % 10 == 0 else None):
            pass
    inputs = make_inputs(FREE, 78)
    with moeshm.connect(victim.address, transport=transport) as client:
        assert_exact(client.compute(*inputs), inputs)
    victim.expect_ends(101)
    assert open_fds(victim.process.pid) == fds
