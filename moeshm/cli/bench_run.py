"""What every benchmark's command does: a progress bar, and how the report is shown."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from ..errors import MoeshmError

if TYPE_CHECKING:
    from rich.console import Console

_Report = TypeVar("_Report")
#: Where output is no terminal, tables get all the room they need.
_FILE_COLUMNS = 160


@contextlib.contextmanager
def watched(n_steps: int, plot_path: Path | None) -> Iterator[Callable[[str], None]]:
    """A progress bar while something is measured, moved on by what it yields; errors as a line."""
    from rich.console import Console
    from rich.progress import Progress

    from ..bench.report import check_plotting

    try:
        if plot_path is not None:
            check_plotting()  # before minutes are spent on measuring
        # Standard output belongs to the report alone.
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("measuring", total=n_steps)
            yield lambda name: progress.update(task, advance=1, description=f"measured {name}")
    except MoeshmError as error:
        raise click.ClickException(str(error)) from None


def show(
    report: _Report,
    print_report: Callable[[_Report, Console], None],
    plot: Callable[[_Report, Path], None] | None,
    as_json: bool,
    plot_path: Path | None,
) -> None:
    """Print the report, as tables or as JSON, and draw it where that was asked for."""
    import msgspec
    from rich.console import Console

    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        print_report(report, Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS))
    if plot is not None and plot_path is not None:
        plot(report, plot_path)
