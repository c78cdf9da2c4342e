"""The question: what does one `client.compute` cost when the worker computes nothing?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moeshm.dtypes import DType

from . import floors, harness
from .harness import Job, Plan
from .null_worker import HIDDEN_SIZE, TOP_K
from .schema import CallReport, CallRow, Floor

DEFAULT_N_TOKENS = (1, 4, 16, 64, 128, 512)
#: How long one contender is measured with one number of tokens, per repeat.
CELL_SECONDS = 0.1
IDLE_SECONDS = 3.0
TRANSPORTS = ("shared", "stream")
_THREE_PIPES = {"three-pipes": "pipe", "three-pipes-shared": "shared"}
_BYTES_PER_ID_AND_WEIGHT = 8


def measure(
    dtype: DType,
    plan: Plan,
    on_step: Callable[[str], None] = lambda _: None,
    n_tokens: Sequence[int] = DEFAULT_N_TOKENS,
    idle_seconds: float = IDLE_SECONDS,
) -> CallReport:
    """Time `client.compute` over both transports, beside the three-pipe protocol and the floors.

    `dtype` is the format of the activations both ways; `idle_seconds` is how long an idle worker
    with one connected client is watched, once per transport.
    """
    meta = harness.metadata("call", plan)
    floor_sizes = [reply_bytes(tokens, dtype) for tokens in n_tokens]
    jobs = [floors.job(floor_sizes), *_moeshm_jobs(n_tokens, dtype, plan.seed)]
    jobs += _three_pipes_jobs(n_tokens, dtype)
    samples = harness.measure(jobs, plan, on_step)
    floor_rows = floors.rows(floor_sizes, samples)
    rows = [
        _call_row(job.name, tokens, dtype, samples[job.name, cell])
        for job in jobs[1:]
        for cell, tokens in zip(job.cells, n_tokens, strict=True)
    ]
    _add_ratios(rows, floor_rows)
    rows += [_idle_row(transport, dtype, plan, idle_seconds, on_step) for transport in TRANSPORTS]
    return CallReport(meta=meta, floors=floor_rows, results=rows)


def count_steps(plan: Plan) -> int:
    """How often `measure` calls `on_step` when nothing fails."""
    return plan.repeats * (1 + len(TRANSPORTS) + len(_THREE_PIPES)) + len(TRANSPORTS)


def request_bytes(n_tokens: int, dtype: DType) -> int:
    """Ids (int32), weights (float32) and activations of a call."""
    return n_tokens * (TOP_K * _BYTES_PER_ID_AND_WEIGHT + HIDDEN_SIZE * dtype.itemsize)


def reply_bytes(n_tokens: int, dtype: DType) -> int:
    """One row per token."""
    return n_tokens * HIDDEN_SIZE * dtype.itemsize


def _moeshm_job(transport: str, dtype: DType, seed: int, cells: Sequence[str]) -> Job:
    program = harness.python_program("call_client", transport, str(dtype), str(seed))
    return Job(f"moeshm-{transport}", program, cells)


def _moeshm_jobs(n_tokens: Sequence[int], dtype: DType, seed: int) -> list[Job]:
    cells = [f"call:{tokens}" for tokens in n_tokens]
    return [_moeshm_job(transport, dtype, seed, cells) for transport in TRANSPORTS]


def _three_pipes_jobs(n_tokens: Sequence[int], dtype: DType) -> list[Job]:
    cells = [f"{request_bytes(n, dtype)}:{reply_bytes(n, dtype)}" for n in n_tokens]
    return [
        Job(name, harness.c_program("three_pipes", flavour), cells)
        for name, flavour in _THREE_PIPES.items()
    ]


def _call_row(
    contender: str, n_tokens: int, dtype: DType, runs: Sequence[harness.CellSamples]
) -> CallRow:
    row = CallRow(
        contender=contender,
        mode="call",
        dtype=str(dtype),
        n_tokens=n_tokens,
        request_bytes=request_bytes(n_tokens, dtype),
        reply_bytes=reply_bytes(n_tokens, dtype),
        **harness.summarise(runs),
    )
    both_ways = request_bytes(n_tokens, dtype) + reply_bytes(n_tokens, dtype)
    row.gb_per_s = harness.gb_per_s(both_ways, row.p50_us)
    return row


def _add_ratios(rows: Sequence[CallRow], floor_rows: Sequence[Floor]) -> None:
    """Hold every row against the faster flavour of the three pipes, and against the spin echo."""
    for row in rows:
        rivals = [
            rival
            for rival in rows
            if rival.contender in _THREE_PIPES
            and rival.n_tokens == row.n_tokens
            and rival.p50_us is not None
        ]
        fastest = min(rivals, key=lambda rival: rival.p50_us or 0, default=None)
        row.three_pipes_ratio = harness.ratio(row, fastest)
        echo = floors.find(floor_rows, "spin_echo", row.reply_bytes or 0)
        row.floor_ratio = harness.ratio(row, echo)


def _idle_row(
    transport: str,
    dtype: DType,
    plan: Plan,
    idle_seconds: float,
    on_step: Callable[[str], None],
) -> CallRow:
    job = _moeshm_job(transport, dtype, plan.seed, ["call:1", f"idle:{idle_seconds}"])
    _, idle = harness.run_job(job, plan._replace(messages=100))
    row = CallRow(contender=job.name, mode="idle", dtype=str(dtype), repeats=1, error=idle.error)
    if idle.error is None:
        used_ns, waited_ns = idle.durations_ns
        row.idle_worker_cpu_percent = 100 * used_ns / waited_ns
    on_step(job.name)
    return row
