"""The question: what does an engine gain when its cold experts travel in fewer, larger calls?

Replays a routing trace through `ExpertOffload` and a worker process, mode by mode, beside the
three-pipe protocol and the table that its authors published.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from moeshm import settings
from moeshm.dtypes import DType
from moeshm.errors import MoeshmError
from moeshm.placement import Placement

from . import harness, replay_trace
from .harness import Job, Plan
from .replay_engine import EngineSetup, Run
from .replay_model import Shape
from .replay_trace import Trace
from .replay_worker import NAME, WorkerSetup
from .schema import (
    Candidate,
    PipesRow,
    PublishedRow,
    Reduction,
    ReplayReport,
    ReplayRow,
    TraceSummary,
)

MODES = ("stream", "batched", "auto")
TRANSPORTS = ("shared", "stream")
DTYPES = ("f32", "f16")
THREE_PIPES = {"three-pipes": "pipe", "three-pipes-shared": "shared"}
#: Luce-Org/lucebox pull requests #312 and #388: prompt 4248, completion 128, chunks of 512, 40
#: layers of Qwen3.5-35B-A3B, about two in five prompt tokens with a remote expert in a layer.
PUBLISHED = [
    PublishedRow(
        mode="stream", wire_dtype="f32", calls=29_042, payload_bytes=round(612.430 * 2**20),
        prefill_s=40.93, decode_tokens_per_s=18.5,
    ),
    PublishedRow(
        mode="batched", wire_dtype="f16", calls=2_657, payload_bytes=round(317.346 * 2**20),
        prefill_s=27.74, decode_tokens_per_s=18.5,
    ),
]  # fmt: skip
#: Tokens of a call in mode `stream`.
WINDOW_TOKENS = 4
#: The longest replay of one configuration: a weak worker may take minutes.
LIMIT_S = 1800.0
_BYTES_PER_ID_AND_WEIGHT = 8


class Way(NamedTuple):
    """One configuration."""

    mode: str
    transport: str
    wire_dtype: str
    remote_speed: float


class Replay(NamedTuple):
    """What is played."""

    #: As it is computed: scaled, with the layers that the trace has.
    shape: Shape
    scale: int
    trace: Trace
    hot: float
    chunk: int
    is_null: bool
    ways: Sequence[Way]

    def placement(self) -> Placement:
        """The hot experts here, the others at the one worker."""
        return replay_trace.place(self.trace, self.hot, NAME)

    def summary(self) -> TraceSummary:
        """What was played, in figures."""
        shape, trace = self.shape, self.trace
        has_cold = trace.has_cold(self.placement())
        prompt, completion = np.split(has_cold, [trace.n_prompt], axis=1)
        starts = np.arange(0, trace.n_prompt, WINDOW_TOKENS)
        windows = np.logical_or.reduceat(prompt, starts, axis=1) if len(starts) else prompt
        return TraceSummary(
            source=trace.source,
            shape=shape.name,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            layers=trace.n_layers,
            prompt=trace.n_prompt,
            completion=trace.n_completion,
            chunk=self.chunk,
            hot=self.hot,
            cold_prompt_share=_share(prompt),
            cold_window_share=_share(windows),
            cold_completion_share=_share(completion),
            null_compute=self.is_null,
            scale=self.scale,
        )


def make_ways(
    modes: Sequence[str],
    transports: Sequence[str],
    dtypes: Sequence[str],
    remote_speeds: Sequence[float],
) -> list[Way]:
    """Every combination; `auto` chooses among the transports, where there are several."""
    auto = transports[0] if len(transports) == 1 else "auto"
    return [
        Way(mode, transport, dtype, speed)
        for speed in remote_speeds
        for mode in modes
        for transport in ([auto] if mode == "auto" else transports)
        for dtype in dtypes
    ]


def measure(
    replay: Replay, plan: Plan, on_step: Callable[[str], None] = lambda _: None
) -> ReplayReport:
    """Replay every way `plan.repeats` times, interleaved; with null compute the three pipes too."""
    meta = harness.metadata("replay", plan)
    placement = replay.placement()
    runs: dict[Way, list[Run | str]] = defaultdict(list)
    samples: dict[str, list[harness.CellSamples]] = defaultdict(list)
    with files(replay.trace, placement) as (trace_path, placement_path):

        def run_way(way: Way) -> bool:
            found = run_once(engine_setup(replay, way, plan.seed, trace_path, placement_path), plan)
            runs[way].append(found)
            on_step(f"{way.mode} {way.transport} {way.wire_dtype}")
            return isinstance(found, Run)

        def run_pipes(job: Job) -> bool:
            (found,) = harness.run_job(job, plan)
            samples[job.name].append(found)
            on_step(job.name)
            return found.error is None

        sizes = pipes_sizes(replay, placement) if replay.is_null else []
        jobs = _pipes_jobs(sizes, trace_path.parent) if sizes else []
        items: list[Way | Job] = [*replay.ways, *jobs]
        harness.interleave(
            items, plan, lambda item: run_way(item) if isinstance(item, Way) else run_pipes(item)
        )
    rows = [_row(way, runs[way]) for way in replay.ways]
    return ReplayReport(
        meta=meta,
        trace=replay.summary(),
        results=rows,
        contenders=[_pipes_row(job.name, sizes, samples[job.name], rows) for job in jobs],
        published=PUBLISHED,
        reductions=_reductions(rows),
    )


def count_steps(ways: Sequence[Way], is_null: bool, plan: Plan) -> int:
    """How often `measure` calls `on_step` when nothing fails."""
    return plan.repeats * (len(ways) + is_null * len(THREE_PIPES))


def engine_setup(
    replay: Replay, way: Way, seed: int, trace_path: Path, placement_path: Path
) -> EngineSetup:
    """One way, as `replay_engine` is told of it."""
    worker = WorkerSetup(
        shape=replay.shape,
        placement=str(placement_path),
        is_null=replay.is_null,
        slowdown=max(1.0, 1 / way.remote_speed),
        seed=seed,
    )
    return EngineSetup(
        worker=worker,
        trace=str(trace_path),
        chunk=replay.chunk,
        mode=way.mode,
        transport=way.transport,
        wire_dtype=way.wire_dtype,
        local_slowdown=max(1.0, way.remote_speed),
    )


def run_once(setup: EngineSetup, plan: Plan) -> Run | str:
    """One replay in fresh processes, or what went wrong."""
    text = msgspec.json.encode(setup).decode()
    command = [*harness.python_program("replay_engine", text)(), *plan.arguments()]
    try:
        output, problem = harness.run_program(command, LIMIT_S, harness.ONE_THREAD)
        if problem is None:
            return msgspec.json.decode(output, type=Run)
    except (MoeshmError, OSError, msgspec.MsgspecError) as error:
        problem = str(error)
    return problem


@contextlib.contextmanager
def files(trace: Trace, placement: Placement) -> Iterator[tuple[Path, Path]]:
    """The trace and the placement, for the processes that play them."""
    with tempfile.TemporaryDirectory(prefix="moeshm-bench-") as folder:
        paths = Path(folder, "trace.npz"), Path(folder, "placement.json")
        trace.save(paths[0])
        placement.save(paths[1])
        yield paths


# --- rows ---------------------------------------------------------------------------------


def _row(way: Way, found: Sequence[Run | str]) -> ReplayRow:
    runs = [run for run in found if isinstance(run, Run)]
    errors = [error for error in found if isinstance(error, str)]
    row = ReplayRow(**way._asdict(), repeats=len(found))
    if errors:
        row.error = f"{len(errors)} of {len(found)} repeats failed: {errors[0]}"
    if not runs:
        return row
    for name in ("calls", "prefill_calls", "rows", "payload_bytes", "fallback_calls"):
        setattr(row, name, round(float(np.median([getattr(run, name) for run in runs]))))
    row.prefill_s, row.prefill_min_s, row.prefill_max_s = _spread([run.prefill_s for run in runs])
    rates = [run.decode_tokens_per_s for run in runs if run.decode_tokens_per_s is not None]
    if rates:
        median, least, greatest = _spread(rates)
        row.decode_tokens_per_s = median
        row.decode_min_tokens_per_s, row.decode_max_tokens_per_s = least, greatest
    row.transport_s = _spread([run.transport_s for run in runs])[0]
    row.exchange_s = _spread([run.exchange_s for run in runs])[0]
    if way.mode == "auto":
        row.prefill_choices = [_chosen(run.prefill_candidates) for run in runs]
        row.decode_choices = [_chosen(run.decode_candidates) for run in runs]
        row.candidates = runs[0].prefill_candidates + runs[0].decode_candidates
    return row


def _chosen(candidates: Sequence[Candidate]) -> str:
    """A way to send, as a few words."""
    for each in candidates:
        if each.is_chosen:
            return f"{each.transport} {each.wire_dtype} {each.slice_tokens}"
    return ""


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest."""
    return float(np.median(values)), min(values), max(values)


