"""Cases and what they come to, and what was told of calls."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeshm.backends.cpu import CpuBackend
from moeshm.checkpoint import load
from moeshm.demo import tiny_moe_path
from moeshm.dtypes import DType, narrow, widen
from moeshm.soak import pool
from moeshm.soak.messages import Counts, Message
from moeshm.soak.pool import Case

LAYERS = load(tiny_moe_path()).layers
CASES = pool.draw(LAYERS, seed=7)
BACKEND = CpuBackend(LAYERS, threads=1)


def found(told: list[Message]) -> list[Message]:
    """All but the signs of life."""
    return [message for message in told if not isinstance(message, Counts)]


def compute(case: Case, wire: DType | None = None) -> Any:
    out = np.empty_like(case.hidden_states)
    BACKEND.ffn(case.layer, case.hidden_states, case.topk_ids, case.topk_weights, out)
    return narrow(widen(narrow(widen(out), wire or case.wire)), case.dtype)
