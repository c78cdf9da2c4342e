"""Shows what `moeshm bench copies` measured to a person."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table

from .report import make_table, number, print_meta, size_text, with_ends
from .schema import CopyReport

_TITLES = {"in": "Into the device", "out": "Out of the device"}


def print_copies(report: CopyReport, console: Console) -> None:
    """Print where it was measured, a table for each direction, and what failed."""
    print_meta(report.meta, console)
    console.print(f"device: {report.device}", highlight=False)
    for direction in dict.fromkeys(row.direction for row in report.results):
        console.print(_table(report, direction))
    problems = Counter((row.contender, row.error) for row in report.results if row.error)
    for (name, error), n_rows in problems.items():
        text = f"{name}: {error} ({n_rows} rows)"
        console.print(text, style="yellow", markup=False, highlight=False)


def _table(report: CopyReport, direction: str) -> Table:
    columns = ("p50 µs", "spread µs", "GB/s", "of pinned")
    table = make_table(_TITLES[direction], "bytes", "contender", *columns)
    rows = [row for row in report.results if row.direction == direction]
    for row, is_last in with_ends(rows, lambda row: row.size_bytes):
        spread = ""
        if row.p50_min_us is not None:
            spread = f"{number(row.p50_min_us)} … {number(row.p50_max_us)}"
        table.add_row(
            *(size_text(row.size_bytes), row.contender, number(row.p50_us), spread),
            *(number(row.gb_per_s), "" if row.pinned_ratio is None else f"{row.pinned_ratio:.1%}"),
            end_section=is_last,
        )
    return table
