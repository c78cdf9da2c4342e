"""The kernels of layers, compiled for their shapes and loaded onto the device."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from ...dtypes import DType
from . import choice
from .choice import Definitions, Plan, Shape, Size, Step
from .device import Device, Kernel, Module

_log = logging.getLogger(__name__)


class Kernels:
    """The kernels of one device, each compiled and loaded once. Any thread may use it.

    `wanted`: as MOESHM_KERNELS, by "decode" and "prefill"; SettingError: the device has not all.
    """

    def __init__(self, device: Device, wanted: Mapping[str, str]) -> None:
        choice.check_wanted(wanted, device.features)
        self._device = device
        self._wanted = dict(wanted)
        #: Two threads may make the same, of which one is kept: once `load_all` has run, no call
        #: waits for a compiler.
        self._modules: dict[tuple[Shape | None, str, Definitions], Module] = {}
        self._kernels: dict[tuple[Shape | None, str, Definitions, str], Kernel] = {}
        #: Layers for which there is nothing left to load, by what `load_all` takes.
        self._complete: set[tuple[Shape, int, int, int]] = set()
        self._loading = threading.Lock()

    @property
    def n_modules(self) -> int:
        """That are compiled."""
        return len(self._modules)

    def plan(self, shape: Shape, size: Size, x_dtype: DType) -> Plan:
        """How a call is computed whose activations are in `x_dtype`."""
        return choice.plan(shape, size, x_dtype, self._device.features, self._wanted)

    def convert(self, shape: Shape, n_tokens: int) -> Step:
        """The launch that gives activations another format."""
        return choice.convert(shape, n_tokens, self._device.features)

    def admit(self, n_pairs: int, n_values: int) -> Step:
        """The launch that takes ids, weights and so many values from a slab; it is of no layer."""
        return choice.admit(n_pairs, n_values, self._device.features)

    def load(self, shape: Shape | None, step: Step) -> Kernel:
        """The kernel of a step; None is for those that are of no layer."""
        key = (shape, step.file, step.macros, step.kernel)
        found = self._kernels.get(key)
        if found is None:
            found = self._module(shape, step).kernel(step.kernel)
            found = self._kernels.setdefault(key, found)
        return found

    def load_all(self, shape: Shape, top_k: int, num_experts: int, most_tokens: int) -> None:
        """All that calls to such layers may need, of `most_tokens` tokens at most."""
        layers = (shape, top_k, num_experts, most_tokens)
        with self._loading:
            if layers in self._complete:
                return
            _log.info(
                "compiling kernels for %s experts of %d x %d, or reading them from the cache",
                shape.weight_dtype,
                shape.hidden_size,
                shape.inner,
            )
            self.load(None, self.admit(1, 0))
            self.load(shape, self.convert(shape, 1))
            for size in choice.sizes(most_tokens, top_k, num_experts):
                for x_dtype in DType:
                    for step in self.plan(shape, size, x_dtype).steps:
                        self.load(shape, step)
            self._complete.add(layers)

    def _module(self, shape: Shape | None, step: Step) -> Module:
        key = (shape, step.file, step.macros)
        found = self._modules.get(key)
        if found is None:
            found = self._device.compile(step.file, step.all_macros(shape))
            found = self._modules.setdefault(key, found)
        return found
