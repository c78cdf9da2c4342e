"""Measures `client.compute` against a null worker in a fresh process; `harness` starts it.

    python -m moeshm.bench.call_client TRANSPORT DTYPE SEED CLIENT_CPU SERVER_CPU SECONDS
                                       MESSAGES CELL...

A cell is `call:N_TOKENS`, or `idle:SECONDS` for the CPU time that the connected worker uses while
nobody calls it. Prints one line of JSON per cell (`harness.CellSamples`); an idle cell's
durations are the CPU time used and the time waited.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

import moeshm
from moeshm.dtypes import Array, DType

from .harness import CellSamples
from .null_worker import HIDDEN_SIZE, LAYER, NUM_EXPERTS, TOP_K
from .processes import pin, worker_process

_MOST_CALLS = 20_000
_LEAST_CALLS = 10


def main(words: Sequence[str]) -> None:
    """Measure the cells that the command line names."""
    transport, dtype, seed, client_cpu, server_cpu, seconds, messages, *cells = words
    random = np.random.default_rng(int(seed))
    with (
        worker_process("null_worker") as (worker_pid, address),
        moeshm.connect(address, transport=transport) as client,
    ):
        # Not before: a process that may use one CPU only has reason never to spin.
        pin(os.getpid(), int(client_cpu))
        pin(worker_pid, int(server_cpu))
        gc.disable()
        for cell in cells:
            kind, _, number = cell.partition(":")
            if kind == "idle":
                durations = idle_cpu_ns(worker_pid, float(number))
            else:
                inputs = make_inputs(int(number), DType.parse(dtype), random)
                call = functools.partial(client.compute, LAYER, *inputs)
                durations = time_calls(call, float(seconds), int(messages))
            print(msgspec.json.encode(CellSamples(cell, 1, durations)).decode(), flush=True)


def make_inputs(n_tokens: int, dtype: DType, random: np.random.Generator) -> tuple[Array, ...]:
    """hidden_states [n_tokens, 2048], topk_ids [n_tokens, 8] int32, topk_weights float32."""
    hidden_states = random.standard_normal((n_tokens, HIDDEN_SIZE), np.float32)
    topk_ids = random.integers(0, NUM_EXPERTS, (n_tokens, TOP_K), np.int32)
    topk_weights = random.random((n_tokens, TOP_K), np.float32)
    return hidden_states.astype(dtype.numpy), topk_ids, topk_weights


def time_calls(call: Callable[[], Any], seconds: float, messages: int) -> list[int]:
    """Durations of single calls, ns, as many as fit in `seconds` unless `messages` says."""
    clock = time.perf_counter_ns
    warm_up = messages // 10 + 1 if messages else _LEAST_CALLS
    start = clock()
    for _ in range(warm_up):
        call()
    each_ns = (clock() - start) / warm_up
    count = messages or min(_MOST_CALLS, max(_LEAST_CALLS, int(seconds * 1e9 / each_ns)))
    stamps = [clock()] * (count + 1)
    for i in range(1, count + 1):
        call()
        stamps[i] = clock()
    durations: list[int] = np.diff(stamps).tolist()
    return durations


def idle_cpu_ns(pid: int, seconds: float) -> list[int]:
    """CPU time, in ns, that a process uses while this one sleeps, and how long that was."""
    # clock_getcpuclockid(3) of another process, as Linux defines it: ~pid << 3 | CPUCLOCK_SCHED.
    cpu_clock = ~pid << 3 | 2
    used, begun = time.clock_gettime_ns(cpu_clock), time.perf_counter_ns()
    time.sleep(seconds)
    return [time.clock_gettime_ns(cpu_clock) - used, time.perf_counter_ns() - begun]


if __name__ == "__main__":
    main(sys.argv[1:])
