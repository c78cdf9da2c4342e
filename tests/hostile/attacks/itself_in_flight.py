"""Sends its own control socket through itself, and dies.

The socket is then kept open by what nobody will ever read, and never hangs up.
"""

from __future__ import annotations

import os
import signal

from tests.hostile.attack import TAKING_AND_REFUSING, Refusal
from tests.hostile.attacker import attacking
from tests.hostile.calls import assert_served
from tests.hostile.conftest import Victim

VICTIMS = TAKING_AND_REFUSING
REFUSAL = Refusal(None, "ends with the process: its pidfd tells", "session ended after 1 calls")


def scene(victim: Victim, transport: str, _: None, refusal: Refusal) -> None:
    """In a process of its own, since it has to die."""
    told, telling = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with attacking(victim.address, transport) as attacker:
                attacker.fds_are_refused = victim.refuses_fds
                assert_served(attacker)
                for sock in (attacker.control, attacker.stream or attacker.control):
                    attacker.send_fds(attacker.control, b"x", [sock.fileno()])
                os.write(telling, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.close(telling)
    try:
        assert os.read(told, 1) == b"x"
    finally:
        os.close(told)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    victim.expect_log(refusal.log)
