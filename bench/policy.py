"""The question: what does the policy predict, what is measured, and what does it choose?

    python -m moeshm.bench.policy SETUP CLIENT_CPU SERVER_CPU SECONDS MESSAGES N_TOKENS...

As a program, it does in a fresh process what `measure` asks for: SETUP is an `EngineSetup` as JSON,
and it prints the candidates as JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from moeshm.errors import WorkerFailed
from moeshm.offload import OffloadStats

from . import harness, replay
from .harness import Plan
from .replay import Replay
from .replay_engine import Engine, EngineSetup, candidates, engine
from .schema import Candidate, Overlap, PolicyReport

#: More layers learn no more: those of equal shape share what is learnt.
LAYERS = 4
#: Forwards of one kind before the next kind's turn.
TURN = 3


class Found(msgspec.Struct):
    """What the program prints."""

    candidates: list[Candidate]
    overlaps: list[Overlap]


def measure(asked: Replay, plan: Plan, n_tokens: Sequence[int]) -> PolicyReport:
    """Run `plan.messages` forwards of each number of tokens, and explain the candidates after them.

    `asked` has one way. WorkerFailed: the run ended with an error, or a call was lost in it.
    """
    meta = harness.metadata("policy", plan)
    (way,) = asked.ways
    with replay.files(asked.trace, asked.placement()) as paths:
        setup = replay.engine_setup(asked, way, plan.seed, *paths)
        words = [*plan.arguments(), *map(str, n_tokens)]
        program = harness.python_program("policy", msgspec.json.encode(setup).decode())
        output, problem = harness.run_program(
            [*program(), *words], replay.LIMIT_S, harness.ONE_THREAD
        )
    if problem is not None:
        raise WorkerFailed(f"the forwards failed: {problem}")
    found = msgspec.json.decode(output, type=Found)
    return PolicyReport(
        meta=meta,
        trace=asked.summary(),
        remote_speed=way.remote_speed,
        results=found.candidates,
        overlaps=found.overlaps,
    )


def main(words: Sequence[str]) -> None:
    """Run the forwards, and print what the policy says."""
    text, client_cpu, server_cpu, _, forwards, *numbers = words
    setup = msgspec.json.decode(text, type=EngineSetup)
    found = Found([], [])
    with engine(setup, int(client_cpu), int(server_cpu)) as opened:
        for n_tokens in map(int, numbers):
            _run_forwards(opened, n_tokens, int(forwards))
            found.candidates += candidates(opened.offload, n_tokens)
            found.overlaps.append(_overlap(opened, n_tokens, int(forwards)))
        check_nothing_was_lost(opened.offload.stats())
    print(msgspec.json.encode(found).decode(), flush=True)


def check_nothing_was_lost(stats: OffloadStats) -> None:
    """RuntimeError: what was measured is not what the worker does."""
    losses = sum(stats.losses.values())
    if losses or stats.fallback_calls:
        raise RuntimeError(
            f"fallback_calls={stats.fallback_calls}, losses={losses}: the worker must compute "
            "every call; run it again on a machine with less to do"
        )


def _run_forwards(opened: Engine, n_tokens: int, forwards: int) -> list[float]:
    """How long each took, in us."""
    trace = opened.trace
    last = trace.topk_ids.shape[1] - n_tokens
    elapsed_us = []
    for number in range(forwards):
        start = number * n_tokens % (last + 1)
        begun_ns = time.perf_counter_ns()
        opened.forward(number % trace.n_layers, slice(start, start + n_tokens))
        elapsed_us.append((time.perf_counter_ns() - begun_ns) / 1e3)
    return elapsed_us


def _overlap(opened: Engine, n_tokens: int, forwards: int) -> Overlap:
    """Time the whole, the hot part and the cold part, in turns, so that a slow moment of the
    machine falls on all three."""
    trace, placement = opened.trace, opened.offload.placement
    traces = (trace, trace.without_cold(placement), trace.without_hot(placement))
    engines = [opened._replace(trace=each) for each in traces]
    times = [_run_forwards(each, n_tokens, TURN) for _ in range(forwards) for each in engines]
    # The first turn of each finds cold memory.
    whole, local, remote = (float(np.median(times[part + 3 :: 3])) for part in range(3))
    return Overlap(
        n_tokens=n_tokens,
        forward_us=whole,
        local_us=local,
        remote_us=remote,
        overlap_ratio=whole / max(local, remote),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
