"""Answers a call with an error whose text is no text, holds formats, or never ends.

It goes into exceptions and logs, and is copied before anybody looks at it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from moeshm.errors import InvalidCall, MoeshmError, WorkerDied, WorkerFailed
from tests.hostile.attack import Refusal, Variant
from tests.hostile.lying import INPUTS, lied_to, replying

SIDE = "worker"
REFUSAL = Refusal(WorkerFailed, "%s {}")
_TEXT = b"\xff\0 %s {}" + "é".encode()[:1]
VARIANTS = {
    "an invalid call": Variant((1, _TEXT), error=InvalidCall),
    "a failed one": Variant((2, _TEXT)),
    "64 KiB": Variant((2, b"x" * (64 << 10)), "65600 bytes; 4096 is the most", WorkerDied),
}


def scene(folder: Path, transport: str, what: tuple[int, bytes], refusal: Refusal) -> None:
    """The count of tokens says nothing here."""
    status, text = what
    lie = replying(text, status=status, n_tokens=2**32 - 1)
    kind = refusal.error or MoeshmError
    with lied_to(folder, transport, lie) as client, pytest.raises(kind) as caught:
        client.compute(*INPUTS)
    assert refusal.says in str(caught.value)
    assert len(str(caught.value)) < 5000
