"""The worker of a replay: random experts or none, at a speed of its own.

python -m moeshm.bench.replay_worker unix:PATH SETUP

SETUP is a `WorkerSetup` as JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec

from moeshm.placement import Placement

from .replay_model import Computed, Shape, make_backend

#: Its name in the placement.
NAME = "worker"


class WorkerSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker serves."""

    shape: Shape
    #: A file that says which experts it holds.
    placement: str
    computed: Computed


def main(words: Sequence[str]) -> None:
    """Serve until SIGTERM."""
    address, text = words
    setup = msgspec.json.decode(text, type=WorkerSetup)
    experts = Placement.load(setup.placement).experts_of(NAME)
    backend = make_backend(setup.shape, experts, setup.computed)
    # Here, as the engine needs only the setup.
    from moeshm.daemon import Daemon

    Daemon(backend, listen=address).run()


if __name__ == "__main__":
    main(sys.argv[1:])
