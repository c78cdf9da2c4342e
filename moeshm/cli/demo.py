"""`moeshm demo`: a small model writes Python, its routed experts in a worker process."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from ..demo.placed import Shares
    from ..demo.run import Outcome

#: Where output is no terminal, the table gets all the room it needs.
_FILE_COLUMNS = 160
#: Why a fallback computes, for people.
_CAUSES = {
    "worker_died": "the worker died, or could not be reached",
    "deadline": "no answer before the deadline",
    "worker_down": "the worker is left alone for a while after it was lost",
}


@click.command()
@click.option(
    "--prompt", metavar="TEXT", help="Goes before the text; by default the head of a function."
)
@click.option(
    "--tokens",
    "n_tokens",
    type=click.IntRange(1),
    default=800,
    show_default=True,
    help="To generate; a token is a byte.",
)
@click.option("--kill-worker", is_flag=True, help="SIGKILL the worker in the middle of a call.")
@click.option(
    "--hot",
    type=click.FloatRange(0, 1),
    metavar="FRACTION",
    help="So many of each layer's experts stay here, those that a first run uses most.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def demo(
    prompt: str | None, n_tokens: int, kill_worker: bool, hot: float | None, as_json: bool
) -> None:
    """Generate text with a small model whose experts run in a worker process.

    A worker that dies is replaced, and what it left is computed here: the text stays the same. The
    exit status is 1 when the experts in this process give another text, or other logits.
    """
    import msgspec
    from rich.console import Console

    from ..demo.run import DEFAULT_PROMPT, run
    from ..demo.text import TextStream

    if hot is not None:
        _check_hot(hot, kill_worker)
    before = DEFAULT_PROMPT if prompt is None else os.fsencode(prompt)
    _replace_what_cannot_be_encoded()
    stream = TextStream()

    def show(token: int) -> None:
        click.echo(stream.feed(bytes([token])), nl=False)

    with _warnings_afterwards():
        if as_json:
            outcome = run(before, n_tokens, kill_worker, lambda _token: None, hot)
        else:
            click.secho(stream.feed(before), nl=False, dim=True)
            outcome = run(before, n_tokens, kill_worker, show, hot)
            click.echo(stream.end() + "\n")
    if as_json:
        click.echo(msgspec.json.encode(as_plain(outcome)).decode())
    else:
        print_outcome(outcome, Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS))
    if not outcome.agrees:
        raise click.ClickException(_disagreement(outcome))


def as_plain(outcome: Outcome) -> dict[str, Any]:
    """What --json prints; `text` is what was generated, without the prompt.

    `hot_fraction` as it was asked for, and the shares of (token, expert) pairs that hot experts
    computed here and that the worker computed; all three null without --hot.
    """
    stats, shares = outcome.stats, outcome.shares
    return {
        "text": outcome.generated.decode("utf-8", "replace"),
        "tokens": len(outcome.generated),
        "tokens_per_s": len(outcome.generated) / outcome.elapsed_s,
        "calls": stats.calls,
        "rows": stats.rows,
        "bytes_out": stats.bytes_out,
        "bytes_in": stats.bytes_in,
        "max_abs_logit_diff": outcome.comparison.max_abs_logit_diff,
        "fallback_calls": stats.fallback_calls,
        "worker_restarts": outcome.worker_restarts,
        "hot_fraction": None if shares is None else shares.fraction,
        "hot_share": None if shares is None else shares.hot_share,
        "cold_share": None if shares is None else shares.cold_share,
    }


def print_outcome(outcome: Outcome, console: Console) -> None:
    """A line per figure, with what belongs to it in words."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in _lines(outcome):
        table.add_row(name, Text(value))
    console.print(table)


