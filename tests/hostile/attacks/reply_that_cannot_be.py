"""Answers a call with a reply to another, of another shape, or of no kind there is.

The client would hand out rows that are not its call's, or read beyond the record.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from moeshm import protocol
from moeshm.dtypes import DType
from moeshm.errors import WorkerDied
from moeshm.session import Session
from tests.crash.arithmetic import HIDDEN_SIZE, ArithmeticBackend
from tests.hostile.attack import Refusal, Variant
from tests.hostile.lying import INPUTS, ROWS, Lie, lied_to, replying

SIDE = "worker"
REFUSAL = Refusal(WorkerDied, "")


def _other_type(opened: Session, _: int) -> None:
    """A call, to the client."""
    opened.transport.write(protocol.pack_call(1, *INPUTS, DType.F32), protocol.CALL)


def _nothing(opened: Session, _: int) -> None:
    """An empty record."""
    opened.transport.write((), protocol.REPLY)


def _holding(opened: Session, call_id: int) -> None:
    """What would answer an order; its header is that of rows that fit."""
    layers = msgspec.msgpack.encode(dict(ArithmeticBackend().layers))
    replying(layers, status=4)(opened, call_id)


VARIANTS = {
    "another call's id": Variant(replying(call_id=999), "a reply to call 999, which is not open"),
    "fewer rows": Variant(
        replying(ROWS[: len(ROWS) // 2], n_tokens=1),
        "answered by f32 [1, 16] instead of f32 [2, 16]",
    ),
    "wider rows": Variant(replying(ROWS * 2, hidden_size=2 * HIDDEN_SIZE), "f32 [2, 32] instead"),
    "another dtype": Variant(replying(ROWS[: len(ROWS) // 2], dtype=1), "f16 [2, 16] instead"),
    "an unknown dtype": Variant(replying(dtype=77), "dtype 77"),
    "an unknown status": Variant(replying(status=9), "status 9"),
    "another version": Variant(replying(version=2), "reply version 2"),
    "more rows than came": Variant(replying(n_tokens=2**32 - 1), "4294967295 tokens"),
    "rows that wrap 32 bits": Variant(replying(n_tokens=(1 << 26) + 2), f"{(1 << 26) + 2} tokens"),
    "rows that wrap 64 bits": Variant(
        replying(n_tokens=1 << 31, hidden_size=1 << 31), "2147483648 tokens of 2147483648"
    ),
    "a byte too many": Variant(replying(ROWS + b"x"), "holds 193 bytes"),
    "what a view holds": Variant(_holding, "answered by what a view holds, not rows"),
    "an age of computing": Variant(
        replying(compute_ns=2**63 - 1), "9223372036854775807 ns to compute"
    ),
    "just too long": Variant(replying(compute_ns=10**15 + 1), "no call lasts so long"),
    "another type": Variant(_other_type, "record type 1"),
    "nothing": Variant(_nothing, "record type 2 of 0 bytes"),
}


def scene(folder: Path, transport: str, lie: Lie, refusal: Refusal) -> None:
    """The session ends, and the caller's array is as it was."""
    out = np.full_like(INPUTS.hidden_states, 7)
    with lied_to(folder, transport, lie) as client:
        with pytest.raises(WorkerDied, match=re.escape(refusal.says)):
            client.compute(*INPUTS, out=out)
        assert (out == 7).all()
