"""A fault that is injected, and what came of it."""

from __future__ import annotations

import msgspec


class Load(msgspec.Struct, frozen=True):
    """What the calls of a round are."""

    seed: int = 0
    n_small: int = 3
    n_wide: int = 3
    n_threads: int = 1
    #: What the engine itself computes while its calls are on their way.
    engine_s: float = 0.004


#: Of a round that only looks whether everything is well.
LIGHT = Load(n_small=1, n_wide=1, n_threads=0, engine_s=0.0)


class Shot(msgspec.Struct, frozen=True):
    """A fault: at which reaching of a point (0: one in the middle of a round), and what happens
    there, "KILL" or "STOP"."""

    point: str
    nth: int
    signal: str
    load: Load = Load()
    #: No round begins later, if the point was not reached by then.
    patience_s: float = 60.0


class Hit(msgspec.Struct):
    """What came of it; `problems` is empty when everything was as it has to be."""

    nth: int
    problems: list[str]
    #: Calls by outcome.
    tally: dict[str, int]
    was_reached: bool = True
    #: From the fault to the survivors' last call, and until what the victim had was freed.
    ended_after_s: float = 0.0
    freed_after_s: float = 0.0
