"""Welcomes a client with numbers that overflow, layers that no call fits, or a way there is not.

The client sizes its calls by them.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

import moeshm
from moeshm.errors import MoeshmError, ProtocolError
from tests.crash.arithmetic import FREE, ArithmeticBackend
from tests.hostile.attack import BOTH, Refusal, Variant
from tests.hostile.lying import listening, make_rings, own_fds, sending, welcome

SIDE, TRANSPORTS = "worker", BOTH[:1]
REFUSAL = Refusal(ProtocolError, "")


def _layer(**changed: Any) -> dict[str, Any]:
    layer = msgspec.to_builtins(ArithmeticBackend().layers[FREE])
    return {"layers": {FREE: {**layer, **changed}}}


VARIANTS = {
    "another version": Variant({"protocol": 2}, "speaks protocol 2"),
    "an unknown way": Variant({"transport": "carrier pigeon"}, "carrier pigeon"),
    "no tokens": Variant({"max_tokens": 0}, "max_tokens=0"),
    "too many tokens": Variant({"max_tokens": 4097}, "max_tokens=4097"),
    "tokens at 2^31": Variant({"max_tokens": 1 << 31}, "max_tokens=2147483648"),
    "an epoch below 0": Variant({"epoch": -1}, "epoch=-1"),
    "a layer below 0": Variant(
        {"layers": {-1: msgspec.to_builtins(ArithmeticBackend().layers[FREE])}}, "layer -1"
    ),
    "a layer of 2^32": Variant(_layer(hidden_size=1 << 32), "fits no call"),
    "a layer of no size": Variant(_layer(hidden_size=0), "must be at least 1"),
    "a top_k at 2^16": Variant(_layer(num_experts=1 << 17, top_k=1 << 16), "fits no call"),
    "experts at 2^63": Variant(_layer(num_experts=1 << 63), "fits no call"),
    "an expert twice": Variant(_layer(experts=[1, 1, 2, 3]), "lists an id twice"),
    "an expert below 0": Variant(_layer(experts=[-1, 1, 2, 3]), "experts must lie in"),
    "a slab of 2^63 bytes": Variant(
        {"slab": {"kind": "pinned", "data_bytes": 1 << 63}}, "a slab of kind"
    ),
    "a slab of no kind": Variant({"slab": {"kind": "x", "data_bytes": 1 << 21}}, "a slab of kind"),
    "a slab without its memory": Variant(
        {"slab": {"kind": "pinned", "data_bytes": 1 << 21}}, "came with 2 fds"
    ),
}


def scene(folder: Path, transport: str, changed: dict[str, Any], refusal: Refusal) -> None:
    """Rings that are all right come along; none of them is kept."""
    before = own_fds()
    with contextlib.ExitStack() as stack:
        fds = make_rings()
        for fd in fds:
            stack.callback(os.close, fd)
        with (
            listening(folder, sending([welcome(transport, **changed)], fds)) as address,
            pytest.raises(refusal.error or MoeshmError, match=re.escape(refusal.says)),
        ):
            moeshm.connect(address, transport=transport)
    assert own_fds() == before
