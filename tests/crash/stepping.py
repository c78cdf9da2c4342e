"""A backend of plain sums that computes one of its layers in steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt

from moeshm.backends import BetweenSteps, Ids, Weights
from tests.crash.arithmetic import STEPPED, ArithmeticBackend


class SteppingArithmetic(ArithmeticBackend):
    """As `SteppingBackend`: a step for each token of a call to STEPPED, of which `on_turn` is told
    with a hundred times the call's tag and the token's number."""

    def __init__(self, on_turn: Callable[[int, int], None]) -> None:
        super().__init__(on_turn)
        self._plain = ArithmeticBackend()

    def ffn_in_steps(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
        between_steps: BetweenSteps,
    ) -> None:
        """As `SteppingBackend.ffn_in_steps`."""
        if layer != STEPPED:
            self.ffn(layer, hidden_states, topk_ids, topk_weights, out)
            return
        tag = 100 * int(hidden_states[0, 0])
        for token in range(len(hidden_states)):
            if token and between_steps.is_due():
                between_steps()
            self._on_turn(layer, tag + token)
            row = slice(token, token + 1)
            self._plain.ffn(layer, hidden_states[row], topk_ids[row], topk_weights[row], out[row])
