"""Calls whose arrays lie in slabs: cut into parts, made ready once, and begun in order."""

from __future__ import annotations

import contextlib
import threading
from typing import NamedTuple

from ...dtypes import DType
from ...errors import DeviceError, InvalidCall
from .. import SlabCall
from .choice import Shape, Size, Step
from .compiled import Kernels
from .device import CommandList, Device
from .experts import DeviceExperts, DeviceLayer
from .job import Launch
from .slab_job import Arrays, SlabJob, SlabKind, Steps
from .tables import SlotTables
from .workspace import Workspace

#: Kinds of calls that stay made ready.
_MAX_JOBS = 512


class SlabData(NamedTuple):
    """Where a slab's data begins."""

    #: As the device has it.
    address: int
    #: As the host has it; None for device memory.
    host_address: int | None


class SlabCalls:
    """What begins calls from slabs on one device.

    `turn`: held by whoever uses the device's stream, and by whoever changes the workspace.
    """

    def __init__(
        self,
        device: Device,
        kernels: Kernels,
        workspace: Workspace,
        experts: DeviceExperts,
        turn: threading.Lock,
    ) -> None:
        self._device = device
        self._kernels = kernels
        self._workspace = workspace
        self._experts = experts
        self._turn = turn
        self._tables = SlotTables(device)
        self._jobs: dict[SlabKind, SlabJob] = {}

    def begin(self, call: SlabCall, data: SlabData, refused: int, done: CommandList) -> None:
        """Enqueue the call, and after it `done`. `refused`: where that flag is.

        InvalidCall: nothing was begun. DeviceError: what was begun is over.
        """
        layer = self._experts.layers[call.layer]
        if layer.shape.hidden != layer.shape.hidden_size:
            raise InvalidCall(
                f"hidden_size={layer.shape.hidden_size} is no multiple of 8; pass arrays in host "
                "memory"
            )
        with self._turn:
            self._device.use()
            parts = self._parts(layer, call, data.host_address is not None)
            slots = self._tables.find(call.slots)
            try:
                for first, job in parts:
                    arrays = _arrays(layer, call, data, refused, first)
                    job.begin(layer, arrays, slots, call.n_ids, first * call.top_k)
                done.enqueue()
            except BaseException:
                # The slab is the client's again once it is told of the error.
                with contextlib.suppress(DeviceError):
                    self._device.wait()
                raise

    def finish(self, commands: CommandList) -> None:
        """Enqueue these after everything that was begun, and wait for all of it."""
        with self._turn:
            self._device.use()
            commands.enqueue()
            self._device.wait()

    def wait(self) -> None:
        """Until everything that was begun is done."""
        with self._turn:
            self._device.use()
            self._device.wait()

    def prepare(self, shape: Shape, size: Size, dtype: DType) -> None:
        """Make such a call ready in both kinds of slabs, as long as there is room for more. For
        whoever has the turn."""
        for is_pinned in (False, True):
            if len(self._jobs) < _MAX_JOBS // 2:
                self._job(SlabKind(shape, size, dtype, is_pinned))

    def forget_jobs(self) -> None:
        """The workspace changes. For whoever uses the device's stream."""
        self._jobs.clear()

    def _parts(
        self, layer: DeviceLayer, call: SlabCall, is_pinned: bool
    ) -> list[tuple[int, SlabJob]]:
        """The first token of each, and its job: several where there is not memory for all."""
        n_tokens = call.n_tokens
        kind = SlabKind(
            layer.shape, Size(n_tokens, call.top_k, layer.n_slots), call.dtype, is_pinned
        )
        job = self._jobs.get(kind)
        if job is not None:
            return [(0, job)]
        most = self._workspace.most_tokens(layer.shape, call.top_k, layer.n_slots)
        sizes = {
            first: kind.size._replace(n_tokens=min(most, n_tokens - first))
            for first in range(0, n_tokens, most)
        }
        return [(first, self._job(kind._replace(size=size))) for first, size in sizes.items()]

    def _job(self, kind: SlabKind) -> SlabJob:
        job = self._jobs.get(kind)
        if job is None:
            if len(self._jobs) >= _MAX_JOBS:
                # The oldest; sizes that come often are soon there again.
                del self._jobs[next(iter(self._jobs))]
            job = self._jobs[kind] = self._make_job(kind)
        return job

    def _make_job(self, kind: SlabKind) -> SlabJob:
        shape, size, kernels = kind.shape, kind.size, self._kernels
        plan = kernels.plan(shape, size, kind.dtype)
        is_converted = kind.is_pinned or kind.dtype is not plan.x_dtype
        steps = Steps(
            self._launch(None, kernels.admit(size.n_pairs)),
            self._launch(shape, kernels.convert(shape, size.n_tokens)) if is_converted else None,
            [self._launch(shape, step) for step in plan.steps],
        )
        return SlabJob(self._device, kind, plan, steps, self._workspace)

    def _launch(self, shape: Shape | None, step: Step) -> Launch:
        return Launch(step, self._kernels.load(shape, step))


def _arrays(layer: DeviceLayer, call: SlabCall, data: SlabData, refused: int, first: int) -> Arrays:
    """Of the call's tokens from `first` on."""
    places = call.places
    rows = first * layer.shape.hidden * call.dtype.itemsize
    pairs = first * call.top_k * 4
    return Arrays(
        hidden_states=data.address + places.hidden_states + rows,
        topk_ids=data.address + places.topk_ids + pairs,
        topk_weights=data.address + places.topk_weights + pairs,
        out=data.address + places.out + rows,
        host_out=(data.host_address or 0) + places.out + rows,
        refused=refused,
    )
