"""A small replay, and what one must send, worked out token by token, to hold its counts against."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from moeshm.bench import harness, replay, replay_engine, replay_trace
from moeshm.bench.replay import Replay, Way
from moeshm.bench.replay_engine import Engine
from moeshm.bench.replay_model import SHAPES
from moeshm.bench.replay_trace import Trace

HEADER_BYTES = 64


def hot_experts(trace: Trace, hot: float) -> list[set[int]]:
    """The most used ones of each layer, the lower id first; counted anew, without numpy's help."""
    found = []
    for layer in trace.topk_ids:
        ids = [int(expert) for expert in layer.ravel()]
        order = sorted(range(trace.num_experts), key=lambda e: (-ids.count(e), e))
        found.append(set(order[: round(hot * trace.num_experts)]))
    return found


def messages(trace: Trace, hot: float, chunk: int, window: int) -> list[int]:
    """Rows of every message that is sent: a pass, its layers, their windows, token by token."""
    keep = hot_experts(trace, hot)
    passes = [range(a, min(a + chunk, trace.n_prompt)) for a in range(0, trace.n_prompt, chunk)]
    passes += [range(t, t + 1) for t in range(trace.n_prompt, trace.topk_ids.shape[1])]
    rows = []
    for tokens in passes:
        for layer, kept in zip(trace.topk_ids, keep, strict=True):
            for start in range(0, len(tokens), window):
                inside = tokens[start : start + window]
                cold = sum(not kept.issuperset(layer[token].tolist()) for token in inside)
                rows += [cold] if cold else []
    return rows


def payload(rows: list[int], hidden_size: int, itemsize: int, top_k: int) -> int:
    """Bytes of the messages: header, ids and weights to a multiple of 64, activations."""
    return sum(
        -(-(HEADER_BYTES + n * top_k * 8) // 64) * 64 + n * hidden_size * itemsize for n in rows
    )


def small_replay() -> Replay:
    """Four layers of 16 experts, half of them hot; two chunks of six tokens, then two tokens."""
    trace = replay_trace.synthetic(SHAPES["tiny"], 12, 2, seed=0)
    ways = [Way("batched", "shared", "f16", 1.0)]
    return Replay(SHAPES["tiny"], 1, trace, hot=0.5, chunk=6, is_null=True, warm_up=1, ways=ways)


@contextlib.contextmanager
def opened(small: Replay, folder: Path) -> Iterator[Engine]:
    """An engine in this process, as its own process has it; the CPUs are given back."""
    paths = folder / "trace.npz", folder / "placement.json"
    small.trace.save(paths[0])
    small.placement().save(paths[1])
    setup = replay.engine_setup(small, small.ways[0], 0, *paths)
    usable = os.sched_getaffinity(0)
    try:
        with replay_engine.engine(setup, *harness.choose_cpus()) as engine:
            yield engine
    finally:
        os.sched_setaffinity(0, usable)
