"""A worker process whose GATED calls wait for the test: `python -m tests.crash.gated_worker`.

Arguments: address, the pipe to tell events to, the pipe to wait at, seconds that a reply may lie
unread (0: as shipped), most open fds (0: as they are), most bytes of a segment (0: any), 1 for a
made-up GPU, seconds that what a client sends on is waited for at the end (0: as shipped).
"""

from __future__ import annotations

import os
import resource
import struct
import sys

from moeshm import _stream, worker
from moeshm.daemon import Daemon
from moeshm.logs import configure
from moeshm.turns import Place
from tests.crash.arithmetic import BROKEN, GATED, STEPPED
from tests.crash.slab_arithmetic import SlabArithmetic
from tests.crash.stepping import SteppingArithmetic

#: Kind, layer, tag.
EVENT = struct.Struct("<iii")
TURN, QUEUED = 1, 2


class TellingQueue(list[Place]):
    """Tells the test of every session that has to wait for its turn."""

    def __init__(self, events: int) -> None:
        super().__init__()
        self._events = events

    def append(self, place: Place, /) -> None:
        super().append(place)
        os.write(self._events, EVENT.pack(QUEUED, 0, 0))


def main() -> None:
    """Serve until SIGTERM."""
    address = sys.argv[1]
    events, gate = map(int, sys.argv[2:4])
    reply_timeout_s = float(sys.argv[4])
    max_fds, max_segment_bytes, has_gpu = map(int, sys.argv[5:8])
    drain_limit_s = float(sys.argv[8])
    if drain_limit_s:
        worker.DRAIN_LIMIT_S = drain_limit_s
    if reply_timeout_s:
        worker.REPLY_TIMEOUT_S = _stream.STALL_S = reply_timeout_s
    if max_fds:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max_fds, max_fds))
    if max_segment_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_segment_bytes, max_segment_bytes))

    def on_turn(layer: int, tag: int) -> None:
        os.write(events, EVENT.pack(TURN, layer, tag))
        if layer in (GATED, STEPPED):
            os.read(gate, 1)
        if layer == BROKEN:
            raise RuntimeError(f"no luck with call {tag}")

    configure("info", as_json=False)
    backend = SlabArithmetic if has_gpu else SteppingArithmetic
    daemon = Daemon(backend(on_turn), address)
    daemon._turns._queue = TellingQueue(events)
    daemon.run()


if __name__ == "__main__":
    main()