def _share(values: npt.NDArray[np.bool_]) -> float:
    return float(values.mean()) if values.size else 0.0


def _reductions(rows: Sequence[ReplayRow]) -> list[Reduction]:
    """From stream f32 to batched f16, over the transport that was asked for first, by speed."""
    found = [_reduction("original", None, *PUBLISHED)]
    for speed in dict.fromkeys(row.remote_speed for row in rows):
        of_speed = [row for row in rows if row.remote_speed == speed and row.calls]
        stream, batched = (
            next((row for row in of_speed if (row.mode, row.wire_dtype) == wanted), None)
            for wanted in (("stream", "f32"), ("batched", "f16"))
        )
        if stream is not None and batched is not None:
            found.append(_reduction("replay", speed, stream, batched))
    return found


def _reduction(
    source: str,
    speed: float | None,
    stream: ReplayRow | PublishedRow,
    batched: ReplayRow | PublishedRow,
) -> Reduction:
    def percent(name: str) -> float:
        return float(100 * (getattr(batched, name) / getattr(stream, name) - 1))

    return Reduction(
        source=source,
        remote_speed=speed,
        calls_percent=percent("calls"),
        payload_percent=percent("payload_bytes"),
        prefill_percent=percent("prefill_s"),
    )


# --- the three pipes ----------------------------------------------------------------------


