"""Which (token, expert) pair of a layer goes where: a placement, as tables to look ids up in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..backends import Backend
from ..layers import LayerInfo
from ..placement import Placement, PlacementError

#: int32 [num_experts + 1]: what an expert id becomes. The last entry, which -1 looks up, is -1.
Table = npt.NDArray[np.int32]


class Routes(NamedTuple):
    """Where cold experts go while some workers are left out."""

    #: By worker, global ids to its local ids; -1 for what goes elsewhere.
    by_worker: dict[str, Table]
    #: Global ids that no worker takes, as themselves; -1 for all others.
    orphans: Table
    has_orphans: bool


class LayerDispatch:
    """One layer of a placement.

    Of an expert's several workers, one is chosen by the expert's id, so that replicas share the
    work and the same pair always goes the same way.
    """

    def __init__(self, number: int, placement: Placement) -> None:
        layer = placement.layers[number]
        self.num_experts = layer.num_experts
        #: Global ids of hot experts, as themselves; -1 for all others.
        self.hot = table_of(layer.num_experts, layer.hot, layer.hot)
        self._locals = {
            worker: table_of(layer.num_experts, held, range(len(held)))
            for worker, held in layer.cold.items()
            if held
        }
        self._routes: dict[frozenset[str], Routes] = {}

    def routes(self, left_out: frozenset[str]) -> Routes:
        """The tables while these workers are left out."""
        found = self._routes.get(left_out)
        if found is None:
            found = self._routes[left_out] = self._make_routes(left_out)
        return found

    def _make_routes(self, left_out: frozenset[str]) -> Routes:
        usable = {name: table for name, table in self._locals.items() if name not in left_out}
        owner: list[str | None] = []
        for expert in range(self.num_experts):
            holders = [name for name, table in usable.items() if table[expert] >= 0]
            owner.append(holders[expert % len(holders)] if holders else None)
        by_worker = {}
        for name, table in usable.items():
            mine = np.array([*(each == name for each in owner), False])
            if mine.any():
                by_worker[name] = np.where(mine, table, np.int32(-1))
        nowhere = [
            expert for expert, name in enumerate(owner) if name is None and self.hot[expert] < 0
        ]
        orphans = table_of(self.num_experts, nowhere, nowhere)
        return Routes(by_worker, orphans, bool(nowhere))


def table_of(num_experts: int, ids: Sequence[int], values: Sequence[int]) -> Table:
    """`ids` become `values`, all others -1."""
    table = np.full(num_experts + 1, -1, np.int32)
    table[list(ids)] = values
    return table


def local_table(info: LayerInfo) -> Table:
    """Global ids to the local ids of what holds `info`."""
    return table_of(info.num_experts, info.experts, range(len(info.experts)))


def check_layers(placement: Placement, worker: str, layers: Mapping[int, LayerInfo]) -> None:
    """PlacementError unless a worker holds just what the placement gives it."""
    for number, experts in placement.experts_of(worker).items():
        info = layers.get(number)
        if info is None or info.experts != experts:
            held = "nothing" if info is None else f"{len(info.experts)} experts"
            raise PlacementError(
                f"worker {worker!r} holds {held} of layer {number}, and the placement gives it "
                f"{len(experts)}, or the same in another order; start it with --placement"
            )
        if info.num_experts != placement.layers[number].num_experts:
            raise PlacementError(
                f"layer {number} has {info.num_experts} experts at worker {worker!r} and "
                f"{placement.layers[number].num_experts} in the placement"
            )


def check_backend(what: str, backend: Backend, number: int, needed: Sequence[int]) -> Table:
    """The backend's local table of a layer; PlacementError when a needed expert is missing."""
    info = backend.layers.get(number)
    if info is None:
        raise PlacementError(f"the {what} does not hold layer {number}; load it, too")
    table = local_table(info)
    missing = [expert for expert in needed if table[expert] < 0]
    if missing:
        raise PlacementError(f"the {what} does not hold expert {missing[0]} of layer {number}")
    return table
