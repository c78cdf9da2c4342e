"""The gated activations in float32, vectorised and safe for any input."""

from __future__ import annotations

import math

import numpy as np

from ..dtypes import FloatArray
from ..layers import Activation, LayerInfo

_SQRT_HALF = np.float32(math.sqrt(0.5))
_TANH_SCALE = np.float32(2 * math.sqrt(2 / math.pi))
#: Abramowitz & Stegun, Handbook of Mathematical Functions, 7.1.26:
#: `erfc(z) = (a1 t + ... + a5 t^5) exp(-z^2)`, `t = 1 / (1 + p z)`, within 1.5e-7 for z >= 0.
_ERFC_P = np.float32(0.3275911)
_ERFC_A = tuple(
    map(np.float32, (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592))
)


def activate(info: LayerInfo, gate: FloatArray, up: FloatArray) -> FloatArray:
    """What enters `down_proj`: the layer's activation of the two projections, of any one shape.

    The formulas are `layers.Activation`'s. Floating-point warnings are the caller's to silence:
    an overflow to infinity on the way to a zero is meant.
    """
    if info.activation is Activation.SWIGLU:
        return _times_sigmoid(gate, gate, up)
    if info.activation is Activation.SWIGLU_CLAMPED:
        limit = np.float32(info.activation_limit)
        gate = np.minimum(gate, limit)
        up = np.clip(up, -limit, limit)
        return _times_sigmoid(gate, gate * np.float32(info.activation_alpha), up + np.float32(1))
    if info.activation is Activation.GEGLU_TANH:
        # (1 + tanh(z)) / 2 is sigmoid(2 z), which does not cancel for negative z.
        inner = gate * gate * gate * np.float32(0.044715)
        inner += gate
        inner *= _TANH_SCALE
        return _times_sigmoid(gate, inner, up)
    return gate * _normal_distribution(gate) * up


def _times_sigmoid(gate: FloatArray, inner: FloatArray, up: FloatArray) -> FloatArray:
    """`gate * sigmoid(inner) * up`; where `exp(-inner)` overflows, the quotient is zero."""
    result = np.negative(inner)
    np.exp(result, out=result)
    np.add(result, np.float32(1), out=result)
    np.divide(gate, result, out=result)
    np.multiply(result, up, out=result)
    return result


def _normal_distribution(values: FloatArray) -> FloatArray:
    """Phi(values), from erfc of the distance from zero."""
    z = np.abs(values)
    z *= _SQRT_HALF
    t = 1 / (1 + _ERFC_P * z)
    tail: FloatArray = np.zeros_like(t)
    for coefficient in _ERFC_A:
        tail += coefficient
        tail *= t
    tail *= np.exp(-z * z)
    tail *= np.float32(0.5)
    np.subtract(np.float32(1), tail, out=tail, where=values >= 0)
    return tail
