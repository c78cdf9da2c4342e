"""The kernels of probes.cu, and arrays that end where the memory does that they may touch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moeshm.backends.gpu.abi import Call
from moeshm.kernels import source
from tests import simt
from tests.simt import Module, Order, guarded

ORDERS: tuple[Order, ...] = ("forward", "reverse", 0, 1, 2)
MACROS = {"WEIGHT": "float", "HIDDEN": 8, "INNER": 64, "ACTIVATION": 0, "HAS_BIAS": 0}
PROBES = Path(simt.__file__).with_name("probes.cu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


def probe_module(warp: int) -> Module:
    """The kernels of probes.cu."""
    text = source("ffn.cuh") + PROBES.read_text()
    return simt.compile_text(text, MACROS, warp, name="probes.cu")


def call_of(
    out: npt.NDArray[Any],
    x: npt.NDArray[Any] | None = None,
    ids: npt.NDArray[Any] | None = None,
    **others: int,
) -> Call:
    """With these arrays, and these numbers."""
    addresses = {"x": x, "ids": ids}
    given = {name: array.ctypes.data for name, array in addresses.items() if array is not None}
    return Call(out=out.ctypes.data, **given, **others)


def floats(*shape: int) -> Floats:
    """To be written: NaN until then."""
    return guarded(np.full(shape, np.nan, np.float32))


def ints(*shape: int) -> Ints:
    """To be written: -1 until then."""
    return guarded(np.full(shape, -1, np.int32))
