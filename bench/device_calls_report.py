"""Shows what `moeshm bench device-calls` measured to a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .report import make_table, number, print_meta, size_text, with_ends
from .schema import DeviceCallReport, DeviceCallRow, Floor, Timing


def print_device_calls(report: DeviceCallReport, console: Console) -> None:
    """Print where it was measured, the floors, the calls, and what failed."""
    print_meta(report.meta, console)
    for side in ("engine", "worker"):
        device, gpu = getattr(report, f"{side}_device"), getattr(report, f"{side}_gpu")
        versions = ", ".join(f"{name} {text}" for name, text in gpu.versions.items() if text)
        console.print(f"{side} on {device}: {gpu.name} ({gpu.arch}); {versions}", highlight=False)
    if report.is_resident:
        console.print("the worker was asked for a resident kernel")
    console.print(_floor_table(report.floors))
    for shape, dtype in dict.fromkeys((row.shape, row.dtype) for row in report.results):
        console.print(_table(f"client.compute, {shape}, {dtype}", report.results))
    problems = Counter((row.floor, row.error) for row in report.floors if row.error)
    problems += Counter((row.way, row.error) for row in report.results if row.error)
    for (name, error), n_rows in problems.items():
        text = f"{name}: {error} ({n_rows} rows)"
        console.print(text, style="yellow", markup=False, highlight=False)


def _floor_table(rows: Sequence[Floor]) -> Table:
    table = make_table("Floors", "floor", "bytes", "p50 µs", "spread µs", "GB/s")
    for row in rows:
        size, gb_per_s = size_text(row.size_bytes), number(row.gb_per_s)
        table.add_row(row.floor, size, number(row.p50_us), _spread(row), gb_per_s)
    return table


def _table(title: str, rows: Sequence[DeviceCallRow]) -> Table:
    columns = (
        "p50 µs",
        "p99 µs",
        "spread µs",
        "kernels µs",
        "beyond them µs",
        "submit µs",
        "stream µs",
    )
    table = make_table(title, "tokens", "way", *columns, "copies / beyond")
    table.columns[1].justify = "left"
    for row, is_last in with_ends(rows, lambda row: row.n_tokens):
        table.add_row(
            *(str(row.n_tokens), row.way, number(row.p50_us), number(row.p99_us), _spread(row)),
            *map(number, (row.kernels_us, row.overhead_us, row.submit_us, row.stream_us)),
            "" if row.copy_ratio is None else f"{row.copy_ratio:.0%}",
            end_section=is_last,
        )
    return table


def _spread(row: Timing) -> str:
    if row.p50_min_us is None:
        return ""
    return f"{number(row.p50_min_us)} … {number(row.p50_max_us)}"
