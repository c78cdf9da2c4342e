"""An ordinary worker of plain sums, its log and its limits as usual but for what is asked.

usage: python -m tests.hostile.worker unix:PATH [hasty|patient] [talkative] [refusing]

A hasty one gives a handshake a second, replies that lie unread a part of one, and sessions a second
to end. A patient one waits for handshakes, and thinks none of them slow. A talkative one logs every
line, however often one process causes it.

A refusing one lets no fds through, where the kernel can do that. Others may be sent some, as any
before Linux 6.16.
"""

from __future__ import annotations

import sys

from moeshm import _stream, daemon, foreign_fds, limits, logs, worker
from moeshm.daemon import Daemon
from moeshm.logs import configure
from tests.crash.arithmetic import ArithmeticBackend


def main() -> None:
    """Serve until SIGTERM."""
    configure("info", as_json=False)
    if "refusing" not in sys.argv:
        foreign_fds.refuse = lambda sock: None  # noqa: ARG005
    if "talkative" in sys.argv:
        logs._SAME_LINES = logs._PEER_LINES = logs._USER_LINES = 1e9
    if "patient" in sys.argv:
        daemon.HANDSHAKE_TIMEOUT_S = limits._SLOW_HANDSHAKE_S = 300.0
    if "hasty" in sys.argv:
        daemon.HANDSHAKE_TIMEOUT_S = daemon.DRAIN_TIMEOUT_S = 1.0
        worker.REPLY_TIMEOUT_S = _stream.STALL_S = 0.3
    Daemon(ArithmeticBackend(), sys.argv[1]).run()


if __name__ == "__main__":
    main()
