"""The experts of some layers on one GPU: a `GrowingBackend`, a `MemoryUser` and a `SlabUser`."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...checkpoint.layer import ExpertLayer
from ...dtypes import DType
from ...errors import InvalidCall
from ...layers import LayerInfo
from .. import BetweenSteps, Ids, Weights
from .choice import MOST_FEW_TOKENS, Shape, Size, Step
from .compiled import Kernels
from .device import Device
from .experts import DeviceExperts, DeviceLayer, has_bias
from .job import Job, Kind, Launch, Places
from .operands import (
    ALIGNMENT,
    IDS,
    ROWS,
    WEIGHTS,
    DeviceArray,
    Operand,
    Place,
    RegisteredArray,
    format_of,
    locate,
    place_of,
    rows_of,
)
from .registered import MemoryStats, Registered, RegisteredMemory
from .resident import Resident, ResidentStats
from .resident_job import ResidentJob
from .slab import GpuSlab, open_slab
from .slab_calls import SlabCalls
from .turn import Turn
from .workspace import Workspace

_log = logging.getLogger(__name__)

#: Kinds of calls that stay made ready, and what is known of layers' calls by them.
_MAX_JOBS = 512
_MAX_KNOWN = 4096
#: Calls of up to so many tokens are made ready before the first of them comes: a decode's.
PREPARED_TOKENS = 32
#: Activations of so many bytes are copied by the device from where they lie in registered memory;
#: fewer by the host, to beside the ids and weights, so that one copy brings all to the device. Not
#: tuned: no other size was measured.
DIRECT_BYTES = 16 << 10


_Job = Job | ResidentJob


class GpuBackend:
    """Computes experts that are kept in a GPU's memory.

    Arrays of a call are NumPy's, or have `__cuda_array_interface__` and are on this GPU: then they
    are used in place, must be contiguous, and hidden_size a multiple of 8, else InvalidCall. Those
    that lie in memory it was given by `use_memory` are not copied by the host. A call returns when
    `out` is written. Any thread may call; calls are computed one after the other.

    `kernels`: as MOESHM_KERNELS, by "decode" and "prefill". `on_layer` is told each layer's number
    once its experts are uploaded. `is_resident`: calls of few tokens are for a kernel that stays on
    the device. OutOfDeviceMemory: they do not all fit; SettingError: `kernels`; DeviceError, also
    where a kernel cannot stay.
    """

    name = "gpu"

    def __init__(
        self,
        layers: Mapping[int, ExpertLayer],
        device: Device,
        kernels: Mapping[str, str] | None = None,
        on_layer: Callable[[int], object] = lambda _number: None,
        is_resident: bool = False,
    ) -> None:
        self._device = device
        self._kernels = Kernels(device, kernels or {})
        #: Held by whoever uses the device's stream.
        self._turn = Turn()
        self._jobs: dict[Kind, _Job] = {}
        #: Of them, by what is soon found.
        self._known: dict[tuple[object, ...], _Job] = {}
        device.use()
        self._resident = Resident(device, self._kernels) if is_resident else None
        self._turn.resident = self._resident
        self._workspace = Workspace(device)
        self._registered = RegisteredMemory(device)
        self._experts = DeviceExperts(device, self._turn)
        self._slab_calls = SlabCalls(
            device, self._kernels, self._workspace, self._experts, self._turn, self._resident
        )
        if self._resident is not None:
            self._resident.on_change = self._forget_jobs
        #: As `SlabUser`.
        self.vendor = device.name.partition(":")[0]
        self.bus_id = device.features.bus_id
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
        self.ffn_in_steps(layer, hidden_states, topk_ids, topk_weights, out, None)

    def ffn_in_steps(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
        between_steps: BetweenSteps | None,
    ) -> None:
        """As `SteppingBackend.ffn_in_steps`; None for no pauses. Errors as `ffn`."""
        held = self._experts.layers[layer]
        operands = (
            self._locate_rows(held, "hidden_states", hidden_states, is_written=False),
            locate("topk_ids", topk_ids, IDS),
            locate("topk_weights", topk_weights, WEIGHTS),
            self._locate_rows(held, "out", out, is_written=True),
        )
        # Once, for all that is found by it: other threads add and remove experts meanwhile.
        n_slots = held.n_slots
        signs = _signs(layer, n_slots, *operands)
        if self._resident is not None and self._ask_resident(held, n_slots, operands, signs):
            return
        with self._turn:
            self._device.use()
            self._wait_for_arrays(held, operands)
            job = self._known.get(signs) or self._find_job(held, n_slots, *operands)
            if job is not None:
                # Before it runs, as it may come to be forgotten meanwhile.
                self._know(signs, job)
                job.run(held, *operands)
                return
        self._compute_in_parts(held, n_slots, operands, between_steps)

    def add(self, layer: int, experts: ExpertLayer) -> list[int]:
        """As `GrowingBackend.add`. OutOfDeviceMemory, or CheckpointError: biases come late."""
        self._device.use()
        self._make_room({layer: experts})
        info, biased = experts.info, has_bias(experts)
        if layer not in self._experts.layers:
            # Before it is there for calls, and while those to others go on.
            self._load_kernels(Shape.of(info, biased), info)
        self._experts.add_layer(layer, info, biased)
        return self._experts.add(layer, experts)

    def remove(self, layer: int, slots: Sequence[int]) -> None:
        """As `GrowingBackend.remove`."""
        self._device.use()
        self._experts.remove(layer, slots)

    def use_memory(self, memory: memoryview) -> Registered:
        """As `MemoryUser.use_memory`: the device copies from and to it by itself."""
        self._look_for_others()
        return self._registered.use(memory)

    def open_slab(self, memory: memoryview, device_bytes: int) -> GpuSlab:
        """As `SlabUser.open_slab`. Arrays must be as those in device memory that `ffn` takes."""
        self._look_for_others()
        return open_slab(self._device, self._slab_calls, memory, device_bytes)

    @property
    def memory_stats(self) -> MemoryStats:
        """What came of `use_memory`."""
        return self._registered.stats

    @property
    def resident_stats(self) -> ResidentStats | None:
        """What came of `is_resident`; None without."""
        return None if self._resident is None else self._resident.stats

    def warm_up(self) -> None:
        """Compile and load what calls to these layers may need, and make one of each kind."""
        start = time.monotonic()
        held = self._experts.layers
        kinds = {
            (each.shape, each.info.top_k, each.info.num_experts): n for n, each in held.items()
        }
        for number in kinds.values():
            self._warm_up(number, held[number])
        _log.info(
            "%d modules of kernels ready in %.1f s",
            self._kernels.n_modules,
            time.monotonic() - start,
        )

    def _warm_up(self, number: int, layer: DeviceLayer) -> None:
        """As `warm_up`, for layers like this one."""
        info = layer.info
        most = self._load_kernels(layer.shape, info)
        for x_dtype in DType:
            for n_tokens in (1, min(MOST_FEW_TOKENS + 1, most)):
                x = np.zeros((n_tokens, info.hidden_size), x_dtype.numpy)
                # All experts that are here, as far as there are pairs for them.
                ids = np.resize(np.array([*layer.blocks] or [-1], np.int32), (n_tokens, info.top_k))
                self.ffn(number, x, ids, np.ones(ids.shape, np.float32), np.empty_like(x))
        with self._turn:
            self._prepare(layer)

    def _prepare(self, layer: DeviceLayer) -> None:
        """Make ready calls of few tokens, from and to the host's memory, rings and slabs."""
        has_padding = layer.shape.hidden != layer.shape.hidden_size
        for n_tokens, dtype in itertools.product(range(1, PREPARED_TOKENS + 1), DType):
            size = Size(n_tokens, layer.info.top_k, layer.n_slots)
            is_large = n_tokens * layer.shape.hidden * dtype.itemsize >= DIRECT_BYTES
            in_ring = Place.HOST if has_padding else Place.REGISTERED
            places = {
                Places(Place.HOST, Place.HOST, Place.HOST, Place.HOST),
                Places(Place.HOST, Place.HOST, in_ring if is_large else Place.HOST, in_ring),
            }
            for each in places:
                kind = Kind(layer.shape, size, dtype, dtype, each)
                if kind not in self._jobs and len(self._jobs) < _MAX_JOBS // 2:
                    self._make_job(kind)
            if not has_padding:
                self._slab_calls.prepare(layer.shape, size, dtype)

    def _load_kernels(self, shape: Shape, info: LayerInfo) -> int:
        """All that calls to such layers may need; how many tokens these have at most."""
        most_tokens = self._workspace.most_tokens(shape, info.top_k, info.num_experts)
        self._kernels.load_all(shape, info.top_k, info.num_experts, most_tokens)
        if self._resident is not None:
            self._resident.load(shape, info.top_k)
        return most_tokens

    def _make_room(self, layers: Mapping[int, ExpertLayer]) -> None:
        """Have a workspace for calls to these, too. OutOfDeviceMemory: they do not fit."""
        parts: list[tuple[Shape, int]] = []
        host_bytes = device_bytes = 0
        for number, layer in layers.items():
            info, held = layer.info, self._experts.layers.get(number)
            shape = Shape.of(info, has_bias(layer)) if held is None else held.shape
            parts.append((shape, len(layer)))
            host, device = self._workspace.bytes_for(shape, info.top_k, info.num_experts)
            host_bytes, device_bytes = max(host_bytes, host), max(device_bytes, device)
        with self._turn:
            missing = self._workspace.missing_bytes(host_bytes, device_bytes)
            self._experts.check_room(parts, missing)
            if missing:
                # Calls from slabs that were begun use what is freed.
                self._device.wait()
                self._forget_jobs()
                self._workspace.resize(host_bytes, device_bytes)

    def _find_job(
        self,
        layer: DeviceLayer,
        n_slots: int,
        x: Operand,
        ids: Operand,
        weights: Operand,
        out: Operand,
    ) -> _Job | None:
        """What computes such calls; None for one that is empty, or computed in parts. For whoever
        has the turn."""
        n_tokens, top_k = ids.shape
        at_once = self._workspace.part_tokens(n_tokens, layer.shape, top_k, n_slots)
        if not 0 < n_tokens <= at_once:
            return None
        kind = _kind(layer, n_slots, x, ids, weights, out)
        return self._jobs.get(kind) or self._make_job(kind)

    def _compute_in_parts(
        self,
        layer: DeviceLayer,
        n_slots: int,
        operands: tuple[Operand, Operand, Operand, Operand],
        between_steps: BetweenSteps | None,
    ) -> None:
        """A turn for each part, after which nothing of it is in the workspace any more."""
        n_tokens, top_k = operands[1].shape
        first = 0
        while first < n_tokens:
            if first and between_steps is not None and between_steps.is_due():
                between_steps()
            with self._turn:
                self._device.use()
                left = n_tokens - first
                end = first + self._workspace.part_tokens(left, layer.shape, top_k, n_slots)
                part = [rows_of(each, first, end) for each in operands]
                job = self._find_job(layer, n_slots, *part)
                assert job is not None
                job.run(layer, *part)
            first = end

    def _know(self, signs: tuple[object, ...], job: _Job) -> None:
        """For whoever has the turn."""
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[signs] = job

    def _ask_resident(
        self,
        layer: DeviceLayer,
        n_slots: int,
        operands: tuple[Operand, Operand, Operand, Operand],
        signs: tuple[object, ...],
    ) -> bool:
        """Have the kernel that stays compute the call; False where that is not made ready, for
        which it has to yield, or the call is not for it."""
        with self._turn.kept:
            job = self._known.get(signs)
            if job is None:
                job = self._jobs.get(_kind(layer, n_slots, *operands))
            if not isinstance(job, ResidentJob):
                return False
            self._know(signs, job)
            self._device.use()
            self._wait_for_arrays(layer, operands)
            job.run(layer, *operands)
            return True

    def _look_for_others(self) -> None:
        """Processes come with sessions, as an engine that uses this GPU."""
        if self._resident is not None:
            with self._turn.kept:
                self._resident.look_for_others()

    def _forget_jobs(self) -> None:
        """For whoever has the turn."""
        self._jobs.clear()
        self._known.clear()
        self._slab_calls.forget_jobs()

    def _make_job(self, kind: Kind) -> _Job:
        shape, size = kind.shape, kind.size
        plan = self._kernels.plan(shape, size, kind.x_dtype)
        if len(self._jobs) >= _MAX_JOBS:
            # The oldest; sizes that come often are soon there again.
            del self._jobs[next(iter(self._jobs))]
            self._known.clear()
        # What is on this GPU already is some other kernel's, which finds no room beside that one.
        is_elsewhere = Place.DEVICE not in kind.places
        if self._resident is not None and is_elsewhere and self._resident.takes(plan, size):
            self._jobs[kind] = made = ResidentJob(self._resident, kind, plan, self._workspace)
            return made
        launches = [self._launch(shape, step) for step in plan.steps]
        convert = None
        if kind.places.x is not Place.HOST and kind.x_dtype is not plan.x_dtype:
            convert = self._launch(shape, self._kernels.convert(shape, size.n_tokens))
        job = Job(self._device, kind, plan, launches, convert, self._workspace)
        self._jobs[kind] = job
        return job

    def _launch(self, shape: Shape, step: Step) -> Launch:
        return Launch(step, self._kernels.load(shape, step))

    def _locate_rows(
        self, layer: DeviceLayer, name: str, array: npt.NDArray[Any], is_written: bool
    ) -> Operand:
        """Activations, as registered where the device had better reach for them itself."""
        operand = locate(name, array, ROWS)
        if isinstance(operand, DeviceArray) or not (is_written or array.nbytes >= DIRECT_BYTES):
            return operand
        found = self._registered.find(array, is_written)
        if found is None or found[1] % ALIGNMENT:
            return operand
        # Kernels take other rows padded.
        is_whole = layer.shape.hidden == layer.shape.hidden_size
        return RegisteredArray(array, *found) if is_whole else operand

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


def _kind(
    layer: DeviceLayer,
    n_slots: int,
    x: Operand,
    ids: Operand,
    weights: Operand,
    out: Operand,
) -> Kind:
    """Of such a call; InvalidCall as `format_of`."""
    n_tokens, top_k = ids.shape
    return Kind(
        layer.shape,
        Size(n_tokens, top_k, n_slots),
        format_of(x),
        format_of(out),
        Places(place_of(ids), place_of(weights), place_of(x), place_of(out)),
    )


def _signs(
    number: int, n_slots: int, x: Operand, ids: Operand, weights: Operand, out: Operand
) -> tuple[object, ...]:
    """What tells the kinds of such calls apart, made in less time than a `Kind`."""
    places = type(x), type(ids), type(weights), type(out)
    return number, n_slots, ids.shape, format_of(x), format_of(out), places
