"""`moeshm place --watch`: proposes swaps whenever the engine has saved new statistics."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from ..errors import SettingError
from ..placement import Placement
from ..routing_stats import RoutingStats
from ..signals import signals_as_bytes
from ..swaps import Swap, apply_swaps, propose_swaps
from . import FILE_COLUMNS

if TYPE_CHECKING:
    from rich.console import Console


#: An engine that does little counts little, and moving experts for chance would be no gain.
MIN_SIGMAS = 3.0


class Proposal(msgspec.Struct, frozen=True):
    """What one look at new counts led to; --json prints it."""

    #: From 1.
    step: int
    #: (token, expert) pairs that were counted since the step before.
    counted_slots: float
    #: Of these, in the placement as it is, and with the swaps.
    hot_share: float
    proposed_hot_share: float
    swaps: list[Swap]
    #: Where the new placement was written; null if it was not.
    written: str | None


class Watch:
    """Statistics that an engine saves to a file, and the placement that it has."""

    def __init__(
        self,
        stats_path: str,
        placement_path: str,
        min_gain: float,
        max_swaps: int,
        output: str | None,
    ) -> None:
        self._stats_path = Path(stats_path)
        self._placement_path = placement_path
        self._min_gain = min_gain
        self._max_swaps = max_swaps
        self._output = output
        self._placement = Placement.load(placement_path)
        self._version: tuple[int, ...] = ()
        self._last: RoutingStats | None = None
        self._n_steps = 0

    def step(self) -> Proposal | None:
        """Look at what was counted since the last step; None if the engine saved nothing new.

        With an output the next step builds on what this one proposes, else on the placement's
        file as it is then. SettingError: a file cannot be read or written.
        """
        stats = self._read_new()
        if stats is None:
            return None
        counted = stats if self._last is None else stats.since(self._last)
        self._last = stats
        total = counted.total()
        if not total:
            return None
        if self._output is None:
            self._placement = Placement.load(self._placement_path)
        placement = self._placement
        swaps = propose_swaps(
            placement,
            counted,
            min_gain=self._min_gain,
            max_swaps=self._max_swaps,
            min_sigmas=MIN_SIGMAS,
        )
        proposed = apply_swaps(placement, swaps)
        written = None
        if self._output is not None and swaps:
            proposed.save(self._output)
            self._placement = proposed
            written = self._output
        self._n_steps += 1
        return Proposal(
            step=self._n_steps,
            counted_slots=total,
            hot_share=placement.total_hot_share(counted) or 0.0,
            proposed_hot_share=proposed.total_hot_share(counted) or 0.0,
            swaps=swaps,
            written=written,
        )

    def _read_new(self) -> RoutingStats | None:
        """The file's content, unless it is not there yet or was read before."""
        try:
            found = self._stats_path.stat()
        except FileNotFoundError:
            return None
        # Taken before it is read: what is saved meanwhile is another version, and read again.
        version = found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
        if version == self._version:
            return None
        stats = RoutingStats.load(self._stats_path)
        self._version = version
        return stats


def watch(
    task: Watch, interval_s: float, n_steps: int | None, show: Callable[[Proposal], None]
) -> None:
    """Step every `interval_s` until SIGINT or SIGTERM, or until `n_steps` were shown.

    After the first, a step whose files cannot be used is left out: a person may be editing them.
    """
    with signals_as_bytes() as signals:
        left = n_steps
        is_first = True
        last_error = ""
        while left is None or left > 0:
            proposal = None
            try:
                proposal = task.step()
            except SettingError as error:
                if is_first:
                    raise
                if str(error) != last_error:
                    last_error = str(error)
                    click.echo(f"moeshm: {error}; looking again", err=True)
            if proposal is not None:
                is_first = False
                show(proposal)
                left = None if left is None else left - 1
            if left != 0 and select.select([signals], [], [], interval_s)[0]:
                return


def shower(as_json: bool) -> Callable[[Proposal], None]:
    """What prints a proposal: a table, or a JSON object in a line."""
    if as_json:
        return lambda proposal: click.echo(msgspec.json.encode(proposal).decode())
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)
    return lambda proposal: _print(proposal, console)


def _print(proposal: Proposal, console: Console) -> None:
    from rich.table import Table

    swaps = proposal.swaps
    shares = f"hot share {proposal.hot_share:.1%}"
    if swaps:
        number = f"{len(swaps)} swap{'s' * (len(swaps) > 1)}"
        shares += f", {proposal.proposed_hot_share:.1%} after {number}"
    else:
        shares += "; no swap would gain enough"
    written = f"; written to {proposal.written}" if proposal.written else ""
    console.print(
        f"step {proposal.step}: {proposal.counted_slots:,.0f} slots counted, {shares}{written}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if not swaps:
        return
    table = Table()
    for heading in ("layer", "becomes hot", "becomes cold", "gained share of the layer"):
        table.add_column(heading, justify="right")
    for swap in swaps:
        gained = f"{swap.gained_share:.1%}"
        table.add_row(str(swap.layer), str(swap.promote), str(swap.demote), gained)
    console.print(table)
