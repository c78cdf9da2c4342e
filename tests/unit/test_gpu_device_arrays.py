"""Arrays in device memory as the GPU backend takes them: in place, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeshm.backends.gpu import workspace
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.reference import reference_ffn
from moeshm.dtypes import DType, narrow
from moeshm.errors import InvalidCall
from tests.checkpoints import random_layer
from tests.conformance.test_backends import TOLERANCE, assert_close, draw_call
from tests.simt.device import SimtDevice
from tests.unit.test_gpu_backend import LAYER, OnDevice, aligned


@pytest.mark.parametrize("weight_dtype", DType)
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 40])
@pytest.mark.parametrize("where", ["x", "ids", "weights", "out", "x out", "x ids weights out"])
def test_arrays_in_device_memory(
    weight_dtype: DType, dtype: DType, n_tokens: int, where: str
) -> None:
    """In place, wherever the others are."""
    layer = random_layer(11, weight_dtype=weight_dtype)
    hidden, ids, weights = draw_call(12, layer, n_tokens, 2)
    hidden = narrow(hidden, dtype)
    expected = reference_ffn(layer, hidden, ids, weights)
    backend = GpuBackend({0: layer}, SimtDevice())
    out = narrow(np.full(hidden.shape, np.nan, np.float32), dtype)
    arrays = {"x": aligned(hidden), "ids": ids, "weights": weights, "out": aligned(out)}
    given: dict[str, Any] = {
        name: OnDevice(array) if name in where.split() else array for name, array in arrays.items()
    }
    backend.ffn(0, given["x"], given["ids"], given["weights"], given["out"])
    assert_close(arrays["out"], expected, max(TOLERANCE[dtype], TOLERANCE[weight_dtype]))


def test_long_calls_in_device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "MAX_TOKENS", 40)
    hidden, ids, weights = draw_call(13, LAYER, 95, 2)
    out = aligned(np.full_like(hidden, np.nan))
    given: list[Any] = [OnDevice(each) for each in (aligned(hidden), ids, weights, out)]
    GpuBackend({0: LAYER}, SimtDevice()).ffn(0, *given)
    assert_close(out, reference_ffn(LAYER, hidden, ids, weights), 1e-5)


def test_streams_that_fill_arrays_are_waited_for() -> None:
    device = SimtDevice()
    backend = GpuBackend({0: LAYER}, device)
    hidden, ids, weights = draw_call(14, LAYER, 2, 2)
    out = OnDevice(aligned(hidden), stream=None)
    # Version 2 does not speak of streams.
    old = OnDevice(weights, version=2)
    del old.__cuda_array_interface__["stream"]
    given: list[Any] = [OnDevice(aligned(hidden), stream=77), ids, old, out]
    backend.ffn(0, *given)
    assert device.waited_for == [77, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"typestr": "<f8"}, "hidden_states is <f8 in device memory; pass <f4, <f2, <u2"),
        ({"strides": (8, 4)}, r"strides \(8, 4\) in device memory; pass a contiguous array"),
    ],
)
def test_device_arrays_that_cannot_be_used(change: dict[str, Any], message: str) -> None:
    backend = GpuBackend({0: LAYER}, SimtDevice())
    hidden, ids, weights = draw_call(15, LAYER, 2, 2)
    given: Any = OnDevice(aligned(hidden), **change)
    with pytest.raises(InvalidCall, match=message):
        backend.ffn(0, given, ids, weights, np.empty_like(hidden))


def test_ids_in_device_memory_are_int32() -> None:
    backend = GpuBackend({0: LAYER}, SimtDevice())
    hidden, ids, weights = draw_call(15, LAYER, 2, 2)
    given: Any = OnDevice(ids.astype(np.int64))
    with pytest.raises(InvalidCall, match="topk_ids is <i8 in device memory; pass <i4"):
        backend.ffn(0, hidden, given, weights, np.empty_like(hidden))


def test_a_device_array_that_is_not_aligned() -> None:
    backend = GpuBackend({0: LAYER}, SimtDevice())
    hidden, ids, weights = draw_call(15, LAYER, 2, 2)
    given: Any = OnDevice(aligned(hidden, 4))
    with pytest.raises(InvalidCall, match=r"hidden_states starts at 0x.*4 in device memory"):
        backend.ffn(0, given, ids, weights, np.empty_like(hidden))


def test_device_arrays_of_an_odd_size() -> None:
    layer = random_layer(16, hidden_size=33)
    backend = GpuBackend({0: layer}, SimtDevice())
    hidden, ids, weights = draw_call(17, layer, 2, 2)
    given: Any = OnDevice(aligned(hidden))
    with pytest.raises(
        InvalidCall, match="hidden_size=33 is no multiple of 8; pass arrays in host"
    ):
        backend.ffn(0, given, ids, weights, np.empty_like(hidden))
