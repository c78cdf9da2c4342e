"""Shows a report to a person: tables in the terminal, curves in a PNG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moeshm.errors import UnsupportedPlatform

from .schema import CallReport, CallRow, Floor, Meta, RingReport, RingRow, Timing

Report = RingReport | CallReport
#: Columns that hold words.
_WORDS = ("contender", "floor", "mode", "transport", "dtype", "chosen", "why")


def print_report(report: Report, console: Console) -> None:
    """Print where it was measured, the floors, the results by mode and size, and what failed."""
    print_meta(report.meta, console)
    console.print(_floor_table(report.floors))
    if isinstance(report, RingReport):
        for mode in dict.fromkeys(row.mode for row in report.results):
            console.print(_ring_table(mode, [row for row in report.results if row.mode == mode]))
    else:
        console.print(_call_table([row for row in report.results if row.mode == "call"]))
        console.print(_idle_table([row for row in report.results if row.mode == "idle"]))
    for error in _errors(report):
        console.print(error, style="yellow", markup=False, highlight=False)


def check_plotting() -> None:
    """UnsupportedPlatform, with the remedy, when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedPlatform(
            f"a plot needs matplotlib ({error}); install it with pip install 'moeshm[bench]'"
        ) from None


def plot(report: Report, path: Path) -> None:
    """Write the curves as a PNG: one panel per mode, the floor dashed."""
    check_plotting()
    from matplotlib.figure import Figure

    if isinstance(report, RingReport):
        figure = Figure(figsize=(13, 5.5), layout="constrained")
        latency, throughput = figure.subplots(1, 2)
        _draw_latency(latency, report)
        _draw_throughput(throughput, report)
    else:
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        _draw_calls(figure.subplots(), report)
    save_figure(figure, report.meta, path)


def save_figure(figure: Any, meta: Meta, path: Path) -> None:
    """Write the figure as a PNG, with where and how it was measured above it."""
    figure.suptitle(f"{meta.cpu}, Linux {meta.kernel}, {meta.repeats} repeats, {meta.date}")
    figure.savefig(path, format="png", dpi=120)


def print_meta(meta: Meta, console: Console) -> None:
    """Print where and how it was measured."""
    versions = ", ".join(f"{name} {text}" for name, text in meta.versions.items() if text)
    console.print(f"{meta.cpu} ({meta.machine}), Linux {meta.kernel}, {meta.date}")
    console.print(versions, highlight=False)
    console.print(
        f"client on CPU {meta.client_cpu}, server on CPU {meta.server_cpu}, "
        f"{meta.repeats} repeats, seed {meta.seed}, load average {meta.load_average_before:.2f}"
    )
    for note in meta.notes:
        console.print(f"[yellow]{note}")


def _floor_table(rows: Sequence[Floor]) -> Table:
    table = make_table("Floors", "floor", "bytes", "p50 µs", "p99 µs", "spread µs", "GB/s")
    for row in rows:
        table.add_row(row.floor, size_text(row.size_bytes), *_timing(row), number(row.gb_per_s))
    return table


def _ring_table(mode: str, rows: Sequence[RingRow]) -> Table:
    title = "One way"
    columns = ["spread µs", "GB/s", "messages/s", "of memcpy"]
    if mode == "latency":
        title = "Round trip, written and read on both sides"
        columns = ["p99 µs", "spread µs", "GB/s", "× floor", "of memcpy"]
    table = make_table(title, "bytes", "contender", "p50 µs", *columns)
    for row, is_last in with_ends(rows, lambda row: row.size_bytes):
        p50, p99, spread = _timing(row)
        words = [size_text(row.size_bytes), row.contender, p50]
        if mode == "latency":
            words += [p99, spread, number(row.gb_per_s), number(row.floor_ratio)]
        else:
            words += [spread, number(row.gb_per_s), number(row.messages_per_s)]
        words.append("" if row.memcpy_ratio is None else f"{row.memcpy_ratio:.0%}")
        table.add_row(*words, end_section=is_last)
    return table


