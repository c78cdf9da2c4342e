"""The part of docs/model.md that is made: the line of the ring of each step of the model.

usage: python -m tests.models.page
"""

from __future__ import annotations

import sys

from .steps import ROOT, STEPS, Moved

PAGE = ROOT / "docs/model.md"
_MARK = "<!-- From here on made by `make model-page`. -->\n"


def render() -> str:
    """Everything after the mark. Raises Moved."""
    lines = ["| step | | line | in |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {step.number} | {step.what} | {step.file}:{step.line()} | "
        f"`{step.function}`: `{step.snippet}` |"
        for step in STEPS
    ]
    return "\n".join(lines) + "\n"


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
