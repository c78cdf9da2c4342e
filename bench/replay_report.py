"""Shows a replay, or what the policy thinks, to a person: tables in the terminal, a PNG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import report as common
from .report import make_table, number
from .schema import (
    Candidate,
    Overlap,
    PolicyReport,
    Reduction,
    ReplayReport,
    ReplayRow,
    TraceSummary,
)

_MIB = 1 << 20


def print_replay(report: ReplayReport, console: Console) -> None:
    """Print what was played, a row per way and speed, the original's table, and what failed."""
    common.print_meta(report.meta, console)
    _print_trace(report.trace, console)
    for speed in dict.fromkeys(row.remote_speed for row in report.results):
        rows = [row for row in report.results if row.remote_speed == speed]
        title = f"The worker {speed:g} times as fast as the local part"
        console.print(_replay_table(title, rows))
    console.print(_published_table(report))
    console.print(_reduction_table(report.reductions))
    if report.contenders:
        console.print(_pipes_table(report))
    for row in report.results:
        for error in filter(None, [row.error, _fallbacks(row), _losses(row)]):
            _complain(f"{row.mode} {row.transport} {row.wire_dtype}: {error}", console)
    for rival in report.contenders:
        if rival.error:
            _complain(f"{rival.contender}: {rival.error}", console)


def print_policy(report: PolicyReport, console: Console, is_explained: bool) -> None:
    """Print every candidate, or only the chosen ones."""
    common.print_meta(report.meta, console)
    _print_trace(report.trace, console)
    rows = [row for row in report.results if is_explained or row.is_chosen]
    title = f"Candidates, the worker {report.remote_speed:g} times as fast as the local part"
    columns = ("predicted µs", "expected µs", "measured µs", "n", "chosen", "why")
    table = make_table(title, "tokens", "transport", "dtype", "slice", *columns)
    for row, is_last in common.with_ends(rows, lambda row: row.n_tokens):
        times = map(number, (row.predicted_us, row.expected_us, row.measured_us))
        words = [str(row.n_tokens), row.transport, row.wire_dtype, str(row.slice_tokens), *times]
        words += [str(row.n_measured), "yes" * row.is_chosen, row.why]
        table.add_row(*words, end_section=is_last)
    console.print(table)
    console.print(_overlap_table(report.overlaps))


def _overlap_table(rows: Sequence[Overlap]) -> Table:
    columns = ("forward µs", "hot part alone µs", "cold part alone µs", "× the longer")
    table = make_table("Side by side", "tokens", *columns)
    for row in rows:
        figures = (row.forward_us, row.local_us, row.remote_us, row.overlap_ratio)
        table.add_row(str(row.n_tokens), *map(number, figures))
    return table


def plot_replay(report: ReplayReport, path: Path) -> None:
    """Write a PNG: prefill and decode by the worker's speed, a line for each way, and what `auto`
    predicted against what it measured."""
    figure = _figure(18)
    prefill, decode, forecast = figure.subplots(1, 3)
    ways = dict.fromkeys((row.mode, row.transport, row.wire_dtype) for row in report.results)
    for way in ways:
        rows = [row for row in report.results if (row.mode, row.transport, row.wire_dtype) == way]
        width = 2.5 if way[0] == "auto" else 1.2
        for axes, name in ((prefill, "prefill_s"), (decode, "decode_tokens_per_s")):
            points = [(row.remote_speed, getattr(row, name)) for row in rows]
            points = [point for point in points if point[1] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", lw=width, label=" ".join(way))
    speed = "speed of the worker, the local part is 1"
    for axes, title, unit in ((prefill, "Prefill", "s"), (decode, "Decode", "tokens/s")):
        _finish(axes, title, speed, unit)
        speeds = list(dict.fromkeys(row.remote_speed for row in report.results))
        axes.set_xticks(speeds, [f"{each:g}" for each in speeds])
        axes.minorticks_off()
    _draw_forecast(
        forecast,
        {
            f"worker {row.remote_speed:g}, {row.wire_dtype}": row.candidates
            for row in report.results
            if row.candidates
        },
    )
    common.save_figure(figure, report.meta, path)


def plot_policy(report: PolicyReport, path: Path) -> None:
    """Write a PNG: predicted against measured, a point for each candidate that was tried."""
    figure = _figure(7)
    groups: dict[str, list[Candidate]] = {}
    for row in report.results:
        groups.setdefault(f"{row.n_tokens} tokens", []).append(row)
    _draw_forecast(figure.subplots(), groups)
    common.save_figure(figure, report.meta, path)


def _draw_forecast(axes: Any, groups: Mapping[str, Sequence[Candidate]]) -> None:
    """A point for each candidate that was measured; on the dashed line the model is right."""
    ends: list[float] = []
    for label, candidates in groups.items():
        points = [
            (each.measured_us, each.predicted_us)
            for each in candidates
            if each.measured_us is not None
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), label=label)
            ends += [end for point in points for end in point]
    if ends:
        axes.plot((min(ends), max(ends)), (min(ends), max(ends)), color="black", ls="--", lw=1)
    _finish(axes, "One forward, predicted and measured", "measured, µs", "predicted, µs")


