"""Text from elsewhere, made fit for a message: one line, of characters that do nothing, and cut."""

from __future__ import annotations

#: Of a peer's words in an error or a log line.
MOST_CHARACTERS = 300


def printable(text: str, most: int = MOST_CHARACTERS) -> str:
    r"""The text on one line: line ends, terminal escapes and the like are written as escapes, and
    what goes beyond `most` characters is left out.

    >>> printable("a\nb\x1b[2J")
    'a\\nb\\x1b[2J'
    """
    shown = text[:most]
    if not shown.isprintable():
        shown = "".join(each if each.isprintable() else _escaped(each) for each in shown)
    return shown if len(text) <= most else f"{shown}... ({len(text)} characters)"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
