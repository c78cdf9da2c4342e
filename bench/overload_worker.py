"""The worker of `overload`: one layer of random experts, in steps or not.

python -m moeshm.bench.overload_worker unix:PATH SETUP

SETUP is a `WorkerSetup` as JSON.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import msgspec

from moeshm.backends import Backend, MemoryUser
from moeshm.backends.cpu import CpuBackend
from moeshm.checkpoint import ExpertLayer

from .replay_model import CPU, Computed, Shape, make_backend, random_expert

#: The layer's number.
LAYER = 0


class WorkerSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker serves."""

    shape: Shape
    computed: Computed
    #: Long calls let others pass.
    steps: bool


class Unstepped:
    """A backend that computes every call at once.

    Nothing else of it is there: not its slabs, which clients of this benchmark do not have.
    """

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self.layers = backend.layers
        self.ffn = backend.ffn


class UnsteppedUser(Unstepped):
    """The same of one that copies from and to registered memory."""

    def __init__(self, backend: MemoryUser) -> None:
        super().__init__(backend)
        self.use_memory = backend.use_memory


def unstepped(backend: Backend) -> Backend:
    """The same without steps, and else as fast."""
    return UnsteppedUser(backend) if isinstance(backend, MemoryUser) else Unstepped(backend)


def main(words: Sequence[str]) -> None:
    """Serve until SIGTERM."""
    address, text = words
    setup = msgspec.json.decode(text, type=WorkerSetup)
    backend = _backend(setup)
    from moeshm.daemon import Daemon

    Daemon(backend if setup.steps else unstepped(backend), listen=address).run()


def _backend(setup: WorkerSetup) -> Backend:
    experts = range(setup.shape.num_experts)
    if setup.computed.device != CPU:
        return make_backend(setup.shape, {LAYER: experts}, setup.computed)
    # With all threads, as `moeshm worker` has them.
    dtype, seed = setup.computed.weight_dtype, setup.computed.seed
    weights = [random_expert(setup.shape, seed, dtype, expert) for expert in experts]
    layer = ExpertLayer(setup.shape.layer(experts, dtype), weights)
    return CpuBackend({LAYER: layer}, len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main(sys.argv[1:])
