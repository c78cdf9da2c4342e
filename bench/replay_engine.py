"""Replays a trace through `ExpertOffload` once, in a fresh process; `replay` starts it.

    python -m moeshm.bench.replay_engine SETUP CLIENT_CPU SERVER_CPU SECONDS MESSAGES

SETUP is an `EngineSetup` as JSON. Prints one `Run` as JSON.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from moeshm import settings
from moeshm.backends import Backend
from moeshm.dtypes import Array, DType, FloatArray, narrow, widen
from moeshm.offload import ExpertOffload, OffloadStats
from moeshm.placement import Placement
from moeshm.policy import Policy

from .processes import pin, worker_process
from .replay_model import CPU, Computed, make_backend
from .replay_trace import Trace
from .replay_worker import NAME, WorkerSetup
from .schema import Candidate

#: Of a chunk, in each uncounted pass of the warm-up: models of few layers repeat their chunk.
WARM_UP_FORWARDS = 64
#: Single tokens of the completion in each of these passes.
WARM_UP_STEPS = 8
#: By format of the activations, or of what is between the matrices: see `Engine.tolerance`.
_TOLERANCES = {DType.F32: 1e-4, DType.F16: 1e-2, DType.BF16: 3e-2}


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
    #: The local part.
    computed: Computed
    #: Passes that go first, uncounted.
    warm_up: int
    #: Whether the cold part is played again, with nothing to hide behind.
    is_played_alone: bool


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What one replay measured."""

    calls: int
    prefill_calls: int
    rows: int
    payload_bytes: int
    prefill_s: float
    #: Since the offload was made: one in the warm-up spoils what follows, too.
    fallback_calls: int
    losses: int
    pack_s: float
    wait_s: float
    unpack_s: float
    compute_s: float
    #: What `explain` says of a chunk after the prefill, and of a token after the completion.
    prefill_candidates: list[Candidate]
    decode_candidates: list[Candidate]
    #: None without a completion.
    decode_tokens_per_s: float | None
    #: The cold part with nothing to hide behind: its calls, and the forwards around them. None
    #: where it was not played.
    alone_s: float | None
    alone_forward_s: float | None

    @property
    def exchange_s(self) -> float:
        """Sending, waiting and receiving, as far as the local part did not hide it."""
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
    #: Largest difference from what this process computes, as a share of the largest value.
    tolerance: float

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
        """Compare the first chunk in the last layer with what this process computes.

        RuntimeError: it differs, or the fallback had a part in it.
        """
        layer = self.trace.n_layers - 1
        tokens = next(self.trace.passes(len(self.pool)))
        before = self.offload.stats()
        found = widen(self.forward(layer, tokens))
        if self.offload.stats().fallback_calls != before.fallback_calls:
            raise RuntimeError("the fallback computed what the worker should have")
        ids = self.trace.topk_ids[layer, tokens]
        is_hot = self.offload.placement.is_hot(layer)[ids]
        expected = np.zeros_like(found)
        # The local part is given every row, if one has a hot expert, and the worker those that
        # have a cold one. A null backend answers whatever row it is given.
        if is_hot.any():
            expected += self._compute(layer, tokens, is_hot)
        cold = ~is_hot.all(axis=1)
        expected[cold] += self._compute(layer, tokens, ~is_hot)[cold]
        difference = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not difference <= self.tolerance:
            raise RuntimeError(f"forward differs by {difference:.2g} of the largest value")

    def _compute(self, layer: int, tokens: slice, wanted: npt.NDArray[np.bool_]) -> FloatArray:
        """The wanted slots of these tokens, float32, in this process."""
        ids = np.where(wanted, self.trace.topk_ids[layer, tokens], np.int32(-1))
        x = self.pool[: len(ids)]
        out = np.empty(x.shape, np.float32)
        self.fallback.ffn(layer, x, ids, self.trace.topk_weights[layer, tokens], out)
        return out


def main(words: Sequence[str]) -> None:
    """Replay the trace that the setup names."""
    text, client_cpu, server_cpu, *_ = words
    setup = msgspec.json.decode(text, type=EngineSetup)
    with engine(setup, int(client_cpu), int(server_cpu)) as opened:
        run = replay(opened, setup.warm_up, setup.is_played_alone)
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
    computed = setup.computed
    local = make_backend(worker.shape, hot, computed)
    # On the CPU, as no GPU need have room for all.
    at_hand = msgspec.structs.replace(computed, slowdown=1.0, device=CPU)
    fallback = make_backend(worker.shape, every, at_hand)
    dtype = DType.parse(setup.wire_dtype)
    random = np.random.default_rng(computed.seed)
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
            tolerance = _TOLERANCES[dtype]
            if (computed.device, worker.computed.device) != (CPU, CPU):
                # GPUs round to the weights' format in between.
                tolerance = max(tolerance, _TOLERANCES[computed.weight_dtype])
            yield Engine(offload, narrow(rows, dtype), fallback, trace, tolerance)
        finally:
            gc.enable()
            offload.close()


def replay(engine: Engine, warm_up: int, is_played_alone: bool) -> Run:
    """Prefill by chunks and decode, every layer each time, after so many passes of warm-up."""
    trace = engine.trace
    passes = list(trace.passes(len(engine.pool)))
    prefill = [tokens for tokens in passes if tokens.start < trace.n_prompt]
    decode = passes[len(prefill) :]
    # Page faults are over then, and `auto` has made its first tries.
    chunks = prefill[:1] * math.ceil(WARM_UP_FORWARDS / trace.n_layers)
    run_passes(engine, (chunks + decode[:WARM_UP_STEPS]) * warm_up)
    before = engine.offload.stats()
    prefill_s = run_passes(engine, prefill)
    middle = engine.offload.stats()
    prefill_candidates = candidates(engine.offload, prefill[0].stop)
    decode_s = run_passes(engine, decode)
    after = engine.offload.stats()
    decode_candidates = candidates(engine.offload, 1)
    alone = play_alone(engine, passes) if is_played_alone else (None, None)
    last = engine.offload.stats()
    return Run(
        calls=after.messages - before.messages,
        prefill_calls=middle.messages - before.messages,
        rows=after.rows - before.rows,
        payload_bytes=after.bytes_out - before.bytes_out,
        prefill_s=prefill_s,
        decode_tokens_per_s=len(decode) / decode_s if decode else None,
        fallback_calls=last.fallback_calls,
        losses=sum(last.losses.values()),
        **_times(before, after),
        prefill_candidates=prefill_candidates,
        decode_candidates=decode_candidates,
        alone_s=alone[0],
        alone_forward_s=alone[1],
    )


def play_alone(engine: Engine, passes: Sequence[slice]) -> tuple[float, float]:
    """The cold part of these passes while the engine computes nothing: from the beginning of
    sending to the result, summed over the calls, and all that `forward` takes, in seconds."""
    trace = engine.trace.without_hot(engine.offload.placement)
    before = engine.offload.stats()
    forward_s = run_passes(engine._replace(trace=trace), passes)
    return engine.offload.stats().elapsed_s - before.elapsed_s, forward_s


def run_passes(engine: Engine, passes: Sequence[slice]) -> float:
    """Forward these tokens through all layers; how long it took, in seconds."""
    start = time.perf_counter()
    for tokens in passes:
        for layer in range(engine.trace.n_layers):
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
