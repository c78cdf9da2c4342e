"""`moeshm doctor`: what this machine offers moeshm, and the remedy where something is missing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from ..diagnosis import Diagnosis

#: Where output is no terminal, the table gets all the room it needs.
_FILE_COLUMNS = 160
_STYLES = {"ok": "green", "degraded": "yellow", "missing": "red"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """Check this machine: versions, limits, system calls, GPUs, and what `auto` picks here.

    The exit status is 1 when something is missing that moeshm cannot do without.
    """
    import msgspec
    from rich.console import Console

    from .. import diagnosis

    report = diagnosis.diagnose()
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        print_report(report, Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS))
    context.exit(0 if report.auto.transport else 1)


def print_report(report: Diagnosis, console: Console) -> None:
    """One line per finding, its remedy below it, and then what `auto` picks."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("found, and → remedy", overflow="fold")
    for finding in report.findings:
        # Text, not str: brackets as in 'moeshm[cuda13]' are no markup.
        found = Text(finding.value)
        if finding.remedy:
            found.append(f"\n→ {finding.remedy}", style="bold")
        table.add_row(finding.name, Text(finding.status, style=_STYLES[finding.status]), found)
    console.print(table)
    auto = report.auto
    if auto.transport is None:
        console.print(auto.transport_reason, style="red", markup=False, highlight=False)
        return
    for what, picked, reason in (
        ("transport", auto.transport, auto.transport_reason),
        ("device", auto.device, auto.device_reason),
    ):
        console.print(f"auto picks {what} {picked}: {reason}", markup=False, highlight=False)
