"""The experts of some layers on one GPU: a `GrowingBackend`."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...checkpoint.layer import ExpertLayer
from ...dtypes import DType, dtype_of
from ...errors import InvalidCall
from ...layers import LayerInfo
from .. import Ids, Weights
from . import choice
from .choice import MOST_FEW_TOKENS, Definitions, Shape, Size, Step
from .device import Device, Module
from .experts import DeviceExperts, DeviceLayer, has_bias
from .job import Job, Launch
from .operands import IDS, ROWS, WEIGHTS, DeviceArray, Operand, locate
from .workspace import Workspace

_log = logging.getLogger(__name__)

#: Sizes of calls that stay made ready.
_MAX_JOBS = 512


class GpuBackend:
    """Computes experts that are kept in a GPU's memory.

    Arrays of a call are NumPy's, or have `__cuda_array_interface__` and are on this GPU: then they
    are used in place, must be contiguous, and hidden_size a multiple of 8, else InvalidCall. A call
    returns when `out` is written. Any thread may call; calls are computed one after the other.

    `kernels`: as MOESHM_KERNELS, by "decode" and "prefill". `on_layer` is told each layer's number
    once its experts are uploaded. OutOfDeviceMemory: they do not all fit; SettingError: `kernels`;
    DeviceError.
    """

    name = "gpu"

    def __init__(
        self,
        layers: Mapping[int, ExpertLayer],
        device: Device,
        kernels: Mapping[str, str] | None = None,
        on_layer: Callable[[int], object] = lambda _number: None,
    ) -> None:
        self._device = device
        self._kernels = dict(kernels or {})
        choice.check_wanted(self._kernels, device.features)
        #: Held by whoever uses the device's stream.
        self._turn = threading.Lock()
        self._jobs: dict[tuple[Shape, Size, DType, DType, bool], Job] = {}
        self._modules: dict[tuple[Shape, str, Definitions], Module] = {}
        device.use()
        self._workspace = Workspace(device)
        self._experts = DeviceExperts(device, self._turn)
        self._make_room(layers)
        for number, layer in layers.items():
            self._experts.add_layer(number, layer.info, has_bias(layer))
            self._experts.add(number, layer)
            on_layer(number)
        self.layers: Mapping[int, LayerInfo] = {n: layer.info for n, layer in layers.items()}

    def ffn(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
    ) -> None:
        """As `Backend.ffn`. DeviceLost: no call will work any more; else DeviceError."""
        held = self._experts.layers[layer]
        operands = (
            locate("hidden_states", hidden_states, ROWS),
            locate("topk_ids", topk_ids, IDS),
            locate("topk_weights", topk_weights, WEIGHTS),
            locate("out", out, ROWS),
        )
        n_tokens, top_k = operands[1].shape
        with self._turn:
            self._device.use()
            self._wait_for_arrays(held, operands)
            n_slots = held.n_slots
            step = self._workspace.most_tokens(held.shape, top_k, n_slots)
            x_dtype, out_dtype = _format(operands[0]), _format(operands[3])
            may_convert = isinstance(operands[0], DeviceArray)
            for first in range(0, n_tokens, step):
                end = min(first + step, n_tokens)
                size = Size(end - first, top_k, n_slots)
                key = (held.shape, size, x_dtype, out_dtype, may_convert)
                job = self._jobs.get(key) or self._make_job(*key)
                if size.n_tokens == n_tokens:
                    job.run(self._device, held, *operands)
                else:
                    job.run(self._device, held, *(_rows(each, first, end) for each in operands))

    def add(self, layer: int, experts: ExpertLayer) -> list[int]:
        """As `GrowingBackend.add`. OutOfDeviceMemory, or CheckpointError: biases come late."""
        self._device.use()
        self._make_room({layer: experts})
        self._experts.add_layer(layer, experts.info, has_bias(experts))
        return self._experts.add(layer, experts)

    def remove(self, layer: int, slots: Sequence[int]) -> None:
        """As `GrowingBackend.remove`."""
        self._device.use()
        self._experts.remove(layer, slots)

    def warm_up(self) -> None:
        """Compile what calls to these layers may need, and make one of each kind."""
        start = time.monotonic()
        held = self._experts.layers
        kinds = {
            (each.shape, each.info.top_k, each.info.num_experts): n for n, each in held.items()
        }
        for number in kinds.values():
            self._warm_up(number, held[number])
        _log.info(
            "%d modules of kernels ready in %.1f s", len(self._modules), time.monotonic() - start
        )

    def _warm_up(self, number: int, layer: DeviceLayer) -> None:
        """As `warm_up`, for layers like this one."""
        info, features = layer.info, self._device.features
        most = self._workspace.most_tokens(layer.shape, info.top_k, info.num_experts)
        sizes = list(choice.sizes(most, info.top_k, info.num_experts))
        self._module(layer.shape, choice.convert(layer.shape, 1, features))
        for x_dtype in DType:
            for size in sizes:
                plan = choice.plan(layer.shape, size, x_dtype, features, self._kernels)
                for step in plan.steps:
                    self._module(layer.shape, step)
            for n_tokens in (1, min(MOST_FEW_TOKENS + 1, most)):
                x = np.zeros((n_tokens, info.hidden_size), x_dtype.numpy)
                ids = np.full((n_tokens, info.top_k), min(layer.blocks, default=-1), np.int32)
                self.ffn(number, x, ids, np.ones(ids.shape, np.float32), np.empty_like(x))

    def _make_room(self, layers: Mapping[int, ExpertLayer]) -> None:
        """Have a workspace for calls to these, too. OutOfDeviceMemory: they do not fit."""
        n_blocks: Counter[Shape] = Counter()
        host_bytes = device_bytes = 0
        for number, layer in layers.items():
            info, held = layer.info, self._experts.layers.get(number)
            shape = Shape.of(info, has_bias(layer)) if held is None else held.shape
            n_blocks[shape] += len(layer)
            host, device = self._workspace.bytes_for(shape, info.top_k, info.num_experts)
            host_bytes, device_bytes = max(host_bytes, host), max(device_bytes, device)
        with self._turn:
            missing = self._workspace.missing_bytes(host_bytes, device_bytes)
            self._experts.check_room(n_blocks, missing)
            if missing:
                self._jobs.clear()
                self._workspace.resize(host_bytes, device_bytes)

    def _make_job(
        self, shape: Shape, size: Size, x_dtype: DType, out_dtype: DType, may_convert: bool
    ) -> Job:
        features = self._device.features
        plan = choice.plan(shape, size, x_dtype, features, self._kernels)
        launches = [self._launch(shape, step) for step in plan.steps]
        convert = None
        if may_convert and x_dtype is not plan.x_dtype:
            convert = self._launch(shape, choice.convert(shape, size.n_tokens, features))
        if len(self._jobs) >= _MAX_JOBS:
            # The oldest; sizes that come often are soon there again.
            del self._jobs[next(iter(self._jobs))]
        job = Job(shape, size, plan, out_dtype, launches, convert, self._workspace)
        self._jobs[shape, size, x_dtype, out_dtype, may_convert] = job
        return job

    def _launch(self, shape: Shape, step: Step) -> Launch:
        return Launch(step, self._module(shape, step))

    def _module(self, shape: Shape, step: Step) -> Module:
        key = (shape, step.file, step.macros)
        if key not in self._modules:
            self._modules[key] = self._device.compile(step.file, step.all_macros(shape))
        return self._modules[key]

    def _wait_for_arrays(self, layer: DeviceLayer, operands: Sequence[Operand]) -> None:
        """Until what is in device memory is there."""
        for operand in operands:
            if not isinstance(operand, DeviceArray):
                continue
            if layer.shape.hidden != layer.shape.hidden_size:
                raise InvalidCall(
                    f"hidden_size={layer.shape.hidden_size} is no multiple of 8; pass arrays in "
                    "host memory"
                )
            if operand.stream is not None:
                self._device.wait_for_stream(operand.stream)


def _rows(operand: Operand, first: int, end: int) -> Operand:
    return operand.rows(first, end) if isinstance(operand, DeviceArray) else operand[first:end]


def _format(operand: Operand) -> DType:
    return operand.dtype if isinstance(operand, DeviceArray) else dtype_of(operand)