def _lines(outcome: Outcome) -> Iterator[tuple[str, str]]:
    stats, n_tokens = outcome.stats, len(outcome.generated)
    if outcome.shares is not None:
        yield from _share_lines(outcome.shares)
    if outcome.transport is not None:
        reasons = "".join(f"; {why}" for why in outcome.stepped_down)
        yield "transport", outcome.transport + reasons
        yield "worker", f"process {outcome.worker_pid}; this is {os.getpid()}"
    else:
        yield "worker", f"none, as no expert is cold; this is process {os.getpid()}"
    included = ", the restart included" * bool(outcome.worker_restarts)
    yield (
        "tokens/s",
        f"{n_tokens / outcome.elapsed_s:,.0f} ({n_tokens:,} tokens{included}); "
        f"{n_tokens / outcome.in_process_s:,.0f} with the experts in this process",
    )
    if outcome.transport is not None:
        yield from _call_lines(outcome)
    yield "logits", _logits(outcome)
    causes = "; ".join(_CAUSES.get(cause, cause) for cause in outcome.fallback_causes)
    yield "fallback calls", f"{stats.fallback_calls}{': ' * bool(causes)}{causes}"
    yield "worker restarts", f"{outcome.worker_restarts}{_restart_reason(outcome)}"


def _share_lines(shares: Shares) -> Iterator[tuple[str, str]]:
    yield (
        "hot experts",
        f"{shares.n_hot} of {shares.num_experts} in each layer, those that a first run in this "
        "process used most",
    )
    fallback_share = 1 - shares.hot_share - shares.cold_share
    fallback = f", {fallback_share:.1%} by the fallback" * bool(shares.fallback_slots)
    yield (
        "hot share",
        f"{shares.hot_share:.1%} of (token, expert) pairs computed by hot experts here, "
        f"{shares.cold_share:.1%} by the worker{fallback}",
    )
    yield (
        "hot rows",
        f"{shares.hot_rows:,} of {shares.rows:,} were not sent, as they had no cold expert",
    )


def _call_lines(outcome: Outcome) -> Iterator[tuple[str, str]]:
    stats = outcome.stats
    which = ", where it had a cold expert" * (outcome.shares is not None)
    yield (
        "calls",
        f"{stats.calls:,}, one for each of {outcome.n_layers} layers and every step{which}",
    )
    yield "rows", f"{stats.rows:,}"
    yield "bytes", f"{stats.bytes_out:,} to the worker, {stats.bytes_in:,} back"
    if stats.calls:
        pack, wait, compute, unpack = (
            f"{seconds / stats.calls * 1e6:.1f}"
            for seconds in (stats.pack_s, stats.wait_s, stats.compute_s, stats.unpack_s)
        )
        yield (
            "µs per call",
            f"pack {pack}, wait {wait}, unpack {unpack}; meanwhile the worker computes {compute}",
        )


def _logits(outcome: Outcome) -> str:
    from ..demo.run import MAX_LOGIT_DIFF

    difference, first_other_token = outcome.comparison
    text = (
        "the text is the same"
        if first_other_token is None
        else f"the text is another from token {first_other_token} on"
    )
    return (
        f"largest difference {difference:.3g} from the experts in this process "
        f"({MAX_LOGIT_DIFF:g} is allowed); {text}"
    )


def _restart_reason(outcome: Outcome) -> str:
    if outcome.kill is None:
        if outcome.kill_worker:
            return ": no SIGKILL, as no call was on its way after half of the text"
        return ": it was lost" if outcome.worker_restarts else ""
    pid, token, layer = outcome.kill
    return (
        f": SIGKILL to process {pid} during token {token}, with a call of layer {layer} on its way"
    )


def _disagreement(outcome: Outcome) -> str:
    from ..settings import current

    wire = current().wire_dtype
    remedy = "; activations were rounded, set MOESHM_WIRE_DTYPE=auto" * (wire in ("f16", "bf16"))
    return f"the worker's logits are not right: {_logits(outcome)}{remedy}"


def _check_hot(hot: float, kill_worker: bool) -> None:
    """click.UsageError, SettingError: before anything is printed."""
    from ..demo.placed import n_hot_experts

    n_hot, num_experts = n_hot_experts(hot)
    if kill_worker and n_hot == num_experts:
        raise click.UsageError(
            f"--hot {hot:g} keeps all {num_experts} experts of a layer here, and --kill-worker "
            "finds no worker; make --hot smaller"
        )


def _replace_what_cannot_be_encoded() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def _warnings_afterwards() -> Iterator[None]:
    """Keep log records out of the text that is being written: they follow it."""
    target = logging.StreamHandler()
    target.setFormatter(logging.Formatter("moeshm: %(message)s"))
    handler = MemoryHandler(capacity=sys.maxsize, flushLevel=sys.maxsize, target=target)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("moeshm")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
