"""What threads of a calling process do with `ExpertOffload`: forwards while experts move."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..layers import LayerInfo
from ..offload import ExpertOffload, PlacementChange
from ..placement import LayerPlacement, Placement
from .books import LONG_S, Books, Line, Losses, OwnWork
from .calls import OpenLine
from .lent import LentClient
from .pool import Case

#: Deadlines of forwards, by how often.
_TIMEOUTS_S = ((LONG_S, 0.97), (0.5, 0.02), (0.05, 0.01))
#: Longest time to load experts for a placement.
_APPLY_S = 2 * LONG_S
#: Between two placements.
_PAUSE_S = (0.05, 1.0)
_AFTER_ERROR_S = 0.05


class Moves:
    """One offload over two workers. `opened`: by worker, the clients that reach it."""

    def __init__(
        self,
        books: Books,
        cases: Sequence[Case],
        line: Line,
        opened: Mapping[str, Sequence[OpenLine]],
        own_work: OwnWork,
        has_fallback: bool,
    ) -> None:
        self._books = books
        self._cases = cases
        self._line = line
        self._layers: Mapping[int, LayerInfo] = own_work.layers
        self._workers = sorted(opened)
        held = {name: each[0].client.view.experts for name, each in opened.items()}
        line.losses = losses = Losses()
        lent: dict[str, Any] = {
            name: [LentClient(books, way, losses) for way in ways] for name, ways in opened.items()
        }
        self._offload = ExpertOffload(
            lent,
            _as_held(held, self._layers),
            local=own_work,
            fallback=own_work if has_fallback else None,
        )

    def forward(self, rng: random.Random) -> None:
        """One layer of a step, anywhere between two placements."""
        case = rng.choice(self._cases)
        timeouts_s, weights = zip(*_TIMEOUTS_S, strict=True)
        timeout_s = float(rng.choices(timeouts_s, weights)[0])
        call = self._books.begin(self._line, f"forward on {self._line.name}", timeout_s)
        arguments = case.layer, case.hidden_states, case.topk_ids, case.topk_weights
        result = self._books.attempt(
            call, lambda: self._offload.forward(*arguments, timeout_s=timeout_s)
        )
        self._books.count("calls")
        if result is None:
            time.sleep(_AFTER_ERROR_S)
        else:
            self._books.check(call, case, result)

    def move(self, rng: random.Random) -> None:
        """Another placement, at random, and a look at what came of it."""
        placement = self._draw(rng)
        call = self._books.begin(self._line, f"apply on {self._line.name}", _APPLY_S)
        change = self._books.attempt(call, lambda: self._offload.apply(placement))
        if change is None:
            return
        done = self._books.attempt(call, lambda: _finish(change))
        self._books.count("placements applied" if done else "placements that failed")
        time.sleep(rng.uniform(*_PAUSE_S))

    def close(self) -> None:
        """Of the offload; the clients stay the caller's."""
        call = self._books.begin(self._line, f"close of {self._line.name}", _APPLY_S)
        self._books.do(call, self._offload.close)

    def _draw(self, rng: random.Random) -> Placement:
        layers = {}
        for number, info in self._layers.items():
            hot: list[int] = []
            cold: dict[str, list[int]] = {name: [] for name in self._workers}
            for expert in range(info.num_experts):
                holders = [name for name in self._workers if rng.random() < 0.6]
                for name in holders:
                    cold[name].append(expert)
                if not holders:
                    hot.append(expert)
            layers[number] = LayerPlacement(
                info.num_experts, tuple(hot), {name: tuple(held) for name, held in cold.items()}
            )
        return Placement(self._workers, layers)


def _finish(change: PlacementChange) -> bool:
    """True once it is applied; raises as its result."""
    change.result(_APPLY_S)
    return True


def _as_held(
    held: Mapping[str, Mapping[int, tuple[int, ...]]], layers: Mapping[int, LayerInfo]
) -> Placement:
    """Where experts are when nothing was moved yet: hot is what no worker holds."""
    placed = {}
    for number, info in layers.items():
        cold = {name: each.get(number, ()) for name, each in held.items()}
        hot = set(range(info.num_experts)).difference(*cold.values())
        placed[number] = LayerPlacement(info.num_experts, tuple(sorted(hot)), cold)
    return Placement(sorted(held), placed)
