"""Answers an order to hold experts with rows, or with layers that no model has.

The client would send calls of shapes that were never agreed on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from moeshm import protocol
from moeshm.dtypes import DType
from moeshm.errors import WorkerDied
from moeshm.session import Session
from tests.crash.arithmetic import FREE, ArithmeticBackend
from tests.hostile.attack import Refusal, Variant
from tests.hostile.lying import INPUTS, Lie, lied_to, replying

SIDE = "worker"
REFUSAL = Refusal(WorkerDied, "")


def _held_as(**fields: Any) -> Lie:
    """An answer to an order, of layers that are right but for this."""

    def lie(opened: Session, call_id: int) -> None:
        layers = {FREE: msgspec.structs.replace(ArithmeticBackend().layers[FREE], **fields)}
        opened.transport.write(protocol.pack_held(call_id, layers), protocol.REPLY)

    return lie


def _other_type(opened: Session, _: int) -> None:
    opened.transport.write(protocol.pack_call(1, *INPUTS, DType.F32), protocol.CALL)


VARIANTS = {
    "rows": Variant(replying(), "rows of 192 bytes answer an order"),
    "fewer experts than it lists": Variant(
        _held_as(num_experts=1, top_k=1, experts=()), "says it holds cannot be: experts must lie"
    ),
    "a size that no call has": Variant(_held_as(hidden_size=1 << 32), "fits no call"),
    "layers without end": Variant(
        replying(b"\xdf\xff\xff\xff\xff" + bytes(100 << 10), status=4),
        "102469 bytes; 65536 is the most",
    ),
    "another type": Variant(_other_type, "record type 1"),
}


def scene(folder: Path, transport: str, lie: Lie, refusal: Refusal) -> None:
    """Later orders fail, too."""
    with lied_to(folder, transport, lie) as client:
        with pytest.raises(WorkerDied, match=refusal.says):
            client.hold({FREE: (1,)})
        with pytest.raises(WorkerDied):
            client._link.views.hold({FREE: (1,)}, 1.0)
