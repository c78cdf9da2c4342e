"""How `moeshm bench overload` shows its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .report import make_table, number, print_meta, with_ends
from .schema import OverloadReport

if TYPE_CHECKING:
    from rich.console import Console


def print_overload(report: OverloadReport, console: Console) -> None:
    """Print where it was measured, a table, and what failed."""
    print_meta(report.meta, console)
    layer = f"{report.shape}: hidden {report.hidden_size}, intermediate {report.intermediate_size}"
    what = f"{report.num_experts} experts, top {report.top_k}, {report.weight_dtype}"
    console.print(f"{report.device}, {layer}, {what}", highlight=False)
    columns = ("clients", "tokens", "p50 ms", "p99 ms", "max ms", "tokens/s", "missed", "anew")
    title = f"Calls, those of decode with a deadline of {report.deadline_ms:g} ms"
    table = make_table(
        title, "kind", "phase", *columns, "late p99 ms", "max ms", "sleep p99 ms", "max ms"
    )
    for row, is_last in with_ends(report.results, lambda row: row.kind):
        times = (row.p50_us, row.p99_us, row.max_us)
        late = (row.late_p99_us, row.late_max_us, row.sleep_late_p99_us, row.sleep_late_max_us)
        table.add_row(
            *(row.kind, row.phase, str(row.clients), str(row.n_tokens)),
            *(_ms(each) for each in times),
            *(number(row.tokens_per_s), str(row.missed), str(row.reconnects)),
            *(_ms(each) for each in late),
            end_section=is_last,
        )
    console.print(table)
    for row in report.results:
        if row.error:
            text = f"{row.kind}, {row.phase}: {row.error}"
            console.print(text, style="yellow", markup=False, highlight=False)


def _ms(time_us: float | None) -> str:
    return number(None if time_us is None else time_us / 1e3)
