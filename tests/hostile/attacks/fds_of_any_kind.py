"""Sends file descriptors of all kinds along with a good hello.

The worker wants none: one that it kept, or used for a ring, would be in the attacker's hands; and
one of the attacker's own file system (FUSE) keeps whoever closes it: none may even be received.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Callable, Sequence

from moeshm.errors import HandshakeRefused
from tests.hostile.attack import TAKING_AND_REFUSING, Refusal, Variant
from tests.hostile.attacker import PATIENCE_S, Attacker, attacking, hello
from tests.hostile.calls import assert_served
from tests.hostile.conftest import Victim

VICTIMS = TAKING_AND_REFUSING
REFUSAL = Refusal(HandshakeRefused, "carries fds", "got no session")
KINDS = (
    *("pipe", "file", "folder", "/dev/zero", "memfd", "stream socket", "listening socket"),
    *("datagram socket", "epoll", "itself"),
)
VARIANTS = {kind: Variant(kind) for kind in KINDS}


_MAKERS: dict[str, Callable[[], Sequence[int]]] = {
    "pipe": os.pipe,
    "file": lambda: [os.open("/tmp", os.O_TMPFILE | os.O_RDWR)],
    "folder": lambda: [os.open("/", os.O_RDONLY)],
    "/dev/zero": lambda: [os.open("/dev/zero", os.O_RDWR)],
    "memfd": lambda: [os.memfd_create("x", os.MFD_ALLOW_SEALING)],
}


def make(kind: str, attacker: Attacker, stack: contextlib.ExitStack) -> int:
    """An fd of that kind."""
    if kind == "itself":
        # In flight within itself, only the kernel's garbage collector would ever free it.
        return attacker.control.fileno()
    if kind == "epoll":
        return stack.enter_context(select.epoll()).fileno()
    if kind.endswith("socket"):
        type_of = socket.SOCK_DGRAM if kind.startswith("datagram") else socket.SOCK_STREAM
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, type_of))
        if kind.startswith("listening"):
            sock.bind("")
            sock.listen()
        return sock.fileno()
    fds = _MAKERS[kind]()
    for fd in fds:
        stack.callback(os.close, fd)
    return fds[-1]


def scene(victim: Victim, transport: str, kind: str, refusal: Refusal) -> None:
    """A pipe goes along; once nobody has it, its other end says so. Where the kernel lets none
    through, the hello that follows without is a good one."""
    told, held = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, told)
        attacker = stack.enter_context(attacking(victim.address))
        attacker.fds_are_refused = victim.refuses_fds
        fd = make(kind, attacker, stack)
        came = attacker.send_fds(attacker.control, hello(transport=transport), [fd, fd, held])
        os.close(held)
        if came:
            name, reason = attacker.farewell()
            assert name == "refusal"
            assert refusal.says in reason
            assert refusal.says in victim.expect_log(refusal.log)
        else:
            attacker.take_welcome()
            assert_served(attacker)
            attacker.close()
            victim.expect_log("session ended after 1 calls")
        assert select.select([told], [], [], PATIENCE_S)[0], "the worker keeps an fd"
        assert os.read(told, 1) == b""
