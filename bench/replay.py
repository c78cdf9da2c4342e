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
from moeshm.errors import MoeshmError, SettingError
from moeshm.placement import Placement

from . import harness, replay_rows, replay_trace
from .harness import Job, Plan
from .replay_engine import EngineSetup, Run
from .replay_model import CPU, Computed, Shape
from .replay_trace import Trace
from .replay_worker import NAME, WorkerSetup
from .schema import PublishedRow, ReplayReport, ReplayRow, TraceSummary

MODES = ("stream", "batched", "auto")
TRANSPORTS = ("shared", "stream")
#: By default.
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
    #: Passes that go first in every run, uncounted.
    warm_up: int
    ways: Sequence[Way]
    #: Of the local part, and of the worker: "cpu", "cuda:0".
    engine_device: str = CPU
    worker_device: str = CPU

    @property
    def weight_dtype(self) -> DType:
        """Of the experts: as models have it, where a GPU computes them."""
        return DType.F32 if (self.engine_device, self.worker_device) == (CPU, CPU) else DType.BF16

    def placement(self) -> Placement:
        """The hot experts here, the others at the one worker."""
        return replay_trace.place(self.trace, self.hot, NAME)

    def check(self) -> None:
        """SettingError: no token of the trace has a cold expert; GPUs that compute nothing, or at
        another speed than theirs."""
        if self.weight_dtype is DType.BF16:
            if self.is_null:
                raise SettingError("--null-compute uses no GPU; leave the devices out, or that")
            if any(way.remote_speed != 1 for way in self.ways):
                raise SettingError("GPUs have speeds of their own; leave --remote-speed out")
        if not self.trace.has_cold(self.placement()).any():
            raise SettingError(
                f"hot={self.hot:g} covers every expert that the trace uses, so nothing reaches "
                "the worker; pass a lower --hot or a longer --prompt"
            )

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
            engine_device=self.engine_device,
            worker_device=self.worker_device,
            weight_dtype=str(self.weight_dtype),
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
    rows = [ReplayRow(**way._asdict()) for way in replay.ways]
    found = [runs[way] for way in replay.ways]
    for row, each in zip(rows, found, strict=True):
        replay_rows.fill(row, each)
    replay_rows.add_ratios_to_best(rows, found)
    return ReplayReport(
        meta=meta,
        trace=replay.summary(),
        results=rows,
        contenders=[
            replay_rows.pipes_row(job.name, sizes, samples[job.name], rows, found) for job in jobs
        ],
        published=PUBLISHED,
        reductions=replay_rows.reductions(rows, PUBLISHED),
    )


def count_steps(ways: Sequence[Way], is_null: bool, plan: Plan) -> int:
    """How often `measure` calls `on_step` when nothing fails."""
    return plan.repeats * (len(ways) + is_null * len(THREE_PIPES))


def engine_setup(
    replay: Replay, way: Way, seed: int, trace_path: Path, placement_path: Path
) -> EngineSetup:
    """One way, as `replay_engine` is told of it."""
    local = Computed(
        is_null=replay.is_null,
        seed=seed,
        slowdown=max(1.0, way.remote_speed),
        device=replay.engine_device,
        weight_dtype=replay.weight_dtype,
    )
    remote = msgspec.structs.replace(
        local, slowdown=max(1.0, 1 / way.remote_speed), device=replay.worker_device
    )
    return EngineSetup(
        worker=WorkerSetup(shape=replay.shape, placement=str(placement_path), computed=remote),
        computed=local,
        trace=str(trace_path),
        chunk=replay.chunk,
        mode=way.mode,
        transport=way.transport,
        wire_dtype=way.wire_dtype,
        warm_up=replay.warm_up,
        is_played_alone=replay.is_null and way.mode == "batched",
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


def _share(values: npt.NDArray[np.bool_]) -> float:
    return float(values.mean()) if values.size else 0.0


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
