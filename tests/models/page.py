"""The part of docs/model.md that is made: each step's memory order, and its line in the ring.

usage: python -m tests.models.page
"""

from __future__ import annotations

import sys

from . import orders
from .source import ROOT
from .steps import STEPS, Moved, Step

PAGE = ROOT / "docs/model.md"
_MARK = "<!-- From here on made by `make model-page`. -->\n"


def render() -> str:
    """Everything after the mark. Raises Moved."""
    lines = ["| step | | operation, order | line | in |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {step.number} | {step.what} | {_operation(step)} | {step.file}:{step.line()} | "
        f"`{step.function}`: `{step.snippet}` |"
        for step in STEPS
    ]
    return "\n".join(lines) + "\n"


def _operation(step: Step) -> str:
    """As the code has it; of plain loads and stores, as the model has it."""
    function = step.operation()
    if function:
        name, order = function.removeprefix("moeshm_"), orders.orders()[function]
        return f"{name}, after the kernel's barrier" if order == name else f"{name}, {order}"
    modelled = orders.operations().get(step.number, "")
    return f"{modelled}, {orders.MEANT[modelled].order}" if modelled else ""


def written() -> str:
    """What the page has after the mark."""
    return PAGE.read_text().partition(_MARK)[2]


def main() -> None:
    """Rewrite the page."""
    try:
        table = render()
    except Moved as moved:
        sys.exit(str(moved))
    PAGE.write_text(PAGE.read_text().partition(_MARK)[0] + _MARK + table)


if __name__ == "__main__":
    main()
