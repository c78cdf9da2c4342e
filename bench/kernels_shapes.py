"""The layers that `moeshm bench kernels` computes, and how fast a device could at best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from moeshm.dtypes import DType
from moeshm.layers import Activation, LayerInfo

from .replay_model import SHAPES, Shape


class KernelShape(NamedTuple):
    """A model's MoE layer, and the numbers of tokens that are asked of it by default."""

    sizes: Shape
    tokens: tuple[int, ...] = (1, 4, 16, 128, 1024, 4096)
    activation: Activation = Activation.SWIGLU
    has_bias: bool = False

    def info(self, dtype: DType) -> LayerInfo:
        """The layer with all of its experts."""
        layer = self.sizes.layer(range(self.sizes.num_experts), dtype)
        return msgspec.structs.replace(layer, activation=self.activation)


_ALL = (
    KernelShape(SHAPES["qwen3-30b-a3b"]),
    KernelShape(SHAPES["qwen3.5-35b-a3b"]),
    KernelShape(Shape("mixtral-8x7b", 4096, 14336, 8, 2, 32), (1, 16, 1024, 4096)),
    KernelShape(Shape("deepseek-v3", 7168, 2048, 256, 8, 58)),
    KernelShape(
        Shape("gpt-oss-120b", 2880, 2880, 128, 4, 36),
        activation=Activation.SWIGLU_CLAMPED,
        has_bias=True,
    ),
)
KERNEL_SHAPES: Mapping[str, KernelShape] = {shape.sizes.name: shape for shape in _ALL}


class Peaks(NamedTuple):
    """What a device's memory and its arithmetic could do at best."""

    gb_per_s: float
    #: By format of the weights.
    tflops: Mapping[str, float]


_H100 = "NVIDIA H100 80GB HBM3"
#: NVIDIA's datasheets of the SXM cards, without sparsity; float32 is that of the FMA units.
_HOPPER_TFLOPS = {"bf16": 989.0, "f16": 989.0, "f32": 67.0}
_DATASHEETS = {
    _H100: Peaks(3350.0, _HOPPER_TFLOPS),
    "NVIDIA H200": Peaks(4800.0, _HOPPER_TFLOPS),
}


def peaks_of(device: str, copy_gb_per_s: float) -> tuple[Peaks, str]:
    """The device's, and where they are from: its datasheet, else what a copy in its memory reached,
    with no limit of arithmetic."""
    if device in _DATASHEETS:
        return _DATASHEETS[device], "datasheet"
    return Peaks(copy_gb_per_s, {}), "measured copy"


class Limit(NamedTuple):
    """The time that a call takes at least, and why: "memory" or "arithmetic"."""

    us: float
    reason: str


def call_bytes(info: LayerInfo, n_tokens: int, n_distinct: float) -> float:
    """Of the weights of `n_distinct` experts, read once, and of the activations in and out."""
    weights = n_distinct * 3 * info.hidden_size * info.intermediate_size
    return (weights + 2 * n_tokens * info.hidden_size) * info.weight_dtype.itemsize


def call_flops(info: LayerInfo, n_tokens: int) -> float:
    """Multiplications and additions of a call whose tokens all have `top_k` experts."""
    return 6.0 * n_tokens * info.top_k * info.hidden_size * info.intermediate_size


def limit_of(info: LayerInfo, n_tokens: int, n_distinct: float, peaks: Peaks) -> Limit:
    """The longer of reading and computing, each at its peak."""
    memory_us = call_bytes(info, n_tokens, n_distinct) / (peaks.gb_per_s * 1e3)
    tflops = peaks.tflops.get(str(info.weight_dtype))
    arithmetic_us = call_flops(info, n_tokens) / (tflops * 1e6) if tflops else 0.0
    return max(Limit(memory_us, "memory"), Limit(arithmetic_us, "arithmetic"))


#: What moeshm wants to reach with bfloat16 on an H100 SXM, in us, by shape and number of tokens.
_GOALS_US: Mapping[str, Mapping[int, float]] = {
    "qwen3-30b-a3b": {1: 27, 4: 94, 16: 252, 128: 400, 1024: 450, 4096: 660},
    "qwen3.5-35b-a3b": {1: 18.5, 4: 64, 16: 209, 128: 520, 1024: 560, 4096: 700},
    "mixtral-8x7b": {1: 232, 16: 880, 1024: 1400, 4096: 4900},
}


def goal_us(device: str, shape: str, dtype: str, n_tokens: int) -> float | None:
    """The goal for this device, or None where there is none."""
    if (device, dtype) != (_H100, "bf16"):
        return None
    return _GOALS_US.get(shape, {}).get(n_tokens)
