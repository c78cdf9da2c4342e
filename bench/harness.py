"""How every benchmark is run: fresh pinned processes, interleaved repeats, medians of medians."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import random
import shutil
import signal
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from moeshm.errors import MoeshmError
from moeshm.process import python_module

from . import native
from .schema import Meta, Timing

#: Everything that a measured process makes in /dev/shm starts with this and its pid.
SHM_PREFIX = "moeshm-bench-"
_PACKAGES = ("moeshm", "numpy", "msgspec", "pyzmq", "iceoryx2", "kickmsg")
#: Starting two interpreters on a busy machine, and the slowest cell, with room to spare.
_START_LIMIT_S = 60.0
NO_VARIABLES: Mapping[str, str] = {}
#: Keeps NumPy's BLAS from starting threads of its own.
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
_CELL_LIMIT_S = 10.0


class Plan(NamedTuple):
    """How one run measures; `arguments` is what every measured program is told."""

    client_cpu: int
    server_cpu: int
    repeats: int
    seconds: float
    messages: int | None
    seed: int

    def arguments(self) -> list[str]:
        """CLIENT_CPU SERVER_CPU SECONDS MESSAGES, where 0 messages means as many as fit."""
        return [str(word) for word in (*self[:2], self.seconds, self.messages or 0)]


class Job(NamedTuple):
    """A contender: a program that measures cells and prints one `CellSamples` line for each."""

    name: str
    #: The words before the plan's; called per run, so that a missing compiler is its error.
    program: Callable[[], Sequence[str]]
    cells: Sequence[str]
    #: How long it may take; None for the usual time per cell.
    limit_s: float | None = None


class CellSamples(msgspec.Struct):
    """What one run of a program says about one cell."""

    cell: str
    messages_per_duration: int = 1
    durations_ns: list[int] = []
    error: str | None = None


Samples = dict[tuple[str, str], list[CellSamples]]
_Item = TypeVar("_Item")


def choose_cpus() -> tuple[int, int]:
    """The CPUs to pin client and server to: two usable ones, or the only one twice."""
    usable = sorted(os.sched_getaffinity(0))
    return usable[0], usable[min(1, len(usable) - 1)]


def python_program(module: str, *words: str) -> Callable[[], list[str]]:
    """The program that runs a module of this package in a fresh interpreter."""
    return lambda: python_module(f"{__package__}.{module}", *words)


def c_program(name: str, *words: str) -> Callable[[], list[str]]:
    """The program built from `name`.c."""
    return lambda: [str(native.build(name)), *words]


def measure(jobs: Sequence[Job], plan: Plan, on_step: Callable[[str], None]) -> Samples:
    """Run every job once per repeat, in an order shuffled anew each time.

    Interleaved, so that a slow minute of the machine falls on all alike. A job none of whose
    cells could be measured is not tried again. `on_step` hears the name of each finished job.
    """
    samples: Samples = defaultdict(list)

    def run(job: Job) -> bool:
        found = run_job(job, plan)
        for one in found:
            samples[job.name, one.cell].append(one)
        on_step(job.name)
        return any(one.error is None for one in found)

    interleave(jobs, plan, run)
    return samples


def interleave(items: Sequence[_Item], plan: Plan, run: Callable[[_Item], bool]) -> None:
    """Run every item once per repeat, in an order shuffled anew each time, and one for which
    `run` returned False not again."""
    shuffle = random.Random(plan.seed).shuffle
    alive = list(items)
    for _ in range(plan.repeats):
        order = list(alive)
        shuffle(order)
        for item in order:
            if not run(item):
                alive.remove(item)


def run_job(job: Job, plan: Plan) -> list[CellSamples]:
    """Run a job once, in fresh processes; one entry per cell, errors included."""
    try:
        command = [*job.program(), *plan.arguments(), *job.cells]
        limit_s = job.limit_s or _START_LIMIT_S + _CELL_LIMIT_S * len(job.cells)
        output, problem = run_program(command, limit_s)
    except (MoeshmError, OSError) as error:
        output, problem = "", str(error)
    found = {}
    for line in output.splitlines():
        try:
            one = msgspec.json.decode(line, type=CellSamples)
        except msgspec.DecodeError:
            break  # cut off in the middle when the process was killed
        found[one.cell] = one
    missing = problem or "the program ended without a result"
    return [found.get(cell, CellSamples(cell, error=missing)) for cell in job.cells]


def run_program(
    command: Sequence[str], limit_s: float, variables: Mapping[str, str] = NO_VARIABLES
) -> tuple[str, str | None]:
    """What the command printed, and what went wrong; `variables` are added to its environment."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **variables},
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit_s)
            problem = None if process.returncode == 0 else _last_words(process.returncode, errors)
        except subprocess.TimeoutExpired:
            _end_group(process)
            output, _ = process.communicate()
            problem = f"no result after {limit_s:g} s"
        finally:
            _end_group(process)
            remove_shared(f"{SHM_PREFIX}{process.pid}-")
    return output, problem


