"""What the repeats of a replay come to: a row for each way, and what the rows are to each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import harness
from .harness import CellSamples
from .replay_engine import Run
from .schema import Candidate, PipesRow, PublishedRow, Reduction, ReplayRow

#: What each repeat gave, or why it failed; one that failed is not tried again, so the same place
#: in two of them is the same repeat.
Found = Sequence[Run | str]
#: Of one repeat, or None where it has no such time.
_Times = Sequence[float | None]


def fill(row: ReplayRow, found: Found) -> None:
    """Set the figures of one way."""
    runs = [run for run in found if isinstance(run, Run)]
    errors = [error for error in found if isinstance(error, str)]
    row.repeats = len(found)
    if errors:
        row.error = f"{len(errors)} of {len(found)} repeats failed: {errors[0]}"
    if not runs:
        return
    for name in ("calls", "prefill_calls", "rows", "payload_bytes"):
        setattr(row, name, round(float(np.median([getattr(run, name) for run in runs]))))
    # Sums: a median would hide what happened in one repeat of three.
    row.fallback_calls = sum(run.fallback_calls for run in runs)
    row.losses = sum(run.losses for run in runs)
    for name in ("prefill_s", "transport_s", "exchange_s", "alone_s", "alone_forward_s"):
        setattr(row, name, _median([getattr(run, name) for run in runs]))
    row.prefill_min_s = min(run.prefill_s for run in runs)
    row.prefill_max_s = max(run.prefill_s for run in runs)
    rates = [run.decode_tokens_per_s for run in runs if run.decode_tokens_per_s is not None]
    if rates:
        row.decode_tokens_per_s = _median(rates)
        row.decode_min_tokens_per_s, row.decode_max_tokens_per_s = min(rates), max(rates)
    if row.mode == "auto":
        row.prefill_choices = [_chosen(run.prefill_candidates) for run in runs]
        row.decode_choices = [_chosen(run.decode_candidates) for run in runs]
        row.candidates = runs[0].prefill_candidates + runs[0].decode_candidates


def add_ratios_to_best(rows: Sequence[ReplayRow], found: Sequence[Found]) -> None:
    """Hold every row against the best fixed one of its speed and dtype, repeat by repeat."""
    for row, runs in zip(rows, found, strict=True):
        rivals = [
            rival_runs
            for rival, rival_runs in zip(rows, found, strict=True)
            if rival.mode != "auto"
            and (rival.remote_speed, rival.wire_dtype) == (row.remote_speed, row.wire_dtype)
        ]
        row.ratio_to_best = _ratio_to_least(runs, rivals, lambda run: run.prefill_s)
        row.decode_ratio_to_best = _ratio_to_least(runs, rivals, _token_s)


def reductions(rows: Sequence[ReplayRow], published: Sequence[PublishedRow]) -> list[Reduction]:
    """From stream f32 to batched f16, over the transport that was asked for first, by speed;
    `published` has these two."""
    stream_then, batched_then = published
    found = [_reduction("original", None, stream_then, batched_then)]
    for speed in dict.fromkeys(row.remote_speed for row in rows):
        of_speed = [row for row in rows if row.remote_speed == speed and row.calls]
        stream, batched = (
            next((row for row in of_speed if (row.mode, row.wire_dtype) == wanted), None)
            for wanted in (("stream", "f32"), ("batched", "f16"))
        )
        if stream is not None and batched is not None:
            found.append(_reduction("replay", speed, stream, batched))
    return found


def pipes_row(
    contender: str,
    sizes: Sequence[tuple[int, int]],
    samples: Sequence[CellSamples],
    rows: Sequence[ReplayRow],
    found: Sequence[Found],
) -> PipesRow:
    """One flavour of the three pipes beside `batched`, f16, over the transport that took less.

    `sizes`: bytes there and back of each call.
    """
    row = PipesRow(
        contender=contender,
        calls=len(sizes),
        payload_bytes=sum(request for request, _ in sizes),
        reply_bytes=sum(reply for _, reply in sizes),
        **harness.summarise(samples),
    )
    # A run is one duration: it has a mean and no percentiles.
    row.p99_us = None
    if row.p50_us is not None:
        row.total_s = row.p50_us * len(sizes) / 1e6
    totals = [None if one.error else sum(one.durations_ns) / 1e9 for one in samples]
    batched = [
        runs
        for rival, runs in zip(rows, found, strict=True)
        if (rival.mode, rival.wire_dtype) == ("batched", "f16")
    ]
    rival = _least(batched, lambda run: run.alone_s)
    if rival is not None:
        row.alone_ratio = _ratio(totals, _each(rival, lambda run: run.alone_s))
        row.exchange_ratio = _ratio(totals, _each(rival, lambda run: run.exchange_s))
        row.transport_ratio = _ratio(totals, _each(rival, lambda run: run.transport_s))
    return row


def _chosen(candidates: Sequence[Candidate]) -> str:
    """A way to send, as a few words."""
    for each in candidates:
        if each.is_chosen:
            return f"{each.transport} {each.wire_dtype} {each.slice_tokens}"
    return ""


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


# --- times, repeat by repeat --------------------------------------------------------------


def _token_s(run: Run) -> float | None:
    """Of the completion."""
    return None if run.decode_tokens_per_s is None else 1 / run.decode_tokens_per_s


def _each(found: Found, time_of: Callable[[Run], float | None]) -> _Times:
    return [time_of(run) if isinstance(run, Run) else None for run in found]


def _median(times: _Times) -> float | None:
    known = [each for each in times if each is not None]
    return float(np.median(known)) if known else None


def _ratio(of: _Times, to: _Times) -> float | None:
    """The median of the repeats' ratios: both sides of one had the same minute of the machine."""
    pairs = zip(of, to, strict=False)  # where one failed, it has fewer
    return _median([a / b for a, b in pairs if a is not None and b])


def _least(found: Sequence[Found], time_of: Callable[[Run], float | None]) -> Found | None:
    """The runs whose median is the least; None when none has one."""
    medians = [(_median(_each(runs, time_of)), runs) for runs in found]
    known = [(median, runs) for median, runs in medians if median is not None]
    return min(known, key=lambda each: each[0])[1] if known else None


def _ratio_to_least(
    runs: Found, rivals: Sequence[Found], time_of: Callable[[Run], float | None]
) -> float | None:
    best = _least(rivals, time_of)
    return None if best is None else _ratio(_each(runs, time_of), _each(best, time_of))
