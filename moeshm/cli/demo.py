"""`moeshm demo`: a small model writes Python, every routed expert in a worker process."""

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

    from ..demo.run import Outcome

#: Where output is no terminal, the table gets all the room it needs.
_FILE_COLUMNS = 160
#: What stands in ClientStats.fallbacks, for people.
_CAUSES = {
    "worker_died": "the worker died, or could not be reached",
    "deadline": "no answer before the deadline",
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
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def demo(prompt: str | None, n_tokens: int, kill_worker: bool, as_json: bool) -> None:
    """Generate text with a small model whose experts run in a worker process.

    A worker that dies is replaced, and what it left is computed here: the text stays the same. The
    exit status is 1 when the experts in this process give another text, or other logits.
    """
    import msgspec
    from rich.console import Console

    from ..demo.run import DEFAULT_PROMPT, run
    from ..demo.text import TextStream

    before = DEFAULT_PROMPT if prompt is None else os.fsencode(prompt)
    _replace_what_cannot_be_encoded()
    stream = TextStream()

    def show(token: int) -> None:
        click.echo(stream.feed(bytes([token])), nl=False)

    with _warnings_afterwards():
        if as_json:
            outcome = run(before, n_tokens, kill_worker, lambda _token: None)
        else:
            click.secho(stream.feed(before), nl=False, dim=True)
            outcome = run(before, n_tokens, kill_worker, show)
            click.echo(stream.end() + "\n")
    if as_json:
        click.echo(msgspec.json.encode(as_plain(outcome)).decode())
    else:
        print_outcome(outcome, Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS))
    if not outcome.agrees:
        raise click.ClickException(_disagreement(outcome))


def as_plain(outcome: Outcome) -> dict[str, Any]:
    """What --json prints; `text` is what was generated, without the prompt."""
    stats = outcome.stats
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
        "worker_restarts": stats.worker_restarts,
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
    reasons = "".join(f"; {why}" for why in stats.stepped_down)
    yield "transport", outcome.transport + reasons
    yield "worker", f"process {outcome.worker_pid}; this is {os.getpid()}"
    included = ", the restart included" * bool(stats.worker_restarts)
    yield (
        "tokens/s",
        f"{n_tokens / outcome.elapsed_s:,.0f} ({n_tokens:,} tokens{included}); "
        f"{n_tokens / outcome.in_process_s:,.0f} with the experts in this process",
    )
    yield "calls", f"{stats.calls:,}, one for each of {outcome.n_layers} layers and every step"
    yield "rows", f"{stats.rows:,}"
    yield "bytes", f"{stats.bytes_out:,} to the worker, {stats.bytes_in:,} back"
    pack, wait, compute, unpack = (
        f"{seconds / stats.calls * 1e6:.1f}"
        for seconds in (stats.pack_s, stats.wait_s, stats.compute_s, stats.unpack_s)
    )
    yield (
        "µs per call",
        f"pack {pack}, wait {wait}, unpack {unpack}; meanwhile the worker computes {compute}",
    )
    yield "logits", _logits(outcome)
    causes = "; ".join(_CAUSES.get(cause, cause) for cause in stats.fallbacks)
    yield "fallback calls", f"{stats.fallback_calls}{': ' * bool(causes)}{causes}"
    yield "worker restarts", f"{stats.worker_restarts}{_restart_reason(outcome)}"


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
        return ": it was lost" if outcome.stats.worker_restarts else ""
    pid, token, layer = outcome.kill
    return (
        f": SIGKILL to process {pid} during token {token}, with a call of layer {layer} on its way"
    )


def _disagreement(outcome: Outcome) -> str:
    from ..settings import current

    wire = current().wire_dtype
    remedy = "; activations were rounded, set MOESHM_WIRE_DTYPE=auto" * (wire in ("f16", "bf16"))
    return f"the worker's logits are not right: {_logits(outcome)}{remedy}"


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
