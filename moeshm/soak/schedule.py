"""Which faults are injected when: drawn from the seed alone, so that it repeats them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from .hostile import ATTACKS

#: Mean of all kinds together.
FAULTS_PER_S = 6.0
#: By kind, how often in proportion. A worker that is restarted takes part of a CPU for a while.
WEIGHTS = {
    "worker killed": 8.0,
    "worker ended by SIGTERM": 4.0,
    "worker stopped": 10.0,
    "worker stopped and killed": 4.0,
    "own worker killed": 5.0,
    "own worker stopped": 6.0,
    "own worker stopped and killed": 2.0,
    "caller killed": 3.0,
    "caller stopped": 6.0,
    **{f"hostile: {name}": 9.0 for name in ATTACKS},
}
#: How long something stands still.
STOP_S = (0.02, 1.5)


class Fault(NamedTuple):
    """One fault: when, counted in seconds during which faults are injected; `draw` in 0..1 chooses
    whom it hits of those that are there, and `for_s` is how long it lasts, if it does."""

    at_s: float
    kind: str
    draw: float
    for_s: float


def faults(seed: int) -> Iterator[Fault]:
    """Without end, in the order of time."""
    rng = random.Random(seed)
    at_s = 0.0
    while True:
        at_s += rng.expovariate(FAULTS_PER_S)
        (kind,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        yield Fault(at_s, kind, rng.random(), rng.uniform(*STOP_S))
