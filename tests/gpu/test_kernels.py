"""Every kernel of this machine's GPU, against the float64 reference."""

from __future__ import annotations

import pytest

from moeshm.backends.gpu.device import Device
from moeshm.dtypes import DType
from moeshm.errors import SettingError
from moeshm.layers import Activation
from moeshm.settings import KERNELS

from .calls import TOKENS, check_calls, small_layer

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> Device:
    from moeshm.backends.gpu.cupy_device import open_device

    return open_device("auto")


@pytest.mark.parametrize("activation", Activation, ids=str)
@pytest.mark.parametrize("weight_dtype", DType, ids=str)
@pytest.mark.parametrize(
    ("kind", "kernels"), [(kind, each) for kind, choices in KERNELS.items() for each in choices]
)
def test_calls_are_right_and_repeatable(
    device: Device, kind: str, kernels: str, weight_dtype: DType, activation: Activation
) -> None:
    layer = small_layer(weight_dtype, activation)
    try:
        check_calls(device, layer, kind, kernels, TOKENS[kind])
    except SettingError as error:
        pytest.skip(str(error))
