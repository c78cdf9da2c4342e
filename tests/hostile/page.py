"""The part of docs/security.md that is made: the attacks that are refused.

usage: python -m tests.hostile.page
"""

from __future__ import annotations

from pathlib import Path

from .attack import Attack, load_all

PAGE = Path(__file__).parents[2] / "docs/security.md"
START, END = "<!-- attacks -->\n", "<!-- /attacks -->\n"
_SIDES = {
    "client": "Clients that attack a worker",
    "worker": "Workers that attack a client",
}


def render() -> str:
    """A table for each side."""
    lines = ["<!-- Made by `python -m tests.hostile.page`. -->"]
    attacks = load_all()
    for side, heading in _SIDES.items():
        theirs = [attack for attack in attacks if attack.side == side]
        n_variants = sum(len(attack.variants) for attack in theirs)
        lines += [
            "",
            f"### {heading}: {len(theirs)} attacks, in {n_variants} variants",
            "",
            "| attack | what it does | answer | file |",
            "| --- | --- | --- | --- |",
        ]
        lines += [_row(attack) for attack in theirs]
    return "\n".join(lines) + "\n"


def _row(attack: Attack) -> str:
    name = attack.name.replace("_", " ")
    link = f"[{attack.name}.py](../tests/hostile/attacks/{attack.name}.py)"
    cells = (name, _cell(attack.what), _answer(attack), link)
    return f"| {' | '.join(cells)} |"


def _answer(attack: Attack) -> str:
    """Errors by the names that a client of ours raises them by; what the worker's log says."""
    errors = [attack.refusal_of(variant).error for variant in attack.variants.values()]
    names = dict.fromkeys(f"`{error.__name__}`" for error in errors if error is not None)
    says = attack.refusal.says
    said = f": {_quoted(says)}" if says else ""
    answer = ", ".join(names) + said if names else says
    if attack.refusal.log:
        answer += f"{'; ' if answer else ''}log: {_quoted(attack.refusal.log)}"
    return _cell(answer)


def _quoted(text: str) -> str:
    return f"“{text}”"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\\n", r"\\n")


def replace(text: str) -> str:
    """The page with the part that is made made anew."""
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{PAGE} lacks the lines {START.strip()} and {END.strip()}")
    return head + start + render() + end + tail


def main() -> None:
    """Rewrite the page."""
    if not PAGE.exists():
        PAGE.write_text(f"# Security\n\n## Attacks that are refused\n\n{START}{END}")
    PAGE.write_text(replace(PAGE.read_text()))


if __name__ == "__main__":
    main()
