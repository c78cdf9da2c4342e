"""The command line: one file a command, imported when it is called."""

from __future__ import annotations

import importlib
import sys

import click

from .._version import VERSION
from ..errors import MoeshmError

#: Command name to its one-line help; the module has the same name.
COMMANDS = {
    "worker": "Serve a model's experts to engines on this machine.",
    "demo": "Generate text with a small model whose experts run in a worker process.",
    "place": "Choose which experts stay in the engine, from routing statistics and a budget.",
    "doctor": "Check this machine, and say what is missing and how to mend it.",
    "soak": "Mix load, crashes and hostile peers on this machine, and check every result.",
    "bench": "Measure this machine: how fast bytes and calls pass between two processes.",
}

#: Where output is no terminal, a table gets the room it needs.
FILE_COLUMNS = 110


class _LazyGroup(click.Group):
    """Imports a command only when it is called: `worker` must choose its environment first, and
    `--help` should not take a second."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{cmd_name}", __name__)
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="moeshm")
def cli() -> None:
    """Mixture-of-Experts layers computed in another process, over lock-free shared memory."""


def main() -> None:
    """Run the command line; what moeshm raises on purpose becomes one line and exit status 1."""
    try:
        cli(prog_name="moeshm")
    except MoeshmError as error:
        click.echo(f"moeshm: {error}", err=True)
        sys.exit(1)