def _figure(width: float) -> Any:
    common.check_plotting()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, 5.5), layout="constrained")


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(which="major", alpha=0.3)
    if axes.has_data():
        axes.legend(fontsize="small")


def _print_trace(trace: TraceSummary, console: Console) -> None:
    where = (
        f"{trace.weight_dtype} on {trace.engine_device} and, the worker's, {trace.worker_device}"
    )
    compute = "nothing is computed" if trace.null_compute else f"experts of random weights, {where}"
    console.print(
        f"{trace.shape}: {trace.layers} layers, hidden {trace.hidden_size}, intermediate "
        f"{trace.intermediate_size}, top-{trace.top_k} of {trace.num_experts}; {compute}",
        highlight=False,
    )
    console.print(
        f"{trace.source} trace: prompt {trace.prompt} in chunks of {trace.chunk}, completion "
        f"{trace.completion}; {trace.hot:.0%} of the experts are hot, and "
        f"{trace.cold_prompt_share:.1%} of the prompt's tokens have a cold one in a layer "
        f"({trace.cold_window_share:.1%} of the windows of four, "
        f"{trace.cold_completion_share:.1%} of the completion's tokens)",
        highlight=False,
    )


def _replay_table(title: str, rows: Sequence[ReplayRow]) -> Table:
    columns = ("calls", "rows", "MiB", "prefill s", "spread s", "× best", "tokens/s", "× best")
    ends = ("fallbacks", "losses", "chosen")
    table = make_table(title, "mode", "transport", "dtype", *columns, *ends)
    for row in rows:
        spread = ""
        if row.prefill_min_s is not None:
            spread = f"{number(row.prefill_min_s)} … {number(row.prefill_max_s)}"
        table.add_row(
            *(row.mode, row.transport, row.wire_dtype),
            *map(_count, (row.calls, row.rows)),
            *(_mib(row.payload_bytes), number(row.prefill_s), spread, number(row.ratio_to_best)),
            *map(number, (row.decode_tokens_per_s, row.decode_ratio_to_best)),
            *map(_count, (row.fallback_calls, row.losses)),
            _most_common(row.prefill_choices),
        )
    return table


def _published_table(report: ReplayReport) -> Table:
    table = make_table(
        "Published by the authors of the original, on their machine",
        *("mode", "dtype", "calls", "MiB", "prefill s", "tokens/s"),
    )
    for row in report.published:
        figures = (_mib(row.payload_bytes), number(row.prefill_s), number(row.decode_tokens_per_s))
        table.add_row(row.mode, row.wire_dtype, _count(row.calls), *figures)
    return table


def _reduction_table(rows: Sequence[Reduction]) -> Table:
    table = make_table("stream f32 to batched f16", "contender", "speed", "calls", "MiB", "prefill")
    for row in rows:
        percents = (row.calls_percent, row.payload_percent, row.prefill_percent)
        speed = "" if row.remote_speed is None else f"{row.remote_speed:g}"
        table.add_row(row.source, speed, *(f"{percent:+.1f} %" for percent in percents))
    return table


def _pipes_table(report: ReplayReport) -> Table:
    """How many times as long as moeshm they take: than its calls with nothing to hide behind, and
    than what the local part leaves of them, without and with the worker's own time."""
    ends = ("× alone", "× overlapped exchange", "× overlapped transport")
    table = make_table(
        "The calls of batched f16 by the three-pipe protocol, and by moeshm with no local part",
        *("contender", "calls", "MiB", "µs per call", "total s", *ends),
    )
    for row in report.contenders:
        counts = _count(row.calls), _mib(row.payload_bytes)
        times = map(number, (row.p50_us, row.total_s))
        ratios = map(number, (row.alone_ratio, row.exchange_ratio, row.transport_ratio))
        table.add_row(row.contender, *counts, *times, *ratios)
    for ours in report.results:
        if ours.alone_s is not None and ours.wire_dtype == "f16" and ours.calls:
            times = map(number, (1e6 * ours.alone_s / ours.calls, ours.alone_s))
            counts = _count(ours.calls), _mib(ours.payload_bytes)
            table.add_row(f"moeshm-{ours.transport}", *counts, *times, "", "", "")
    return table


def _fallbacks(row: ReplayRow) -> str | None:
    if not row.fallback_calls:
        return None
    return f"{row.fallback_calls} calls were computed by the fallback, not by the worker"


def _losses(row: ReplayRow) -> str | None:
    if not row.losses:
        return None
    return f"the worker was lost {row.losses} times with calls on their way"


def _complain(text: str, console: Console) -> None:
    console.print(text, style="yellow", markup=False, highlight=False)


def _most_common(words: Iterable[str]) -> str:
    return Counter(words).most_common(1)[0][0] if words else ""


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _mib(value: int | None) -> str:
    return "–" if value is None else f"{value / _MIB:,.1f}"
