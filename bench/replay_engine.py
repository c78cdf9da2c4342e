"""Replays a trace through `ExpertOffload` once, in a fresh process; `replay` starts it.

    python -m moeshm.bench.replay_engine SETUP CLIENT_CPU SERVER_CPU SECONDS MESSAGES

SETUP is an `EngineSetup` as JSON. Prints one `Run` as JSON.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from moeshm import settings
from moeshm.backends import Backend
from moeshm.dtypes import Array, DType, dtype_of, narrow, widen
from moeshm.offload import ExpertOffload, OffloadStats
from moeshm.placement import Placement
from moeshm.policy import Policy

from .processes import pin, worker_process
from .replay_model import make_backend
from .replay_trace import Trace
from .replay_worker import NAME, WorkerSetup
from .schema import Candidate

#: Uncounted passes, through so many layers: they fault pages in, and `auto` begins to measure.
WARM_UP_LAYERS = 4
WARM_UP_STEPS = 8
#: Tokens whose sum is checked at the end, in the first layer.
_CHECKED_TOKENS = 4
#: Largest difference from what this process computes, as a share of the largest value.
_TOLERANCES = {DType.F32: 1e-4, DType.F16: 1e-2}


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What is replayed, and how."""

    worker: WorkerSetup
    #: A file that `Trace.load` reads.
    trace: str
    chunk: int
    mode: str
    transport: str
    #: Of the engine's activations, which travel as they are.
    wire_dtype: str
    #: How many times as long as it takes the local part shall take.
    local_slowdown: float


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What one replay measured."""

    calls: int
    prefill_calls: int
    rows: int
    payload_bytes: int
    prefill_s: float
    fallback_calls: int
    pack_s: float
    wait_s: float
    unpack_s: float
    compute_s: float
    #: What `explain` says of a chunk after the prefill, and of a token after the completion.
    prefill_candidates: list[Candidate]
    decode_candidates: list[Candidate]
    #: None without a completion.
    decode_tokens_per_s: float | None

    @property
    def exchange_s(self) -> float:
        """Sending, waiting and receiving; what the worker does meanwhile is in it."""
        return self.pack_s + self.wait_s + self.unpack_s

    @property
    def transport_s(self) -> float:
        """The same without the worker's own time, as far as it was waited for."""
        return self.pack_s + max(0.0, self.wait_s - self.compute_s) + self.unpack_s


class Engine(NamedTuple):
    """What stands in for an inference engine: its MoE layers, and activations that never change."""

    offload: ExpertOffload
    #: [at least chunk, hidden_size].
    pool: Array
    fallback: Backend
    trace: Trace

    def forward(self, layer: int, tokens: slice) -> Array:
        """One layer's experts for these tokens of the trace."""
        result: Array = self.offload.forward(
            layer,
            self.pool[: tokens.stop - tokens.start],
            self.trace.topk_ids[layer, tokens],
            self.trace.topk_weights[layer, tokens],
        )
        return result

    def check(self) -> None:
        """Compare a small forward with what this process computes; RuntimeError."""
        tokens = slice(0, min(_CHECKED_TOKENS, self.trace.topk_ids.shape[1]))
        found = widen(self.forward(0, tokens))
        expected = np.zeros_like(found)
        x = self.pool[: len(found)]
        ids, weights = self.trace.topk_ids[0, tokens], self.trace.topk_weights[0, tokens]
        is_hot = self.offload.placement.is_hot(0)[ids]
        for mine in (is_hot, ~is_hot):
            part = np.zeros_like(expected)
            rows = np.flatnonzero(mine.any(axis=1))
            part_ids = np.where(mine, ids, np.int32(-1))[rows]
            out = np.empty((len(rows), x.shape[1]), np.float32)
            self.fallback.ffn(0, x[rows], part_ids, weights[rows], out)
            part[rows] = out
            expected += part
        # A null backend answers rows without an expert, too: left out where it did so here.
        rows = np.flatnonzero(is_hot.any(axis=1) | ~is_hot.any())
        limit = _TOLERANCES[dtype_of(x)]
        difference = float(np.abs((found - expected)[rows]).max(initial=0) / np.abs(expected).max())
        if not difference <= limit:
            raise RuntimeError(f"forward differs by {difference:.2g} of the largest value")


def main(words: Sequence[str]) -> None:
    """Replay the trace that the setup names."""
    text, client_cpu, server_cpu, *_ = words
    setup = msgspec.json.decode(text, type=EngineSetup)
    with engine(setup, int(client_cpu), int(server_cpu)) as opened:
        run = replay(opened, setup.chunk)
        opened.check()
    print(msgspec.json.encode(run).decode(), flush=True)


