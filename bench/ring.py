"""The question: how fast do bytes pass between two processes, by moeshm's ring and by others?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from moeshm import segment

from . import floors, harness
from .contender import MODES, Cell
from .contenders import CONTENDERS
from .harness import Job, Plan
from .schema import Floor, RingReport, RingRow

#: How long one contender is measured in one mode and size, per repeat.
CELL_SECONDS = 0.1


class Measured(NamedTuple):
    """A job and the rows that its cells become."""

    job: Job
    cells: dict[str, Cell]


def measure(
    sizes: Sequence[int], plan: Plan, on_step: Callable[[str], None] = lambda _: None
) -> RingReport:
    """Measure every contender at every size, in both modes, beside the floors."""
    meta = harness.metadata("ring", plan)
    segment.sweep(f"/{harness.SHM_PREFIX}")  # what a killed run left
    contenders = all_contenders(sizes, plan.seed)
    jobs = [floors.job(sizes), *(contender.job for contender in contenders)]
    samples = harness.measure(jobs, plan, on_step)
    floor_rows = floors.rows(sizes, samples)
    rows = [
        _row(contender.job.name, cell, samples[contender.job.name, text], floor_rows)
        for contender in contenders
        for text, cell in contender.cells.items()
    ]
    rows.sort(key=lambda row: (MODES.index(row.mode), row.size_bytes))
    return RingReport(meta=meta, floors=floor_rows, results=rows)


def count_steps(plan: Plan) -> int:
    """How often `measure` calls `on_step` when nothing fails."""
    return plan.repeats * (len(all_contenders([1], plan.seed)) + 1)


def all_contenders(sizes: Sequence[int], seed: int) -> list[Measured]:
    """Every contender with the cells that it is measured in, Python's and C's."""
    cells = [Cell(mode, size) for mode in MODES for size in sizes]
    python = {str(cell): cell for cell in cells}
    # The C program echoes what a cell says and knows nothing of modes: a stream is a call whose
    # reply is empty.
    three_pipes = {
        f"{cell.size}:{cell.size if cell.mode == 'latency' else 0}": cell for cell in cells
    }
    measured = [
        Measured(Job(name, harness.python_program("pair", name, str(seed)), list(python)), python)
        for name in CONTENDERS
    ]
    for name, flavour in (("three-pipes", "pipe"), ("three-pipes-shared", "shared")):
        program = harness.c_program("three_pipes", flavour)
        measured.append(Measured(Job(name, program, list(three_pipes)), three_pipes))
    return measured


def _row(
    contender: str, cell: Cell, runs: Sequence[harness.CellSamples], floor_rows: Sequence[Floor]
) -> RingRow:
    mode, size = cell
    row = RingRow(contender=contender, mode=mode, size_bytes=size, **harness.summarise(runs))
    memcpy = floors.find(floor_rows, "memcpy", size)
    if mode == "latency":
        row.gb_per_s = harness.gb_per_s(2 * size, row.p50_us)
        row.floor_ratio = harness.ratio(row, floors.of_round_trip(floor_rows, size))
        # In, out, in, out: one copy after the other.
        row.memcpy_ratio = _memcpy_ratio(row, memcpy, 4)
    else:
        # A run is one duration: it has a mean and no percentiles.
        row.p99_us = None
        row.gb_per_s = harness.gb_per_s(size, row.p50_us)
        row.messages_per_s = 1e6 / row.p50_us if row.p50_us else None
        # One message goes in on one CPU while the one before goes out on the other.
        row.memcpy_ratio = _memcpy_ratio(row, memcpy, 1)
    return row


def _memcpy_ratio(row: RingRow, memcpy: Floor | None, copies: int) -> float | None:
    """The time of that many copies by memcpy as a share of the row's time."""
    copies_by_memcpy = harness.ratio(row, memcpy)
    return copies / copies_by_memcpy if copies_by_memcpy else None
