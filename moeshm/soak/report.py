"""What a soak found: the figures, the verdict, and how people read them."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from .ledger import Ledger


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """So far, or at the end; `moeshm soak --json` prints it."""

    seed: int
    elapsed_s: float
    #: Calls that ended, of all callers, and results that were held against the reference.
    calls: int
    checked: int
    #: Injected, and by kind.
    faults: int
    faults_by_kind: dict[str, int]
    wrong_results: int
    #: Calls that ended more than 20 ms after their deadline, and by how much the latest was late.
    deadline_misses: int
    latest_ms: float
    #: What had not ended 5 s after its deadline.
    hangs: int
    #: How many, and what.
    leaks: int
    leaks_found: list[str]
    #: Errors that calls ended with, by type, and how many of them nothing explains, with processes
    #: that ended by themselves.
    errors: dict[str, int]
    unexpected_errors: int
    #: What else callers did.
    placements_applied: int
    placements_failed: int
    views_held: int
    clients_opened_anew: int
    forgotten_futures: int
    #: How often everything came to rest, to look for leaks.
    rests: int
    #: By role, how often a process was held against what it was when it was new or rested first.
    compared: dict[str, int]
    #: By long-lived process, MiB more in memory than after its warm-up.
    growth_mib: dict[str, float]
    #: What went wrong, in words.
    failures: list[str]

    @property
    def is_clean(self) -> bool:
        """True when calls were made and nothing was found. Missed deadlines do not count: on a
        machine that is busy with others' work they say nothing about moeshm."""
        found = self.wrong_results, self.hangs, self.leaks, self.unexpected_errors
        return self.calls > 0 and not any(found) and not self.failures


def report_of(
    ledger: Ledger,
    seed: int,
    elapsed_s: float,
    rests: int,
    compared: dict[str, int],
    growth_bytes: dict[str, int],
) -> Report:
    """The figures now."""
    counts = ledger.counts
    prefix = "error: "
    return Report(
        seed=seed,
        elapsed_s=round(elapsed_s, 3),
        calls=counts["calls"],
        checked=counts["checked"],
        faults=ledger.n_faults,
        faults_by_kind=dict(sorted(ledger.faults.items())),
        wrong_results=ledger.wrong_results,
        deadline_misses=ledger.deadline_misses,
        latest_ms=round(ledger.latest_s * 1e3, 3),
        hangs=ledger.hangs,
        leaks=len(ledger.leaks),
        leaks_found=list(ledger.leaks),
        errors={
            name.removeprefix(prefix): count
            for name, count in sorted(counts.items())
            if name.startswith(prefix)
        },
        unexpected_errors=ledger.unexpected,
        placements_applied=counts["placements applied"],
        placements_failed=counts["placements that failed"],
        views_held=counts["views held"],
        clients_opened_anew=counts["clients opened anew"],
        forgotten_futures=counts["forgotten futures"],
        rests=rests,
        compared=compared,
        growth_mib={name: round(size / 2**20, 2) for name, size in growth_bytes.items()},
        failures=list(ledger.failures),
    )


def live_line(report: Report, doing: str) -> str:
    """The figures of a moment, and what is done in it."""
    return (
        f"{report.elapsed_s:,.0f} s: {report.calls:,} calls, {report.faults:,} faults, "
        f"{report.wrong_results} wrong, {report.hangs} hangs, {report.leaks} leaks, "
        f"{report.unexpected_errors} unexpected errors; {report.deadline_misses} late; {doing}"
    )


def lines_of(report: Report) -> Iterator[tuple[str, str]]:
    """A line per figure, with what belongs to it in words."""
    per_s = report.calls / report.elapsed_s if report.elapsed_s else 0.0
    yield "time", f"{report.elapsed_s:,.0f} s, seed {report.seed}"
    yield "calls", f"{report.calls:,} ({per_s:,.0f}/s); {report.checked:,} results were checked"
    yield "faults", f"{report.faults:,}: {_listed(report.faults_by_kind)}"
    yield "wrong results", f"{report.wrong_results}"
    yield (
        "deadline misses",
        f"{report.deadline_misses:,} calls ended more than 20 ms late, the latest "
        f"{report.latest_ms:,.0f} ms; no fault of moeshm's where others keep the CPUs busy",
    )
    yield "hangs", f"{report.hangs}"
    yield (
        "leaks",
        f"{report.leaks}, looked for {report.rests} times; compared with what they held: "
        f"{_listed(report.compared)}",
    )
    yield "errors", f"{_listed(report.errors)}; {report.unexpected_errors} unexpected"
    yield (
        "besides",
        f"{report.placements_applied:,} placements applied, {report.placements_failed:,} that a "
        f"lost worker stopped, {report.views_held:,} views held, {report.clients_opened_anew:,} "
        f"clients opened anew, {report.forgotten_futures:,} futures forgotten",
    )
    if report.growth_mib:
        grown = ", ".join(f"{name} {size:+.1f} MiB" for name, size in report.growth_mib.items())
        yield "memory", f"after the warm-up: {grown}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"
