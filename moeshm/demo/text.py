"""Turns the bytes that a model writes, one by one, into text that a terminal can show."""

from __future__ import annotations

import codecs

#: A control character could move the cursor or change colours; its picture (U+2400 and on) cannot.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES[0x7F] = 0x2421
#: Those of ISO 8859-1 act like ESC and a letter in some terminals, and have no pictures.
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class TextStream:
    """UTF-8 in pieces to characters; what is no UTF-8 becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, piece: bytes) -> str:
        """The characters that are complete with `piece`."""
        return self._decoder.decode(piece).translate(_PICTURES)

    def end(self) -> str:
        """What stands for a character that was begun and will not be completed."""
        return self._decoder.decode(b"", final=True)
