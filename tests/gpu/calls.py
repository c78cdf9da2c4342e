"""Small calls of every kernel that a device has, held against the float64 reference.

usage: python -m tests.gpu.calls DEVICE
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from moeshm.backends.gpu import choice
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.device import Device
from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import ExpertLayer
from moeshm.dtypes import DType
from moeshm.errors import SettingError
from moeshm.layers import Activation
from moeshm.settings import KERNELS
from tests.checkpoints import random_layer
from tests.kernels.harness import assert_close, draw, poisoned, same_bits

#: Sizes that the kernels of each kind are for.
TOKENS: Mapping[str, Sequence[int]] = {
    "decode": (1, 2, 7, 32, 100),
    "prefill": (129, 301),
}


def small_layer(weight_dtype: DType, activation: Activation) -> ExpertLayer:
    """Sizes that are multiples of nothing but 8, and of nothing."""
    has_bias = activation is Activation.SWIGLU_CLAMPED
    return random_layer(
        5,
        hidden_size=200,
        intermediate_size=100,
        num_experts=9,
        top_k=3,
        activation=activation,
        weight_dtype=weight_dtype,
        has_bias=has_bias,
    )


def check_calls(
    device: Device, layer: ExpertLayer, kind: str, kernels: str, tokens: Sequence[int]
) -> None:
    """Each call is right, and the same in every bit when it is made again.

    SettingError: the device has no such kernels.
    """
    backend = GpuBackend({0: layer}, device, {kind: kernels})
    dtype = layer.info.weight_dtype
    for n_tokens in tokens:
        x, ids, weights = draw(n_tokens, layer, n_tokens, 3, x_dtype=dtype)
        first, second = (poisoned(x.shape, dtype) for _ in range(2))
        for out in (first, second):
            backend.ffn(0, x, ids, weights, out)
        assert_close(first, reference_ffn(layer, x, ids, weights), dtype)
        assert same_bits(first, second), f"{n_tokens} tokens"


def main(name: str) -> None:
    """Make few of them, for tools that make every launch slow."""
    from moeshm.backends.gpu.cupy_device import open_device

    device = open_device(name)
    for dtype, activation in (
        (DType.BF16, Activation.SWIGLU_CLAMPED),
        (DType.F32, Activation.SWIGLU),
    ):
        layer = small_layer(dtype, activation)
        for kind, choices in KERNELS.items():
            for kernels in choices:
                try:
                    choice.check_wanted({kind: kernels}, device.features)
                except SettingError as error:
                    print(f"not here: {error}")
                    continue
                check_calls(device, layer, kind, kernels, TOKENS[kind][1:2])
                print(f"right: {dtype} {kind}={kernels}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
