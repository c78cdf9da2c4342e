"""Sends TCP sockets that wait for minutes when they are closed (SO_LINGER), to whoever closes them.

A worker that closes one in the thread that accepts connections serves nobody meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

import moeshm
from tests.crash.arithmetic import FREE, assert_exact, make_inputs
from tests.hostile.attack import TAKING_AND_REFUSING, Refusal, Variant
from tests.hostile.attacker import Attacker, attacking, hello
from tests.hostile.calls import assert_served
from tests.hostile.conftest import Victim
from tests.users import as_user

TRANSPORTS, VICTIMS = ("shared",), TAKING_AND_REFUSING
REFUSAL = Refusal(None, "refused by the kernel, or left unread, and nobody waits", "process ")
#: More than the worker is waited for anywhere in these tests.
_LINGER = struct.pack("ii", 1, 300)
_MOST_OF_A_PROCESS = 64


class What(NamedTuple):
    """How they are sent."""

    when: str
    #: In the queue of a socket that is sent, where nobody sees them.
    is_hidden: bool = False


VARIANTS = {
    "with the hello": Variant(What("hello")),
    "too many with the hello": Variant(What("too many")),
    "in a session": Variant(What("session")),
    "when refused": Variant(What("refused")),
    "hidden, with the hello": Variant(What("hello", True)),
    "hidden, in a session": Variant(What("session", True)),
    "hidden, when refused": Variant(What("refused", True)),
}


@contextlib.contextmanager
def lingering(is_hidden: bool) -> Iterator[list[int]]:
    """Holds the only fd of one, to send and to close; until the end it would linger."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        sender = socket.create_connection(listener.getsockname())
        receiver = stack.enter_context(listener.accept()[0])
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
        sender.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sender.send(b"x" * 65536)
        if is_hidden:
            left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            with left:
                socket.send_fds(left, [b"x"], [sender.fileno()])
            sender.close()
            sender = right
        fds = [sender.detach()]
        try:
            yield fds
        finally:
            # Closed with what it has not read, it ends the other's waiting.
            receiver.close()
            for fd in fds:
                os.close(fd)


@contextlib.contextmanager
def stopped(victim: Victim) -> Iterator[None]:
    """It hears everything at once, and is the last to hold it."""
    victim.process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        victim.process.signal(signal.SIGCONT)


def send(attacker: Attacker, data: bytes, fds: list[int], times: int = 1) -> None:
    """Send what nobody else holds from then on, unless it is refused."""
    if attacker.send_fds(attacker.control, data, fds * times):
        while fds:
            os.close(fds.pop())


def scene(victim: Victim, transport: str, what: What, _: Refusal) -> None:
    """Another process is served while the fds are there."""

    def compute() -> None:
        inputs = make_inputs(FREE, 3)
        with moeshm.connect(victim.address, transport=transport) as client:
            assert_exact(client.compute(*inputs), inputs)

    with contextlib.ExitStack() as stack:
        fds = stack.enter_context(lingering(what.is_hidden))
        if what.when == "refused":
            others = [
                stack.enter_context(attacking(victim.address))
                for _ in range(_MOST_OF_A_PROCESS - 1)
            ]
            with stopped(victim):
                attacker = stack.enter_context(attacking(victim.address))
                attacker.fds_are_refused = victim.refuses_fds
                send(attacker, b"\0", fds)
            reason = attacker.receive_control()[0]["reason"]
            assert f"MOESHM_MAX_SESSIONS_PER_PROCESS={_MOST_OF_A_PROCESS}" in reason
            for each in others:
                each.close()
        else:
            attacker = stack.enter_context(attacking(victim.address))
            attacker.fds_are_refused = victim.refuses_fds
            if what.when == "session":
                attacker.shake_hands(transport)
                assert_served(attacker)
            with stopped(victim):
                n_fds = 5 if what.when == "too many" else 1
                send(attacker, hello(transport=transport), fds, n_fds)
            if what.when == "hello" and victim.refuses_fds:
                attacker.take_welcome()
                assert_served(attacker)
            elif what.when != "session" and not victim.refuses_fds:
                assert "carries fds" in attacker.last_word()
            attacker.close()
        as_user(os.geteuid(), compute, os.getgroups())
        ends = 1 + {"refused": 64}.get(what.when, 1)
        victim.expect_ends(ends)
