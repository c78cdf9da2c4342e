"""Shows what `moeshm bench kernels` measured to a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from . import report as common
from .report import make_table, number
from .schema import GpuInfo, KernelReport, KernelRow

_COLUMNS = (
    *("p50 µs", "spread µs", "limit µs", "% of it", "TFLOP/s", "goal µs"),
    *("× torch", "× Triton", "error", "same bits"),
)


def print_kernels(report: KernelReport, console: Console) -> None:
    """Print the device, a table for each shape and format, and what failed."""
    meta = report.meta
    console.print(
        f"{meta.date}, moeshm {meta.versions['moeshm']}, python {meta.versions['python']}, "
        f"{meta.cpu}, {meta.repeats} repeats, seed {meta.seed}",
        highlight=False,
    )
    _print_gpu(report.gpu, console)
    for shape, dtype in dict.fromkeys((row.shape, row.dtype) for row in report.results):
        rows = [row for row in report.results if (row.shape, row.dtype) == (shape, dtype)]
        console.print(_table(f"{shape}, {dtype}", rows))
    if seen := [row for row in report.results if row.call_us is not None]:
        console.print(_host_table(seen))
    if any(row.contender == "triton" and row.p50_us for row in report.results):
        console.print("triton: without the time in which its tokens are sorted by expert")
    problems = Counter((row.contender, row.error) for row in report.results if row.error)
    for (name, error), n_rows in problems.items():
        text = f"{name}: {error} ({n_rows} rows)"
        console.print(text, style="yellow", markup=False, highlight=False)


def _print_gpu(gpu: GpuInfo, console: Console) -> None:
    versions = ", ".join(f"{name} {text}" for name, text in gpu.versions.items() if text)
    tflops = ", ".join(f"{peak:g} TFLOP/s {name}" for name, peak in gpu.limit_tflops.items())
    limits = f"{gpu.limit_gb_per_s:,.0f} GB/s, {tflops or 'no limit of arithmetic'}"
    console.print(
        f"{gpu.name} ({gpu.arch}), {gpu.multiprocessors} multiprocessors, "
        f"{gpu.total_bytes / 2**30:.0f} GiB, L2 {gpu.l2_bytes / 2**20:.0f} MiB; {versions}",
        highlight=False,
    )
    console.print(
        f"limits by {gpu.limit_source}: {limits}; a copy here reached "
        f"{gpu.copy_gb_per_s:,.0f} GB/s",
        highlight=False,
    )


def _table(title: str, rows: Sequence[KernelRow]) -> Table:
    table = make_table(title, "tokens", "experts", "contender", *_COLUMNS)
    for row, is_last in common.with_ends(rows, lambda row: row.n_tokens):
        spread = ""
        if row.p50_min_us is not None:
            spread = f"{number(row.p50_min_us)} … {number(row.p50_max_us)}"
        percent = None if row.limit_percent is None else round(row.limit_percent)
        same = {True: "yes", False: "no", None: "–"}[row.is_repeatable]
        error = "–" if row.relative_error is None else f"{row.relative_error:.1e}"
        table.add_row(
            *(str(row.n_tokens), number(row.distinct_experts), row.contender),
            *(number(row.p50_us), spread, number(row.limit_us)),
            *map(number, (percent, row.tflops, row.goal_us)),
            *map(number, (row.grouped_ratio, row.triton_ratio)),
            *(error, same),
            end_section=is_last,
        )
    return table


def _host_table(rows: Sequence[KernelRow]) -> Table:
    columns = ("call µs", "first call µs", "rested call µs", "enqueue µs")
    table = make_table("A call as its caller sees it", "shape", "dtype", "tokens", *columns)
    for row in rows:
        seen = (row.call_us, row.first_call_us, row.rested_call_us, row.enqueue_us)
        times = map(number, seen)
        table.add_row(row.shape, row.dtype, str(row.n_tokens), *times)
    return table