def pipes_sizes(replay: Replay, placement: Placement) -> list[tuple[int, int]]:
    """Bytes there and back of each call that `batched` makes with f16 rows, in its order."""
    capacity = settings.current().batch_capacity
    rows = replay_trace.rows_of_messages(replay.trace, placement, replay.chunk, capacity)
    row_bytes = replay.shape.hidden_size * DType.F16.itemsize
    return [
        (n * (row_bytes + replay.shape.top_k * _BYTES_PER_ID_AND_WEIGHT), n * row_bytes)
        for n in rows
    ]


def _pipes_jobs(sizes: Sequence[tuple[int, int]], folder: Path) -> list[Job]:
    path = folder / "calls.txt"
    path.write_text("".join(f"{request} {reply}\n" for request, reply in sizes))
    return [
        Job(name, harness.c_program("three_pipes", flavour), [f"trace:{path}"], LIMIT_S)
        for name, flavour in THREE_PIPES.items()
    ]


def _pipes_row(
    contender: str,
    sizes: Sequence[tuple[int, int]],
    found: Sequence[harness.CellSamples],
    rows: Sequence[ReplayRow],
) -> PipesRow:
    row = PipesRow(
        contender=contender,
        calls=len(sizes),
        payload_bytes=sum(request for request, _ in sizes),
        reply_bytes=sum(reply for _, reply in sizes),
        **harness.summarise(found),
    )
    # A run is one duration: it has a mean and no percentiles.
    row.p99_us = None
    rival = min(
        (row for row in rows if (row.mode, row.wire_dtype) == ("batched", "f16") and row.calls),
        key=lambda row: row.exchange_s or 0.0,
        default=None,
    )
    if row.p50_us is not None:
        row.total_s = row.p50_us * len(sizes) / 1e6
        if rival is not None and rival.transport_s and rival.exchange_s:
            row.transport_ratio = row.total_s / rival.transport_s
            row.exchange_ratio = row.total_s / rival.exchange_s
    return row
