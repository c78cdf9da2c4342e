"""How often the router chose each expert of each layer: what a placement is made from."""

from __future__ import annotations

import csv
import io
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import files
from ._inputs import count_ids
from .errors import SettingError
from .layers import LayerInfo

Counts = npt.NDArray[np.float64]
_CSV_HEADER = ["layer", "expert", "count"]


class RoutingStats:
    """Counts per layer and expert, by the model's (global) ids.

    Counts are float64, so that they can decay; whole numbers stay exact up to 2^53. Observing is
    one pass over the ids and may go on in several threads.
    """

    def __init__(self, num_experts: Mapping[int, int]) -> None:
        """`num_experts`: of each layer, by its number. ValueError: a layer without experts."""
        for layer, number in num_experts.items():
            if number < 1:
                raise ValueError(f"layer {layer} has num_experts={number}; it must be at least 1")
        self._counts: dict[int, Counts] = {n: np.zeros(e) for n, e in sorted(num_experts.items())}
        #: Counts that are still on a GPU, where reading them would have to wait for it.
        self._on_device: dict[int, Any] = {}

    @classmethod
    def for_layers(cls, layers: Mapping[int, LayerInfo]) -> RoutingStats:
        """Zeros for the layers of a client or a backend."""
        return cls({number: info.num_experts for number, info in layers.items()})

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are counted, in rising order."""
        return tuple(self._counts)

    def observe(self, layer: int, topk_ids: Any) -> None:
        """Count a call's `topk_ids`, of any shape; -1 is an empty slot.

        NumPy or torch, int32 or int64. Ids on a GPU are counted there, without waiting for it.
        ValueError: an id that the layer lacks. KeyError: a layer that is not counted.
        """
        counts = self._counts[layer]
        if type(topk_ids) is not np.ndarray:
            torch: Any = sys.modules.get("torch")
            if torch is not None and isinstance(topk_ids, torch.Tensor):
                if topk_ids.device.type != "cpu":
                    self._count_on_device(layer, topk_ids)
                    return
                topk_ids = topk_ids.detach().numpy()
            else:
                topk_ids = np.asarray(topk_ids)
        if topk_ids.dtype not in (np.int32, np.int64):
            topk_ids = topk_ids.astype(np.int64)
        wrong = count_ids(np.ascontiguousarray(topk_ids), counts)
        if wrong is not None:
            raise ValueError(f"expert id {wrong}; those of layer {layer} are 0..{len(counts) - 1}")

    def counts(self, layer: int) -> Counts:
        """The counts of a layer, float64 [num_experts]; a copy."""
        self._fetch(layer)
        copy: Counts = self._counts[layer].copy()
        return copy

    def total(self) -> float:
        """The sum of all counts."""
        return float(sum(self.counts(layer).sum() for layer in self.layers))

    def merge(self, other: RoutingStats) -> None:
        """Add the other's counts. ValueError: a layer of it has another number of experts here."""
        for layer in other.layers:
            added = other.counts(layer)
            known = self._counts.get(layer)
            if known is not None and len(known) != len(added):
                raise ValueError(
                    f"layer {layer} has {len(known)} experts here and {len(added)} there; "
                    "these are statistics of different models"
                )
        for layer in other.layers:
            self._fetch(layer)
            known = self._counts.get(layer, np.zeros(len(other.counts(layer))))
            self._counts[layer] = known + other.counts(layer)
        self._counts = dict(sorted(self._counts.items()))

    def since(self, earlier: RoutingStats) -> RoutingStats:
        """What was counted after `earlier`, a former state of these statistics.

        All of it where a count fell, as by decay or in an engine that began anew: what came since
        cannot be told then.
        """
        now = {layer: self.counts(layer) for layer in self.layers}
        before = {layer: earlier.counts(layer) for layer in earlier.layers}
        has_grown = all(
            layer in now and len(now[layer]) == len(each) and bool(np.all(now[layer] >= each))
            for layer, each in before.items()
        )
        if has_grown:
            now |= {layer: now[layer] - each for layer, each in before.items()}
        return RoutingStats._of(now)

    def decay(self, factor: float) -> None:
        """Multiply every count, so that what is long ago weighs less. ValueError: not in 0..1."""
        if not 0 <= factor <= 1:
            raise ValueError(f"factor={factor}; it must lie in 0..1")
        for layer in self.layers:
            self._fetch(layer)
            self._counts[layer] *= factor

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `load` reads: *.csv (layer,expert,count) or *.npz.

        It takes the place of an older one in one step, so that it may be read at any time.
        SettingError: another suffix, or it cannot be written.
        """
        path = Path(path)
        is_npz = _suffix(path) == ".npz"
        with files.replacing(path) as file:
            if is_npz:
                arrays: dict[str, Any] = {f"layer_{n}": self.counts(n) for n in self.layers}
                np.savez_compressed(file, **arrays)
            else:
                file.write(self._to_csv().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingStats:
        """Read what `save` wrote; SettingError: it cannot be read, or is no such file."""
        path = Path(path)
        read = _read_npz if _suffix(path) == ".npz" else _read_csv
        try:
            counts = read(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise SettingError(f"routing statistics {path}: {error}") from error
        return cls._of(counts)

    @classmethod
    def _of(cls, counts: Mapping[int, Counts]) -> RoutingStats:
        stats = cls({layer: len(each) for layer, each in counts.items()})
        stats._counts.update(counts)
        return stats

    def _to_csv(self) -> str:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(_CSV_HEADER)
        for layer in self.layers:
            for expert, count in enumerate(self.counts(layer).tolist()):
                writer.writerow([layer, expert, int(count) if count.is_integer() else count])
        return text.getvalue()

    def _count_on_device(self, layer: int, ids: Any) -> None:
        torch: Any = sys.modules["torch"]
        held = self._on_device.get(layer)
        if held is None or held.device != ids.device:
            self._fetch(layer)
            size = len(self._counts[layer]) + 1
            held = torch.zeros(size, dtype=torch.float64, device=ids.device)
            self._on_device[layer] = held
        # Place 0 takes the empty slots. An id too large is an error of the device.
        places = ids.detach().reshape(-1).long().clamp_min(-1) + 1
        held.index_add_(0, places, torch.ones_like(places, dtype=torch.float64))

    def _fetch(self, layer: int) -> None:
        held = self._on_device.pop(layer, None)
        if held is not None:
            self._counts[layer] += held[1:].cpu().numpy()


def _suffix(path: Path) -> str:
    if path.suffix not in (".csv", ".npz"):
        raise SettingError(f"routing statistics {path}: write a name that ends in .csv or .npz")
    return path.suffix


def _read_npz(path: Path) -> dict[int, Counts]:
    counts = {}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            _, _, layer = name.partition("layer_")
            counts[int(layer)] = np.asarray(file[name], np.float64).reshape(-1)
    return _checked(counts)


def _read_csv(path: Path) -> dict[int, Counts]:
    rows: dict[int, dict[int, float]] = {}
    with path.open(newline="") as file:
        reader = csv.reader(file)
        header = next(reader, None)
        if header != _CSV_HEADER:
            raise ValueError(f"the first line is {header}, not {','.join(_CSV_HEADER)}")
        for row in reader:
            layer, expert, count = row
            rows.setdefault(int(layer), {})[int(expert)] = float(count)
    counts = {}
    for number, found in rows.items():
        if sorted(found) != list(range(len(found))):
            raise ValueError(f"layer {number} does not list each expert from 0 on once")
        counts[number] = np.array([found[expert] for expert in range(len(found))])
    return _checked(counts)


def _checked(counts: dict[int, Counts]) -> dict[int, Counts]:
    for layer, each in counts.items():
        if not len(each) or not np.all(np.isfinite(each)) or each.min() < 0:
            raise ValueError(f"layer {layer} has counts that are negative or no numbers")
    return counts
