"""An ordinary worker of plain sums, its log and its limits as usual but for what is asked.

usage: python -m tests.hostile.worker unix:PATH [hasty]

A hasty one gives a handshake a second, and replies that lie unread a part of one.
"""

from __future__ import annotations

import sys

from moeshm import daemon, worker
from moeshm.daemon import Daemon
from moeshm.logs import configure
from moeshm.transport import stream
from tests.crash.arithmetic import ArithmeticBackend


def main() -> None:
    """Serve until SIGTERM."""
    configure("info", as_json=False)
    if len(sys.argv) > 2:
        daemon.HANDSHAKE_TIMEOUT_S = 1.0
        worker.REPLY_TIMEOUT_S = stream._STALL_S = 0.3
    Daemon(ArithmeticBackend(), sys.argv[1]).run()


if __name__ == "__main__":
    main()
