"""Connects ten thousand times: most hang up at once, every tenth stays and says nothing.

Threads, fds and log lines add up, and whoever is honest finds no room.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator

import moeshm
from tests.crash.arithmetic import FREE, assert_exact, make_inputs
from tests.hostile.attack import Refusal
from tests.hostile.attacker import Attacker, attacking
from tests.hostile.conftest import Victim

TRANSPORTS = ("shared",)
REFUSAL = Refusal(None, "each ends by itself, and others are served", "got no session")
N_CONNECTS, N_SILENT = 10_000, 100
_LAST = 99


def scene(victim: Victim, transport: str, _: None, __: Refusal) -> None:
    """A client works all the while."""
    with (
        moeshm.connect(victim.address, transport=transport) as client,
        _reading_the_log(victim),
    ):
        _connect_and_leave(victim.address, client)


def _connect_and_leave(address: str, client: moeshm.ExpertClient) -> None:
    silent: collections.deque[Attacker] = collections.deque()
    try:
        for number in range(N_CONNECTS):
            if number % 10 == 0:
                silent.append(Attacker(address))
                if len(silent) > N_SILENT:
                    silent.popleft().close()
            else:
                with attacking(address):
                    pass
            if number % 500 == 0:
                inputs = make_inputs(FREE, number % 100)
                assert_exact(client.compute(*inputs), inputs)
    finally:
        for each in silent:
            each.close()


@contextlib.contextmanager
def _reading_the_log(victim: Victim) -> Iterator[None]:
    """Lines that find no room are lost; the end is that of a session known by how many calls it
    had."""
    thread = threading.Thread(
        target=victim.expect_log, args=(f"session ended after {_LAST} calls",)
    )
    thread.start()
    try:
        yield
    finally:
        with moeshm.connect(victim.address) as client:
            for tag in range(_LAST):
                client.compute(*make_inputs(FREE, tag))
        thread.join()