@contextlib.contextmanager
def engine(setup: EngineSetup, client_cpu: int, server_cpu: int) -> Iterator[Engine]:
    """A worker in a process of its own, and an engine in this one, each on its CPU."""
    worker = setup.worker
    trace = Trace.load(setup.trace)
    placement = Placement.load(worker.placement)
    hot = {n: placed.hot for n, placed in placement.layers.items() if placed.hot}
    every = {n: range(worker.shape.num_experts) for n in placement.layers}
    local = make_backend(worker.shape, hot, worker.is_null, worker.seed, setup.local_slowdown)
    fallback = make_backend(worker.shape, every, worker.is_null, worker.seed, 1)
    dtype = DType.parse(setup.wire_dtype)
    random = np.random.default_rng(worker.seed)
    rows = random.standard_normal((setup.chunk, worker.shape.hidden_size), np.float32)
    policy = Policy(
        mode=setup.mode,
        transport=setup.transport,
        wire_dtype=setup.wire_dtype,
        batch_capacity=settings.current().batch_capacity,
    )
    with worker_process("replay_worker", msgspec.json.encode(worker).decode()) as (pid, address):
        offload = ExpertOffload(
            {NAME: address}, placement, local=local, fallback=fallback, policy=policy
        )
        try:
            # Not before: a process that may use one CPU only has reason never to spin.
            pin(os.getpid(), client_cpu)
            pin(pid, server_cpu)
            gc.disable()
            yield Engine(offload, narrow(rows, dtype), fallback, trace)
        finally:
            gc.enable()
            offload.close()


def replay(engine: Engine, chunk: int) -> Run:
    """Prefill by chunks and decode, every layer each time; a short warm-up goes first."""
    trace = engine.trace
    passes = list(trace.passes(chunk))
    prefill = [tokens for tokens in passes if tokens.start < trace.n_prompt]
    decode = passes[len(prefill) :]
    run_passes(engine, prefill[:1] + decode[:WARM_UP_STEPS], min(WARM_UP_LAYERS, trace.n_layers))
    before = engine.offload.stats()
    prefill_s = run_passes(engine, prefill, trace.n_layers)
    middle = engine.offload.stats()
    prefill_candidates = candidates(engine.offload, prefill[0].stop)
    decode_s = run_passes(engine, decode, trace.n_layers)
    after = engine.offload.stats()
    return Run(
        calls=after.messages - before.messages,
        prefill_calls=middle.messages - before.messages,
        rows=after.rows - before.rows,
        payload_bytes=after.bytes_out - before.bytes_out,
        prefill_s=prefill_s,
        decode_tokens_per_s=len(decode) / decode_s if decode else None,
        fallback_calls=after.fallback_calls - before.fallback_calls,
        **_times(before, after),
        prefill_candidates=prefill_candidates,
        decode_candidates=candidates(engine.offload, 1),
    )


def run_passes(engine: Engine, passes: Sequence[slice], n_layers: int) -> float:
    """Forward these tokens through the layers; how long it took, in seconds."""
    start = time.perf_counter()
    for tokens in passes:
        for layer in range(n_layers):
            engine.forward(layer, tokens)
    return time.perf_counter() - start


def candidates(offload: ExpertOffload, n_tokens: int) -> list[Candidate]:
    """What the policy thinks of every way to send a forward of about so many tokens; none if it
    has seen no such forward."""
    return [
        Candidate(
            n_tokens=n_tokens,
            transport=verdict.transport,
            wire_dtype=str(verdict.wire_dtype),
            slice_tokens=verdict.slice_tokens,
            predicted_us=verdict.predicted_ns / 1e3,
            expected_us=verdict.expected_ns / 1e3,
            measured_us=None if verdict.measured_ns is None else verdict.measured_ns / 1e3,
            n_measured=verdict.n_measured,
            is_chosen=verdict.is_chosen,
            why=verdict.why,
        )
        for explanation in offload.explain(0)
        if explanation.work.n_tokens.bit_length() == n_tokens.bit_length()
        for verdict in explanation.verdicts
    ]


def _times(before: OffloadStats, after: OffloadStats) -> dict[str, float]:
    names = ("pack_s", "wait_s", "unpack_s", "compute_s")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


if __name__ == "__main__":
    main(sys.argv[1:])
