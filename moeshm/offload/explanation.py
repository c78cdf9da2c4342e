"""Why rows travel as they do, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..policy import Verdict, Work

_HEADINGS = ("", "transport", "dtype", "slice", "predicted", "measured", "n", "why")


class Explanation(NamedTuple):
    """What the policy thinks of the ways to send one worker's part of a forward of this size."""

    worker: str
    #: The last work of its kind.
    work: Work
    verdicts: list[Verdict]
    #: By way that the policy allows, why there is none.
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        """A heading and a table; times in ms, the chosen way marked by a star."""
        work = self.work
        heading = (
            f"worker {self.worker}: {work.n_tokens} tokens, of which {work.rows:g} rows are sent, "
            f"{work.slots:g} slots of {work.experts:g} experts"
        )
        if work.on_gpu:
            heading += ", on the engine's GPU"
        missing = [f"not {way}: {why}" for way, why in self.left_out.items()]
        table = _aligned([_HEADINGS, *map(_cells, self.verdicts)])
        return "\n".join([heading, *table, *missing])


def _cells(verdict: Verdict) -> tuple[str, ...]:
    return (
        "*" if verdict.is_chosen else "",
        verdict.transport,
        str(verdict.wire_dtype),
        str(verdict.slice_tokens),
        _milliseconds(verdict.predicted_ns),
        _milliseconds(verdict.measured_ns),
        str(verdict.n_measured),
        verdict.why,
    )


def _milliseconds(ns: float | None) -> str:
    return "-" if ns is None else f"{ns / 1e6:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
