"""Options that several benchmarks' commands have, and how their texts are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click

from .devices import device_of

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Parser = Callable[[click.Context, click.Parameter, Any], Any]
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


class _Option(Protocol):
    def __call__(self, command: _Command, /) -> _Command: ...


plot_option: _Option = click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE.png",
    help="Draw the curves; needs matplotlib.",
)
json_option: _Option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead."
)
seed_option: _Option = click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Of everything random, and of the order of the contenders in each repeat.",
)


# --- how often, and on what -------------------------------------------------------------------


def repeats_option(default: int, text: str) -> _Option:
    """`--repeats`; `text` says of what."""
    return click.option(
        "--repeats", type=click.IntRange(1), default=default, show_default=True, help=text
    )


def device_option(name: str, text: str) -> _Option:
    """A processor or a GPU; by default the processor."""
    return click.option(
        name,
        default="cpu",
        show_default=True,
        callback=device_of("cpu"),
        metavar="cpu|cuda:N|hip:N",
        help=text,
    )


def gpu_option(name: str, text: str, default: str = "auto") -> _Option:
    """A GPU; the benchmark makes of auto what `text` says."""
    return click.option(
        name, default=default, show_default=True, metavar="cuda:N|hip:N|auto", help=text
    )


# --- which layers and calls -------------------------------------------------------------------


def shape_option(choices: Sequence[str], default: str) -> _Option:
    """`--shape`, of one layer."""
    return click.option(
        "--shape",
        type=click.Choice(choices),
        default=default,
        show_default=True,
        help="The model whose layer is computed.",
    )


def scale_option(text: str) -> _Option:
    """`--scale`, a divisor."""
    return click.option("--scale", type=click.IntRange(1), default=1, show_default=True, help=text)


def dtype_option(*choices: str, text: str | None = None) -> _Option:
    """`--dtype`; by default the first."""
    return click.option(
        "--dtype",
        type=click.Choice(choices),
        default=choices[0],
        show_default=True,
        help=text,
    )


def tokens_option(example: str, default: str | None, text: str) -> _Option:
    """`--tokens`: numbers, or None where there is no default."""
    return click.option(
        "--tokens",
        "n_tokens",
        callback=numbers_of(int, example),
        metavar="LIST",
        default=default,
        show_default=True,
        help=text,
    )


def sizes_option(default: str, text: str) -> _Option:
    """`--sizes`, in bytes."""
    return click.option(
        "--sizes",
        default=default,
        show_default=True,
        callback=lambda _context, _option, sizes: parse_sizes(sizes),
        help=text,
    )


def words_option(
    name: str, choices: Sequence[str], default: Sequence[str] = (), text: str | None = None
) -> _Option:
    """Some of the choices; by default all."""
    return click.option(
        name,
        callback=_words_of(*choices),
        metavar="LIST",
        default=",".join(default or choices),
        show_default=True,
        help=text,
    )


# --- what is written in one word --------------------------------------------------------------


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


def _words_of(*choices: str) -> _Parser:
    """Some of the choices, separated by commas."""

    def parse(_context: click.Context, _option: click.Parameter, text: str) -> list[str]:
        words = [word.strip() for word in text.split(",")]
        for word in words:
            if word not in choices:
                raise click.BadParameter(f"{word!r}; choose among {', '.join(choices)}")
        return list(dict.fromkeys(words))

    return parse


def numbers_of(number_of: Callable[[str], float], example: str) -> _Parser:
    """Numbers above 0, separated by commas; None where nothing was given."""

    def parse(
        _context: click.Context, _option: click.Parameter, text: str | None
    ) -> list[float] | None:
        if text is None:
            return None
        numbers = []
        for word in text.split(","):
            try:
                number = number_of(word.strip())
            except (ValueError, ZeroDivisionError):
                number = 0
            if not 0 < number < math.inf:
                raise click.BadParameter(
                    f"{word.strip()!r} is no number above 0; write some like {example}"
                )
            numbers.append(number)
        return list(dict.fromkeys(numbers))

    return parse
