"""The question: how long does a decode's call wait when others' prefills keep the worker busy?"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from moeshm.dtypes import DType
from moeshm.errors import WorkerFailed

from . import harness
from .harness import CellSamples, Plan
from .overload_client import ClientSetup, Found
from .overload_worker import WorkerSetup
from .processes import worker_process
from .replay_model import Computed, Shape
from .schema import OverloadReport, OverloadRow

#: A decode's client does something else between its calls, as an engine does.
PAUSE_S = 0.005
#: Until all clients of a phase have heard that it begins.
_SOON_S = 0.2
DECODE, PREFILL = "decode", "prefill"
ALONE, ALONE_NO_STEPS, STEPS, NO_STEPS = "alone", "alone-no-steps", "steps", "no-steps"
#: What runs, by whether the worker computes in steps.
_PHASES = (
    (ALONE, True, (DECODE,)),
    (ALONE, True, (PREFILL,)),
    (ALONE_NO_STEPS, False, (PREFILL,)),
    (STEPS, True, (DECODE, PREFILL)),
    (NO_STEPS, False, (DECODE, PREFILL)),
)


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be measured."""

    shape: Shape
    device: str
    weight_dtype: DType
    decode_clients: int
    prefill_clients: int
    prefill_tokens: int
    decode_tokens: int = 1
    deadline_s: float

    def clients(self, kind: str) -> tuple[int, int]:
        """How many of the kind, and the tokens of their calls."""
        is_decode = kind == DECODE
        return (
            (self.decode_clients, self.decode_tokens)
            if is_decode
            else (self.prefill_clients, self.prefill_tokens)
        )


class Run(NamedTuple):
    """What the clients of one kind found in one phase of one repeat."""

    phase: str
    kind: str
    found: list[Found]
    #: Why some found nothing.
    error: str | None


def measure(asked: Asked, plan: Plan, on_step: Callable[[str], None]) -> OverloadReport:
    """Run each phase, `plan.repeats` times in turns; `on_step` hears of each.

    WorkerFailed: no client came to an end.
    """
    meta = harness.metadata("overload", plan)
    runs: list[Run] = []

    def run(phase: tuple[str, bool, tuple[str, ...]]) -> bool:
        runs.extend(_run(asked, plan, *phase))
        on_step(phase[0])
        return True

    harness.interleave(_PHASES, plan, run)
    if all(each.error for each in runs):
        raise WorkerFailed(f"nothing was measured: {runs[0].error}")
    cells = dict.fromkeys((each.phase, each.kind) for each in sorted(runs, key=_order))
    return OverloadReport(
        meta=meta,
        device=asked.device,
        shape=asked.shape.name,
        hidden_size=asked.shape.hidden_size,
        intermediate_size=asked.shape.intermediate_size,
        num_experts=asked.shape.num_experts,
        top_k=asked.shape.top_k,
        weight_dtype=str(asked.weight_dtype),
        deadline_ms=asked.deadline_s * 1e3,
        results=[
            _row(asked, *cell, plan, [each for each in runs if (each.phase, each.kind) == cell])
            for cell in cells
        ],
    )


def count_steps(plan: Plan) -> int:
    """How often `measure` calls `on_step`."""
    return plan.repeats * len(_PHASES)


def _order(run: Run) -> tuple[str, int]:
    phases = [phase for phase, _, _ in _PHASES]
    return run.kind, phases.index(run.phase)


def _run(asked: Asked, plan: Plan, phase: str, steps: bool, kinds: Sequence[str]) -> Iterator[Run]:
    """One phase, with a worker of its own."""
    computed = Computed(
        is_null=False, seed=plan.seed, device=asked.device, weight_dtype=asked.weight_dtype
    )
    setup = WorkerSetup(shape=asked.shape, computed=computed, steps=steps)
    text = msgspec.json.encode(setup).decode()
    with contextlib.ExitStack() as stack:
        worker = worker_process("overload_worker", text, variables=harness.ONE_THREAD)
        _, address = stack.enter_context(worker)
        clients = [
            (kind, stack.enter_context(_client(asked, plan, address, kind, number)))
            for kind in kinds
            for number in range(asked.clients(kind)[0])
        ]
        # Each has had an answer.
        is_ready = {client.pid: _line(client) == "ready" for _, client in clients}
        begin_s = time.monotonic() + _SOON_S
        for _, client in clients:
            if is_ready[client.pid] and client.stdin is not None:
                client.stdin.write(f"{begin_s} {begin_s + plan.seconds}\n")
                client.stdin.flush()
        outcomes = [(kind, _line(client)) for kind, client in clients]
    for kind in kinds:
        found, error = [], None
        for each, line in outcomes:
            if each == kind and line:
                found.append(msgspec.json.decode(line, type=Found))
            elif each == kind:
                error = "a client ended without a result"
        yield Run(phase, kind, found, error)


def _client(
    asked: Asked, plan: Plan, address: str, kind: str, number: int
) -> subprocess.Popen[str]:
    is_decode = kind == DECODE
    setup = ClientSetup(
        address=address,
        shape=asked.shape,
        n_tokens=asked.clients(kind)[1],
        timeout_s=asked.deadline_s if is_decode else 0.0,
        pause_s=PAUSE_S if is_decode else 0.0,
        seed=plan.seed + number,
    )
    return subprocess.Popen(
        harness.python_program("overload_client", msgspec.json.encode(setup).decode())(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **harness.ONE_THREAD},
    )


def _line(client: subprocess.Popen[str]) -> str:
    """What it says next; empty if it ended."""
    assert client.stdout is not None
    return client.stdout.readline().strip()


def _row(asked: Asked, phase: str, kind: str, plan: Plan, runs: Sequence[Run]) -> OverloadRow:
    n_clients, n_tokens = asked.clients(kind)
    samples, rates = [], []
    found = [each for run in runs if run.error is None for each in run.found]
    for run in runs:
        durations = [duration for each in run.found for duration in each.durations_ns]
        samples.append(CellSamples(f"{phase} {kind}", 1, durations, run.error))
        if run.error is not None:
            continue
        # The last call of each ends after the end, by which it is longer.
        busy_s = max((sum(each.durations_ns) for each in run.found), default=0) / 1e9
        done = sum(each.done for each in run.found) * n_tokens
        if done:
            rates.append(done / max(plan.seconds, busy_s))
    row = OverloadRow(
        kind=kind, phase=phase, clients=n_clients, n_tokens=n_tokens, **harness.summarise(samples)
    )
    durations = [duration for each in found for duration in each.durations_ns]
    late = [each_late for each in found for each_late in each.late_ns]
    if durations:
        row.max_us = max(durations) / 1e3
    if rates:
        row.tokens_per_s = float(np.median(rates))
    row.missed = sum(each.missed + each.lost for each in found)
    row.reconnects = sum(each.reconnects for each in found)
    row.late_p99_us, row.late_max_us = _tail(late)
    row.sleep_late_p99_us, row.sleep_late_max_us = _tail(
        [each_late for each in found for each_late in each.sleep_late_ns]
    )
    return row


def _tail(times_ns: Sequence[int]) -> tuple[float | None, float | None]:
    """99th percentile and greatest, in us; None of nothing."""
    if not times_ns:
        return None, None
    return float(np.percentile(times_ns, 99)) / 1e3, max(times_ns) / 1e3
