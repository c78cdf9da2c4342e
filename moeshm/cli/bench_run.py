"""What every benchmark's command has: its options, a progress bar, and how the report is shown."""

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
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}

plot_option = click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE.png",
    help="Draw the curves; needs matplotlib.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
seed_option = click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of everything random, and of the order of the contenders in each repeat.",
)


def parse_sizes(text: str) -> list[int]:
    """`64,8K,1M` as bytes; click.BadParameter names the word that is no size."""
    sizes = []
    for word in text.split(","):
        unit = word.strip()[-1:].upper()
        unit = "" if unit.isdigit() else unit
        number = word.strip()[: len(word.strip()) - len(unit)]
        if unit not in _UNITS or not number.isdecimal() or int(number) == 0:
            raise click.BadParameter(f"{word!r} is no size; write bytes like 64, 8K or 16M")
        sizes.append(int(number) * _UNITS[unit])
    return list(dict.fromkeys(sizes))


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
