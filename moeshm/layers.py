"""What an MoE layer is, without its weights: shapes, activation, and which experts are held."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from .dtypes import DType

#: Of a model's layer, held or not.
MAX_EXPERTS = 1 << 20


class Activation(enum.IntEnum):
    """How an expert combines its gate and up projections; the value is its code on the wire.

    `g` and `u` are the rows `x @ gate_proj.T` and `x @ up_proj.T`, biases included.
    """

    #: `silu(g) * u` (Shazeer 2020, arXiv:2002.05202)
    SWIGLU = 0
    #: `gelu(g) * u` with the exact error function
    GEGLU = 1
    #: `gelu(g) * u` with the tanh approximation
    GEGLU_TANH = 2
    #: gpt-oss: `g' = min(g, limit)`, `u' = clip(u, -limit, limit)`,
    #: `g' * sigmoid(alpha * g') * (u' + 1)`
    SWIGLU_CLAMPED = 3

    def __str__(self) -> str:
        return self.name.lower()


class LayerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One MoE layer as a worker holds it.

    `experts` lists the global ids that are held, in local order: local id `i` is the expert
    `experts[i]` of the model. `num_experts` counts the model's experts, held or not.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    experts: tuple[int, ...]
    activation: Activation = Activation.SWIGLU
    weight_dtype: DType = DType.F32
    #: Only SWIGLU_CLAMPED uses these two; the defaults are gpt-oss's.
    activation_alpha: float = 1.702
    activation_limit: float = 7.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}")
        if len(set(self.experts)) != len(self.experts):
            raise ValueError("experts lists an id twice")
        if self.experts and not (min(self.experts) >= 0 and max(self.experts) < self.num_experts):
            raise ValueError(f"experts must lie in 0..{self.num_experts - 1}")

    @property
    def holds_all_experts(self) -> bool:
        """True when every expert of the model's layer is here, in the model's order."""
        return self.experts == tuple(range(self.num_experts))

    def summary(self) -> dict[str, Any]:
        """The sizes as plain values, for tables and JSON."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_experts": self.num_experts,
            "local_experts": len(self.experts),
            "top_k": self.top_k,
            "activation": str(self.activation),
            "weight_dtype": str(self.weight_dtype),
        }


def without_experts(info: LayerInfo) -> LayerInfo:
    """What the layer is, whichever of its experts are held."""
    return msgspec.structs.replace(info, experts=())


def parse_ranges(text: str) -> tuple[int, ...]:
    """`"0-3,7"` as `(0, 1, 2, 3, 7)`; ValueError names the part that does not parse, or that no
    model is large enough for."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise ValueError(f"{part!r} in {text!r} is no number or range like 0-23") from None
        if high < low:
            raise ValueError(f"{part!r} in {text!r} counts down; write {high}-{low}")
        if high - low >= MAX_EXPERTS or len(numbers) >= MAX_EXPERTS:
            # Before a slip of the finger takes all memory.
            raise ValueError(f"{part!r} in {text!r:.50}: more than {MAX_EXPERTS} numbers")
        numbers.extend(range(low, high + 1))
    return tuple(dict.fromkeys(numbers))


def format_ranges(numbers: Sequence[int]) -> str:
    """`(1, 2, 3, 7)` as `"1-3, 7"`, the form that `parse_ranges` reads; empty for none."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def fingerprint_of(experts: Mapping[int, Sequence[int]]) -> str:
    """16 hex digits that name layers and the experts of each, in their order."""
    listed = [[number, list(experts[number])] for number in sorted(experts)]
    return hashlib.sha256(msgspec.json.encode(listed)).hexdigest()[:16]