def _call_table(rows: Sequence[CallRow]) -> Table:
    table = make_table(
        "client.compute, null backend",
        *("tokens", "contender", "p50 µs", "p99 µs", "spread µs", "GB/s"),
        *("× three pipes", "× spin echo"),
    )
    ordered = sorted(rows, key=lambda row: row.n_tokens or 0)
    for row, is_last in with_ends(ordered, lambda row: row.n_tokens):
        words = [str(row.n_tokens), row.contender, *_timing(row), number(row.gb_per_s)]
        words += [number(row.three_pipes_ratio), number(row.floor_ratio)]
        table.add_row(*words, end_section=is_last)
    return table


def _idle_table(rows: Sequence[CallRow]) -> Table:
    table = make_table("Idle worker", "contender", "% of one CPU")
    for row in rows:
        table.add_row(row.contender, number(row.idle_worker_cpu_percent))
    return table


def make_table(title: str, *columns: str) -> Table:
    """An empty table; columns of words are flush left, those of numbers right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in columns:
        is_text = column in _WORDS
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    return table


def _errors(report: Report) -> list[str]:
    """Each contender's problems once, with how many of its rows have them."""
    counts = Counter((row.floor, row.error) for row in report.floors if row.error)
    counts += Counter((row.contender, row.error) for row in report.results if row.error)
    return [f"{name}: {error} ({rows} rows)" for (name, error), rows in counts.items()]


def with_ends(rows: Sequence[Any], group: Callable[[Any], Any]) -> Iterable[tuple[Any, bool]]:
    """Each row, and whether it is the last of its group."""
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        yield row, following is None or group(following) != group(row)


def _timing(row: Timing) -> tuple[str, str, str]:
    spread = ""
    if row.p50_min_us is not None:
        spread = f"{number(row.p50_min_us)} … {number(row.p50_max_us)}"
    return number(row.p50_us), number(row.p99_us), spread


def number(value: float | None) -> str:
    """A figure, rounded to what a reader needs."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size_text(size_bytes: int) -> str:
    """In MiB or KiB where it is whole, else in bytes."""
    for unit, scale in (("Mi", 1 << 20), ("Ki", 1 << 10)):
        if size_bytes >= scale and size_bytes % scale == 0:
            return f"{size_bytes // scale} {unit}"
    return str(size_bytes)


def _draw_latency(axes: Any, report: RingReport) -> None:
    rows = [row for row in report.results if row.mode == "latency"]
    _draw_lines(axes, rows, lambda row: row.size_bytes, lambda row: row.p50_us)
    _draw_floor(axes, report.floors, "spin_echo", lambda row: row.p50_us)
    _label(axes, "Round trip", "payload, bytes", "median, µs")


def _draw_throughput(axes: Any, report: RingReport) -> None:
    rows = [row for row in report.results if row.mode == "throughput"]
    _draw_lines(axes, rows, lambda row: row.size_bytes, lambda row: row.gb_per_s)
    _draw_floor(axes, report.floors, "memcpy", lambda row: row.gb_per_s)
    _label(axes, "One way", "payload, bytes", "GB/s")


def _draw_calls(axes: Any, report: CallReport) -> None:
    rows = [row for row in report.results if row.mode == "call"]
    _draw_lines(axes, rows, lambda row: row.n_tokens, lambda row: row.p50_us)
    _label(axes, "client.compute, null backend", "tokens", "median, µs")


def _draw_lines(
    axes: Any, rows: Sequence[Any], x: Callable[[Any], Any], y: Callable[[Any], Any]
) -> None:
    for contender in dict.fromkeys(row.contender for row in rows):
        points = [(x(row), y(row)) for row in rows if row.contender == contender]
        points = [point for point in points if point[1] is not None]
        if points:
            width = 2.5 if contender.startswith("moeshm") else 1.2
            axes.plot(*zip(*points, strict=True), marker="o", lw=width, label=contender)


def _draw_floor(axes: Any, rows: Sequence[Floor], name: str, y: Callable[[Floor], Any]) -> None:
    points = [(row.size_bytes, y(row)) for row in rows if row.floor == name]
    points = [point for point in points if point[1] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color="black", ls="--", label=name)


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize="small")
