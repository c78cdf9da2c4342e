"""An ordinary worker of plain sums: `python -m tests.hostile.worker unix:PATH`."""

from __future__ import annotations

import sys

from moeshm.daemon import Daemon
from moeshm.logs import configure
from tests.crash.arithmetic import ArithmeticBackend


def main() -> None:
    """Serve until SIGTERM."""
    configure("info", as_json=False)
    Daemon(ArithmeticBackend(), sys.argv[1]).run()


if __name__ == "__main__":
    main()
