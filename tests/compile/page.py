"""The part of docs/kernels.md that is made: what each kernel takes of each card.

usage: python -m tests.compile.page
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .cases import CASES, FILES, PAGE_TARGETS, Case, Target, cases_of
from .compilers import CompileError, CompilerMissing
from .usage import Usage

PAGE = Path(__file__).parents[2] / "docs/kernels.md"
_MARK = "<!-- From here on made by `make kernel-page`. -->\n"

#: What became of a case.
Outcome = list[Usage] | CompileError | CompilerMissing
#: A kernel with its variant, then a card's name, to what is written of it.
Cells = dict[tuple[str, str], dict[str, str]]


def compile_all(cases: Iterable[Case]) -> dict[Case, Outcome]:
    """Compile, as many at a time as there are processors."""
    found: dict[Case, Outcome] = {}
    ready = []
    for case in cases:
        try:
            case.target.find()
            ready.append(case)
        except CompilerMissing as missing:
            found[case] = missing
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found.update(zip(ready, pool.map(_compile, ready), strict=True))
    return found


def _compile(case: Case) -> Outcome:
    try:
        return case.compile()
    except CompileError as error:
        return error


def columns_of(file: str) -> list[Target]:
    """The cards of a file's table."""
    used = {case.target for case in cases_of(file)}
    return [target for target in PAGE_TARGETS if target in used]


def cells_of(outcomes: Mapping[Case, Outcome]) -> Cells:
    """What a file's table says of the cases that were compiled."""
    cells: Cells = {}
    for case, outcome in outcomes.items():
        if isinstance(outcome, list) and case.target in PAGE_TARGETS:
            for usage in outcome:
                row = cells.setdefault((usage.kernel, case.variant), {})
                row[case.target.name] = _cell(usage)
    return cells


def _cell(usage: Usage) -> str:
    local = f" **{usage.local_bytes}**" if usage.local_bytes else ""
    return f"{usage.registers} {usage.shared_bytes}{local}"


# --- the text -----------------------------------------------------------------------------


def render(outcomes: Mapping[Case, Outcome]) -> str:
    """Everything after the mark, from the outcomes of every case."""
    lines = ["| card | by |", "| --- | --- |"]
    lines += [f"| {target.name} | {target.find().version} |" for target in PAGE_TARGETS]
    for file in FILES:
        names = [target.name for target in columns_of(file)]
        lines += ["", f"### {file}", f"| kernel | compiled for | {' | '.join(names)} |"]
        lines += ["| --- " * (2 + len(names)) + "|"]
        cells = cells_of({case: outcomes[case] for case in cases_of(file)})
        for (kernel, variant), row in sorted(cells.items()):
            figures = (row.get(name, "") for name in names)
            lines.append(f"| {kernel} | {variant} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def read_versions(text: str) -> dict[str, str]:
    """By card, the compiler of the page's figures."""
    return dict(re.findall(r"^\| (\w+) \| (.+) \|$", _table(text, "card"), re.MULTILINE))


def read_cells(text: str, file: str) -> Cells:
    """What the page says of a file's kernels; nothing where it lacks the file."""
    if f"### {file}\n" not in text:
        return {}
    header, *rows = _table(text, "kernel", f"### {file}\n").splitlines()
    names = _words(header)[2:]
    cells: Cells = {}
    for row in rows[1:]:
        kernel, variant, *figures = _words(row)
        cells[kernel, variant] = dict(zip(names, figures, strict=True))
    return cells


def _table(text: str, first_column: str, heading: str = _MARK) -> str:
    """The table after a heading, from its first column's name to the empty line that ends it."""
    start = text.index(f"| {first_column} |", text.index(heading))
    return text[start:].partition("\n\n")[0]


def _words(row: str) -> list[str]:
    return [word.strip() for word in row.split("|")[1:-1]]


def main() -> None:
    """Rewrite the page; every compiler must be here."""
    outcomes = compile_all(CASES)
    failed = {case: each for case, each in outcomes.items() if not isinstance(each, list)}
    if failed:
        sys.exit("\n".join(f"{case}: {problem}" for case, problem in failed.items()))
    head, mark, _ = PAGE.read_text().partition(_MARK)
    PAGE.write_text(head + mark + render(outcomes))


if __name__ == "__main__":
    main()
