"""A backend that computes nothing, so that a benchmark sees the transport alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import dtype_of, narrow, widen
from ..layers import LayerInfo
from . import Ids, Weights


class NullBackend:
    """Answers every row with itself, reading and writing each byte once.

    What remains of a call's time is packing, the transport and unpacking: this is what
    `moeshm bench call` measures. It is no model of experts.
    """

    name = "null"

    def __init__(self, layers: Mapping[int, LayerInfo]) -> None:
        self.layers = layers

    def ffn(
        self,
        layer: int,  # noqa: ARG002
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,  # noqa: ARG002
        topk_weights: Weights,  # noqa: ARG002
        out: npt.NDArray[Any],
    ) -> None:
        """Copy `hidden_states` into `out`, converted if the two formats differ."""
        if hidden_states.dtype == out.dtype:
            np.copyto(out, hidden_states)
        else:
            narrow(widen(hidden_states), dtype_of(out), out=out)
