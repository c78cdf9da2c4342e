"""The oracle: every expert in float64, one token and one slot at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.layer import ExpertLayer, ExpertWeights
from ..dtypes import Array, dtype_of, narrow, widen
from ..layers import Activation, LayerInfo
from . import Ids, Weights

Float64Array = npt.NDArray[np.float64]


class ReferenceBackend:
    """Computes in float64 what every other backend must come close to; slow on purpose."""

    name = "reference"

    def __init__(self, layers: Mapping[int, ExpertLayer]) -> None:
        self._experts = dict(layers)
        self.layers: Mapping[int, LayerInfo] = {n: layer.info for n, layer in layers.items()}

    def ffn(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
    ) -> None:
        """As `Backend.ffn`; the float64 sum is rounded to float32, then to `out`'s format."""
        result = reference_ffn(self._experts[layer], hidden_states, topk_ids, topk_weights)
        with np.errstate(over="ignore", under="ignore"):
            narrow(result.astype(np.float32), dtype_of(out), out=out)


def reference_ffn(
    layer: ExpertLayer, hidden_states: Array, topk_ids: Ids, topk_weights: Weights
) -> Float64Array:
    """The weighted sum of the selected experts' outputs, float64 [n_tokens, hidden_size].

    Arguments as in `Backend.ffn`: local ids, -1 for an empty slot, whose weight is ignored.
    """
    rows = _float64(hidden_states)
    result: Float64Array = np.zeros((len(rows), layer.info.hidden_size))
    projections: dict[int, _Expert64] = {}
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for token, slot in np.argwhere(np.asarray(topk_ids) >= 0):
            local_id = int(topk_ids[token, slot])
            if local_id not in projections:
                projections[local_id] = _Expert64(layer.expert(local_id), layer.info)
            output = projections[local_id](rows[token])
            result[token] += float(topk_weights[token, slot]) * output
    return result


def activate(info: LayerInfo, gate: Float64Array, up: Float64Array) -> Float64Array:
    """What enters `down_proj`, from the two projections; the formulas' sources are beside them."""
    if info.activation is Activation.SWIGLU_CLAMPED:
        # OpenAI's gpt-oss, gpt_oss/torch/model.py, `swiglu`.
        gate = np.minimum(gate, info.activation_limit)
        up = np.clip(up, -info.activation_limit, info.activation_limit) + 1
        activated = gate * _sigmoid(info.activation_alpha * gate)
    elif info.activation is Activation.SWIGLU:
        # Shazeer 2020, arXiv:2002.05202, equation 6, with swish_1(x) = x sigmoid(x).
        activated = gate * _sigmoid(gate)
    elif info.activation is Activation.GEGLU:
        # Hendrycks & Gimpel 2016, arXiv:1606.08415: gelu(x) = x Phi(x).
        erf = np.array([math.erf(value / math.sqrt(2)) for value in gate])
        activated = 0.5 * gate * (1 + erf)
    else:
        # The same paper's approximation by tanh.
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        activated = 0.5 * gate * (1 + np.tanh(inner))
    product: Float64Array = activated * up
    return product


class _Expert64:
    """One expert with its weights in float64, applied to one row."""

    def __init__(self, weights: ExpertWeights, info: LayerInfo) -> None:
        self._info = info
        self._gate_proj = _float64(weights.gate_proj)
        self._up_proj = _float64(weights.up_proj)
        self._down_proj = _float64(weights.down_proj)
        self._gate_bias = _bias64(weights.gate_bias)
        self._up_bias = _bias64(weights.up_bias)
        self._down_bias = _bias64(weights.down_bias)

    def __call__(self, row: Float64Array) -> Float64Array:
        gate = self._gate_proj @ row + self._gate_bias
        up = self._up_proj @ row + self._up_bias
        down: Float64Array = self._down_proj @ activate(self._info, gate, up) + self._down_bias
        return down


def _sigmoid(values: Float64Array) -> Float64Array:
    sigmoid: Float64Array = 1 / (1 + np.exp(-values))
    return sigmoid


def _float64(array: Array) -> Float64Array:
    return widen(array).astype(np.float64)


def _bias64(bias: Array | None) -> Float64Array | float:
    return 0.0 if bias is None else _float64(bias)