def decode_lines(output: str, kind: Any) -> Iterator[Any]:
    """What a program said, line by line, as values of this type."""
    for text in output.splitlines():
        try:
            yield msgspec.json.decode(text, type=kind)
        except msgspec.DecodeError:
            continue  # cut off when the process ended, or some library's word


def remove_shared(prefix: str) -> None:
    """Remove every file and folder of /dev/shm whose name starts with the prefix."""
    for path in Path("/dev/shm").glob(f"{prefix}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _last_words(status: int, errors: str) -> str:
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    lines = errors.strip().splitlines()
    return f"{how}: {lines[-1]}" if lines else how


def _end_group(process: subprocess.Popen[str]) -> None:
    # SIGTERM, not SIGKILL, at first: multiprocessing's resource tracker ignores it, outlives the
    # others and removes their semaphores.
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
        return


def summarise(runs: Iterable[CellSamples]) -> dict[str, Any]:
    """The fields of a `Timing`: per message, median over repeats of each repeat's percentiles."""
    medians, tails, errors = [], [], []
    n = repeats = 0
    for run in runs:
        repeats += 1
        if run.error is not None or not run.durations_ns:
            errors.append(run.error or "no samples")
            continue
        each_us = np.asarray(run.durations_ns) / (1e3 * run.messages_per_duration)
        medians.append(float(np.median(each_us)))
        tails.append(float(np.percentile(each_us, 99)))
        n += each_us.size * run.messages_per_duration
    fields: dict[str, Any] = {"n": n, "repeats": repeats}
    if errors:
        prefix = f"{len(errors)} of {repeats} repeats failed: " if medians else ""
        fields["error"] = prefix + errors[0]
    if medians:
        fields["p50_us"] = float(np.median(medians))
        fields["p99_us"] = float(np.median(tails))
        fields["p50_min_us"] = min(medians)
        fields["p50_max_us"] = max(medians)
    return fields


def gb_per_s(size_bytes: float, time_us: float | None) -> float | None:
    """GB/s (10^9 bytes) at which `size_bytes` pass in `time_us`."""
    return size_bytes / (1e3 * time_us) if time_us else None


def ratio(of: Timing, to: Timing | None) -> float | None:
    """`of.p50_us / to.p50_us`, or None when either is missing."""
    if of.p50_us is None or to is None or not to.p50_us:
        return None
    return of.p50_us / to.p50_us


def metadata(benchmark: str, plan: Plan) -> Meta:
    """Everything about this machine and run that a reader of the figures needs."""
    notes = []
    if plan.client_cpu == plan.server_cpu:
        notes.append(
            "one usable CPU: client and server share it, so nothing spins to advantage and "
            "every message costs a context switch"
        )
    return Meta(
        benchmark=benchmark,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=platform.machine(),
        cpu=_cpu_model(),
        cpus_usable=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        versions={
            "python": platform.python_version(),
            **{package: version_of(package) for package in _PACKAGES},
            "cc": native.compiler_version(),
        },
        seed=plan.seed,
        repeats=plan.repeats,
        seconds_per_cell=plan.seconds,
        messages_per_cell=plan.messages,
        client_cpu=plan.client_cpu,
        server_cpu=plan.server_cpu,
        load_average_before=os.getloadavg()[0],
        notes=notes,
    )


def version_of(package: str) -> str | None:
    """Of an installed package; None when it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or "unknown"
