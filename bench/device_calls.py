"""The question: what does a call from GPU to GPU cost beyond its kernels, by each way there is?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from moeshm.dtypes import DType
from moeshm.errors import UnsupportedPlatform, WorkerFailed

from . import harness
from .device_calls_client import (
    WAYS,
    Found,
    Line,
    Setup,
    activation_bytes,
    cell_name,
    cell_names,
    whats_of,
)
from .gpu_worker import Refused
from .harness import CellSamples, Job, Plan
from .kernels_shapes import KERNEL_SHAPES
from .schema import DeviceCallReport, DeviceCallRow, Floor

#: How long one way is measured with one number of tokens, per repeat: computing, and submitting.
CELL_SECONDS = 0.2
#: Calls of so many tokens are held against bare copies: of fewer, other things take longer.
COPY_TOKENS = 512
#: Compiling, loading and measuring.
_LIMIT_S = 1200.0
_RING_BYTES = 64
_CALLS, _RING = "device calls", "ring"


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be measured."""

    shape: str
    dtype: str
    n_tokens: list[int]
    engine_device: str
    worker_device: str
    #: The worker has a resident kernel for calls of few tokens.
    is_resident: bool = False


class Run(NamedTuple):
    """What one process said; `found` is None if it ended before that."""

    found: Found | None
    #: By cell, errors included.
    samples: dict[str, CellSamples]


def measure(asked: Asked, plan: Plan, on_step: Callable[[str], None]) -> DeviceCallReport:
    """Time calls by every way, and what they are held against; `on_step` hears of each process.

    UnsupportedPlatform: there is no GPU that can be used; WorkerFailed: nothing was measured.
    """
    meta = harness.metadata("device-calls", plan)
    program = harness.python_program("pair", "moeshm-spin", str(plan.seed))
    ring = Job(_RING, program, [f"latency:{_RING_BYTES}"])
    runs: list[Run] = []
    round_trips: list[CellSamples] = []

    def run(what: str) -> bool:
        if what == _CALLS:
            runs.append(_run(asked, plan, len(runs)))
            is_good = runs[-1].found is not None
        else:
            round_trips.extend(harness.run_job(ring, plan))
            is_good = round_trips[-1].error is None
        on_step(what)
        return is_good

    harness.interleave([_CALLS, _RING], plan, run)
    found = next(each.found for each in runs if each.found is not None)
    if found.engine_device == found.worker_device:
        meta.notes.append(
            "one GPU: engine and worker share it, and it works for one process at a time"
        )
    floors = _copies(asked, runs)
    floors.append(Floor(floor="ring", size_bytes=_RING_BYTES, **harness.summarise(round_trips)))
    return DeviceCallReport(
        meta=meta,
        engine_device=found.engine_device,
        worker_device=found.worker_device,
        engine_gpu=found.engine_gpu,
        worker_gpu=found.worker_gpu,
        is_resident=asked.is_resident,
        floors=floors,
        results=[_row(asked, n, way, runs, floors) for n in asked.n_tokens for way in WAYS],
    )


def count_steps(plan: Plan) -> int:
    """How often `measure` calls `on_step` when nothing fails."""
    return 2 * plan.repeats


# --- one process --------------------------------------------------------------------------


def _run(asked: Asked, plan: Plan, repeat: int) -> Run:
    """One repeat of all calls. UnsupportedPlatform; WorkerFailed: the first one found no GPU."""
    setup = Setup(
        shape=asked.shape,
        dtype=asked.dtype,
        n_tokens=asked.n_tokens,
        engine_device=asked.engine_device,
        worker_device=asked.worker_device,
        is_resident=asked.is_resident,
        seconds=plan.seconds,
        seed=plan.seed,
        repeat=repeat,
    )
    output, problem = harness.run_program(_command(setup), _LIMIT_S)
    found: Found | None = None
    samples: dict[str, CellSamples] = {}
    line: Line
    for line in harness.decode_lines(output, Line):
        if isinstance(line, Refused):
            raise UnsupportedPlatform(f"device calls need a GPU: {line.why}")
        if isinstance(line, Found):
            found = line
        else:
            samples[line.samples.cell] = line.samples
    missing = problem or "the program ended without a result"
    if found is None and repeat == 0:
        raise WorkerFailed(f"device calls were not measured: {missing}")
    for cell in cell_names(asked.n_tokens):
        samples.setdefault(cell, CellSamples(cell, error=missing))
    return Run(found, samples)


def _command(setup: Setup) -> list[str]:
    return harness.python_program("device_calls_client", msgspec.json.encode(setup).decode())()


# --- figures ------------------------------------------------------------------------------


def _copies(asked: Asked, runs: Sequence[Run]) -> list[Floor]:
    info = KERNEL_SHAPES[asked.shape].info(DType.parse(asked.dtype))
    rows = []
    for n_tokens in asked.n_tokens:
        size = activation_bytes(info, n_tokens)
        summary = harness.summarise(_samples(runs, cell_name("peer_copy", n_tokens)))
        row = Floor(floor="peer_copy", size_bytes=size, **summary)
        row.gb_per_s = harness.gb_per_s(2 * size, row.p50_us)
        rows.append(row)
    return rows


def _row(
    asked: Asked, n_tokens: int, way: str, runs: Sequence[Run], floors: Sequence[Floor]
) -> DeviceCallRow:
    row = DeviceCallRow(
        way=way,
        shape=asked.shape,
        dtype=asked.dtype,
        n_tokens=n_tokens,
        kernels_us=statistics.median(run.found.kernels_us[n_tokens] for run in runs if run.found),
        **harness.summarise(_samples(runs, cell_name("compute", n_tokens, way))),
    )
    submits = harness.summarise(_samples(runs, cell_name("submit", n_tokens, way)))
    row.submit_us = submits.get("p50_us")
    row.error = row.error or submits.get("error")
    if "stream" in whats_of(way):
        on_stream = harness.summarise(_samples(runs, cell_name("stream", n_tokens, way)))
        row.stream_us = on_stream.get("p50_us")
        row.error = row.error or on_stream.get("error")
    if row.p50_us is not None and row.kernels_us is not None:
        row.overhead_us = row.p50_us - row.kernels_us
    copy_us = floors[asked.n_tokens.index(n_tokens)].p50_us
    if n_tokens >= COPY_TOKENS and copy_us is not None and (row.overhead_us or 0) > 0:
        row.copy_ratio = copy_us / (row.overhead_us or 1)
    return row


def _samples(runs: Sequence[Run], cell: str) -> list[CellSamples]:
    return [run.samples[cell] for run in runs]
