"""Calls whose results are known: inputs, and what the float64 reference makes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..backends import Ids, Weights
from ..backends.reference import reference_ffn
from ..checkpoint import ExpertLayer
from ..dtypes import Array, DType, FloatArray, dtype_of, narrow, widen

#: Relative error by the coarsest of the formats of weights, activations and the way there, as the
#: backends' conformance tests have it.
TOLERANCE = {DType.F32: 1e-5, DType.F16: 3e-3, DType.BF16: 1e-2}
SIZE = 96
#: Few tokens are a decode's, many a prefill's.
TOKENS = (1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 7, 8, 12, 16, 21, 33, 64, 128, 256, 512)
#: Of slots, and of whole rows.
_EMPTY_SLOTS, _EMPTY_ROWS = 0.2, 0.1
#: Multiplications of one call at most: the reference makes them one row at a time.
_MOST_PRODUCTS = 1 << 32


@dataclass(frozen=True)
class Case:
    """A call with global ids, and its result.

    `hidden_states` [n_tokens, hidden_size] as stored, `topk_ids` and `topk_weights` [n_tokens,
    top_k]; `wire`: how its rows may travel; `expected` float32, like hidden_states.
    """

    number: int
    layer: int
    wire: DType
    hidden_states: Array
    topk_ids: Ids
    topk_weights: Weights
    expected: FloatArray
    tolerance: float

    @property
    def dtype(self) -> DType:
        """Of the activations."""
        return dtype_of(self.hidden_states)

    @property
    def is_empty(self) -> bool:
        """True when no token has an expert: nothing is sent."""
        return not self._is_used.any()

    @cached_property
    def experts(self) -> list[int]:
        """Those that it needs, rising."""
        return [expert for expert in np.unique(self.topk_ids).tolist() if expert >= 0]

    def difference(self, found: Any) -> str:
        """What is wrong with a result, for people; empty when nothing is.

        Every row is held against the tolerance by itself, so that one wrong row of many shows.
        """
        wanted = self.hidden_states
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            return f"{found.dtype} {list(found.shape)} for {wanted.dtype} {list(wanted.shape)}"
        values = widen(found)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.linalg.norm(values - self.expected, axis=1)
        # What is not a number is not below anything.
        wrong = np.flatnonzero(~(error <= self._allowed))
        if not len(wrong):
            return ""
        row = int(wrong[0])
        return (
            f"{len(wrong)} of {len(wanted)} rows are wrong, rows {_some(wrong.tolist())}; row "
            f"{row}: found {_some(values[row].tolist())}, expected "
            f"{_some(self.expected[row].tolist())}, error {error[row]:.3g} where "
            f"{self._allowed[row]:.3g} is allowed"
        )

    def __str__(self) -> str:
        n_tokens, top_k = self.topk_ids.shape
        return (
            f"case {self.number}: layer {self.layer}, {n_tokens} tokens, top_k {top_k}, "
            f"{self.dtype} over {self.wire}"
        )

    @cached_property
    def _is_used(self) -> npt.NDArray[np.bool_]:
        used: npt.NDArray[np.bool_] = np.any(self.topk_ids >= 0, axis=1, keepdims=False)
        return used

    @cached_property
    def _allowed(self) -> FloatArray:
        """By row; a row whose experts' outputs cancel is measured by the others."""
        norms = np.linalg.norm(self.expected, axis=1)
        used = self._is_used
        usual = np.sqrt(np.mean(norms[used] ** 2)) if used.any() else 0.0
        allowed: FloatArray = (self.tolerance * np.maximum(norms, usual)).astype(np.float32)
        allowed[~used] = 0
        return allowed


def draw(layers: Mapping[int, ExpertLayer], seed: int, coarsest: DType = DType.F32) -> list[Case]:
    """SIZE cases of these layers, whose ids are all of the model's; the same for a seed.

    `coarsest`: a format that the rows of any call may travel in besides.
    """
    rng = np.random.default_rng(seed)
    numbers = sorted(layers)
    return [
        _draw_one(number, rng, numbers[number % len(numbers)], layers, coarsest)
        for number in range(SIZE)
    ]


def _draw_one(
    number: int,
    rng: np.random.Generator,
    layer: int,
    layers: Mapping[int, ExpertLayer],
    coarsest: DType,
) -> Case:
    weights, info = layers[layer], layers[layer].info
    per_token = 3 * info.top_k * info.hidden_size * info.intermediate_size
    n_tokens = min(int(rng.choice(TOKENS)), max(1, _MOST_PRODUCTS // per_token))
    formats = list(DType)
    dtype = formats[rng.integers(len(formats))]
    wire = formats[rng.integers(len(formats))] if rng.random() < 0.4 else dtype
    ids = rng.random((n_tokens, len(weights))).argsort(axis=1)[:, : info.top_k].astype(np.int32)
    ids[rng.random(ids.shape) < _EMPTY_SLOTS] = -1
    ids[rng.random(n_tokens) < _EMPTY_ROWS] = -1
    # Only values that the way there holds exactly, so that nothing but the result is rounded.
    values = rng.standard_normal((n_tokens, info.hidden_size), np.float32)
    for each in (wire, dtype, coarsest):
        values = widen(narrow(values, each))
    topk_weights = rng.random(ids.shape, np.float32)
    loosest = max(TOLERANCE[each] for each in (info.weight_dtype, dtype, wire, coarsest))
    expected = reference_ffn(weights, values, ids, topk_weights).astype(np.float32)
    return Case(number, layer, wire, narrow(values, dtype), ids, topk_weights, expected, loosest)


class _Facts(msgspec.Struct):
    number: int
    layer: int
    wire: str
    tolerance: float


def save(cases: Sequence[Case], path: Path) -> None:
    """Write them to an .npz file, for processes that `load` it."""
    arrays: dict[str, Any] = {}
    facts = []
    for case in cases:
        facts.append(_Facts(case.number, case.layer, str(case.wire), case.tolerance))
        arrays[f"hidden_states_{case.number}"] = case.hidden_states
        arrays[f"topk_ids_{case.number}"] = case.topk_ids
        arrays[f"topk_weights_{case.number}"] = case.topk_weights
        arrays[f"expected_{case.number}"] = case.expected
    arrays["facts"] = np.frombuffer(msgspec.json.encode(facts), np.uint8)
    np.savez(path, **arrays)


def load(path: str | os.PathLike[str]) -> list[Case]:
    """What `save` wrote."""
    with np.load(path) as arrays:
        facts = msgspec.json.decode(arrays["facts"].tobytes(), type=list[_Facts])
        return [
            Case(
                each.number,
                each.layer,
                DType.parse(each.wire),
                arrays[f"hidden_states_{each.number}"],
                arrays[f"topk_ids_{each.number}"],
                arrays[f"topk_weights_{each.number}"],
                arrays[f"expected_{each.number}"],
                each.tolerance,
            )
            for each in facts
        ]


def _some(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.6g}" for value in values[:4])
    return f"[{shown}{', ...' if len(values) > 4 else ''}]"
