"""A worker of plain sums that runs as another user: `python -m tests.hostile.worker_of`.

Arguments: the user's number, the group that is served as well (0: none), and the address.
"""

from __future__ import annotations

import ctypes
import sys

from moeshm.daemon import Daemon
from moeshm.logs import configure
from tests.crash.arithmetic import ArithmeticBackend
from tests.users import become

_PR_SET_DUMPABLE = 4


def main() -> None:
    """Serve until SIGTERM."""
    uid, group = map(int, sys.argv[1:3])
    become(uid, [group] if group else [])
    # As after exec(): else what the process finds under /proc/self is root's.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)
    configure("info", as_json=False)
    Daemon(ArithmeticBackend(), sys.argv[3], group=group or None).run()


if __name__ == "__main__":
    main()
