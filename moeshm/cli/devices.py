"""Options that take the name of a device."""

from __future__ import annotations

import re
from collections.abc import Callable

import click


def device_of(*others: str) -> Callable[[click.Context, click.Parameter, str], str]:
    """The callback of one that takes a GPU's name, or one of these words."""

    def check(_context: click.Context, _option: click.Parameter, name: str) -> str:
        if name not in others and re.fullmatch(r"(cuda|hip)(:\d+)?", name) is None:
            raise click.BadParameter(f"{name!r} is not {', '.join(others)}, cuda:N or hip:N")
        return name

    return check
