"""Which experts the engine computes itself (hot), and which worker holds each of the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from . import files
from .errors import SettingError
from .layers import MAX_EXPERTS, fingerprint_of, format_ranges, parse_ranges
from .routing_stats import RoutingStats

_VERSION = 1
Table = npt.NDArray[np.int32]


class PlacementError(SettingError):
    """A placement leaves an expert out, holds one twice, or does not fit what it is used for."""


class _LayerFile(msgspec.Struct, forbid_unknown_fields=True):
    num_experts: int
    hot: str
    cold: dict[str, str]


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    workers: list[str]
    layers: dict[int, _LayerFile]


class LayerPlacement(msgspec.Struct, frozen=True):
    """One layer: every expert is hot, or on at least one worker."""

    num_experts: int
    #: Global ids that the engine computes, in rising order.
    hot: tuple[int, ...]
    #: By worker, the global ids that it holds, in rising order: local id `i` is the i-th.
    cold: dict[str, tuple[int, ...]]


class Placement:
    """Where every routed expert of a model is; immutable.

    `workers` are names; a cold expert may be on several (replicas). PlacementError: an expert is
    nowhere, or hot and on a worker, or listed twice; a name is unknown.
    """

    def __init__(self, workers: Sequence[str], layers: Mapping[int, LayerPlacement]) -> None:
        self.workers = tuple(workers)
        self.layers: Mapping[int, LayerPlacement] = dict(sorted(layers.items()))
        if len(set(self.workers)) != len(self.workers):
            raise PlacementError(f"workers {list(self.workers)}: a name is there twice")
        for number, layer in self.layers.items():
            self._check(number, layer)

    # --- builders -----------------------------------------------------------------------

    @classmethod
    def by_rule(
        cls,
        workers: Sequence[str],
        num_experts: Mapping[int, int],
        is_hot: Callable[[int, int], bool],
        replicas: int = 1,
    ) -> Placement:
        """Hot where `is_hot(layer, expert)` says so; the others are dealt out to the workers in
        turn, each to `replicas` of them."""
        layers = {}
        for number, count in num_experts.items():
            hot = [expert for expert in range(count) if is_hot(number, expert)]
            layers[number] = _deal(workers, count, hot, np.zeros(count), replicas)
        return cls(workers, layers)

    @classmethod
    def from_counts(
        cls,
        workers: Sequence[str],
        stats: RoutingStats,
        hot_per_layer: int | Mapping[int, int],
        replicas: int = 1,
    ) -> Placement:
        """The most used `hot_per_layer` experts of each layer are hot; ties go to the lower id.

        Cold ones are dealt out so that the workers' expected shares of calls are even.
        """
        layers = {}
        for number in stats.layers:
            counts = stats.counts(number)
            n_hot = hot_per_layer if isinstance(hot_per_layer, int) else hot_per_layer[number]
            if not 0 <= n_hot <= len(counts):
                raise PlacementError(
                    f"hot_per_layer={n_hot} of layer {number}; it must be 0..{len(counts)}"
                )
            hot = np.argsort(-counts, kind="stable")[:n_hot].tolist()
            layers[number] = _deal(workers, len(counts), hot, counts, replicas)
        return cls(workers, layers)

    @classmethod
    def from_budget(
        cls,
        workers: Sequence[str],
        stats: RoutingStats,
        expert_bytes: Mapping[int, int],
        budget_bytes: int,
        min_hot_per_layer: int = 0,
        replicas: int = 1,
    ) -> Placement:
        """Fill `budget_bytes` of the engine's memory with the experts that are worth most per byte.

        An expert's value is its share of its layer's counts; `expert_bytes` is the size of one
        expert of each layer. Every layer first gets `min_hot_per_layer`. Taking the best value
        per byte next is the greedy solution of a knapsack, and exact where all experts have one
        size. PlacementError: the floor alone exceeds the budget.
        """
        chosen: dict[int, int] = {}
        candidates = []
        spent = 0
        for number in stats.layers:
            counts = stats.counts(number)
            size = expert_bytes[number]
            floor = min(min_hot_per_layer, len(counts))
            chosen[number] = floor
            spent += floor * size
            shares = np.sort(counts)[::-1] / max(counts.sum(), 1e-300)
            candidates += [
                (-share / size, number, rank) for rank, share in enumerate(shares) if rank >= floor
            ]
        if spent > budget_bytes:
            raise PlacementError(
                f"{min_hot_per_layer} experts of each layer take {spent} bytes and the budget is "
                f"{budget_bytes}; lower the floor or raise the budget"
            )
        # Within a layer values fall with the rank, so the best are always the next ones.
        for _, number, _ in sorted(candidates):
            if spent + expert_bytes[number] <= budget_bytes:
                chosen[number] += 1
                spent += expert_bytes[number]
        return cls.from_counts(workers, stats, chosen, replicas)

    # --- looking up ---------------------------------------------------------------------

    def experts_of(self, worker: str) -> dict[int, tuple[int, ...]]:
        """What a worker holds, by layer: global ids in local order; layers without any are left
        out. PlacementError: an unknown name."""
        if worker not in self.workers:
            raise PlacementError(f"no worker {worker!r}; there are {', '.join(self.workers)}")
        held = {number: layer.cold.get(worker, ()) for number, layer in self.layers.items()}
        return {number: experts for number, experts in held.items() if experts}

    def is_hot(self, layer: int) -> npt.NDArray[np.bool_]:
        """For each expert of a layer whether it is hot; bool [num_experts]."""
        placed = self.layers[layer]
        mask = np.zeros(placed.num_experts, np.bool_)
        mask[list(placed.hot)] = True
        return mask

    def local_ids(self, layer: int, worker: str) -> Table:
        """For each expert of a layer its local id on the worker, or -1; int32 [num_experts]."""
        placed = self.layers[layer]
        held = placed.cold.get(worker, ())
        table = np.full(placed.num_experts, -1, np.int32)
        table[list(held)] = np.arange(len(held))
        return table

    def hot_share(self, stats: RoutingStats) -> dict[int, float | None]:
        """By layer, the share of the counts that falls on hot experts; None where none was
        counted."""
        shares: dict[int, float | None] = {}
        for number in self.layers:
            counts = stats.counts(number)
            total = counts.sum()
            hot = counts[self.is_hot(number)].sum()
            shares[number] = float(hot / total) if total else None
        return shares

    def total_hot_share(self, stats: RoutingStats) -> float | None:
        """The share of all counts that falls on hot experts; None where none was counted."""
        counts = {number: stats.counts(number) for number in self.layers}
        total = sum(float(each.sum()) for each in counts.values())
        hot = sum(float(each[self.is_hot(number)].sum()) for number, each in counts.items())
        return hot / total if total else None

    def fingerprint(self, worker: str) -> str:
        """16 hex digits that name what the worker must hold, and in what order."""
        return fingerprint_of(self.experts_of(worker))

    # --- files --------------------------------------------------------------------------

    def to_json(self) -> str:
        """Text that a person can read: experts as ranges."""
        lines = []
        for number, layer in self.layers.items():
            shown = _LayerFile(
                layer.num_experts,
                format_ranges(layer.hot),
                {worker: format_ranges(layer.cold.get(worker, ())) for worker in self.workers},
            )
            lines.append(f'  "{number}": {msgspec.json.encode(shown).decode()}')
        workers = msgspec.json.encode(self.workers).decode()
        body = ",\n".join(lines)
        return f'{{"version": {_VERSION}, "workers": {workers}, "layers": {{\n{body}\n}}}}\n'

    @classmethod
    def from_json(cls, text: str | bytes) -> Placement:
        """What `to_json` wrote, or a person did; PlacementError says what is wrong."""
        try:
            file = msgspec.json.decode(text, type=_File)
        except msgspec.MsgspecError as error:
            raise PlacementError(f"no placement: {error}") from None
        if file.version != _VERSION:
            raise PlacementError(f"version {file.version}; this moeshm reads {_VERSION}")
        layers = {}
        for number, layer in file.layers.items():
            try:
                layers[number] = LayerPlacement(
                    layer.num_experts,
                    _sorted_ranges(layer.hot),
                    {worker: _sorted_ranges(held) for worker, held in layer.cold.items()},
                )
            except ValueError as error:
                raise PlacementError(f"layer {number}: {error}") from None
        return cls(file.workers, layers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json` to a file, in one step for whoever reads it; SettingError."""
        with files.replacing(path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Placement:
        """Read a file; PlacementError with its name."""
        try:
            return cls.from_json(Path(path).read_bytes())
        except (OSError, PlacementError) as error:
            raise PlacementError(f"placement {path}: {error}") from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def _check(self, number: int, layer: LayerPlacement) -> None:
        unknown = sorted(set(layer.cold) - set(self.workers))
        if unknown:
            raise PlacementError(
                f"layer {number} names the worker {unknown[0]!r}; there are "
                f"{', '.join(map(repr, self.workers)) or 'none'}"
            )
        if not 1 <= layer.num_experts <= MAX_EXPERTS:
            raise PlacementError(
                f"layer {number}: num_experts={layer.num_experts}; it must be 1..{MAX_EXPERTS}"
            )
        held = np.zeros(layer.num_experts, np.int64)
        for where, experts in (("hot", layer.hot), *layer.cold.items()):
            if list(experts) != sorted(set(experts)):
                raise PlacementError(f"layer {number}, {where}: an expert is listed twice")
            if experts and not 0 <= experts[0] <= experts[-1] < layer.num_experts:
                raise PlacementError(
                    f"layer {number}, {where}: expert {experts[-1]}; "
                    f"there are 0..{layer.num_experts - 1}"
                )
            if where != "hot":
                held[list(experts)] += 1
        is_hot = np.zeros(layer.num_experts, np.bool_)
        is_hot[list(layer.hot)] = True
        nowhere = np.flatnonzero(~is_hot & (held == 0))
        both = np.flatnonzero(is_hot & (held > 0))
        if len(nowhere):
            raise PlacementError(
                f"layer {number}: expert {nowhere[0]} is neither hot nor on a worker"
            )
        if len(both):
            raise PlacementError(
                f"layer {number}: expert {both[0]} is hot and on a worker; choose one"
            )


def _deal(
    workers: Sequence[str],
    num_experts: int,
    hot: Sequence[int],
    counts: npt.NDArray[np.float64],
    replicas: int,
) -> LayerPlacement:
    """Give every cold expert to the workers that have the least to do so far, the most used
    first."""
    cold = np.setdiff1d(np.arange(num_experts), hot)
    if len(cold) and not 1 <= replicas <= len(workers):
        raise PlacementError(f"replicas={replicas}; there are {len(workers)} workers")
    load = dict.fromkeys(workers, 0.0)
    held: dict[str, list[int]] = {worker: [] for worker in workers}
    for expert in cold[np.argsort(-counts[cold], kind="stable")].tolist():
        ranked = sorted(workers, key=lambda worker: (load[worker], len(held[worker])))
        for worker in ranked[:replicas]:
            load[worker] += counts[expert] / replicas
            held[worker].append(expert)
    return LayerPlacement(
        num_experts,
        tuple(sorted(hot)),
        {worker: tuple(sorted(experts)) for worker, experts in held.items()},
    )


def _sorted_ranges(text: str) -> tuple[int, ...]:
    return tuple(sorted(parse_ranges(text))) if text else ()
