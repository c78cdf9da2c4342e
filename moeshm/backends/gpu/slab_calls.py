"""Calls whose arrays lie in slabs: cut into parts, made ready beforehand, and begun in order."""

from __future__ import annotations

import contextlib

import msgspec
import numpy as np
import numpy.typing as npt

from ...dtypes import DType
from ...errors import DeviceError, InvalidCall
from .. import SlabCall
from .choice import Shape, Size, Step
from .compiled import Kernels
from .device import CommandList, Device, Memory
from .experts import DeviceExperts, DeviceLayer
from .job import Launch
from .resident import Resident
from .resident_job import ResidentSlabJob
from .slab_job import SlabJob, SlabKind, SlabMemory, n_values_admitted
from .tables import SlotTables
from .turn import Turn
from .workspace import Workspace

#: Kinds of calls that stay made ready.
_MAX_JOBS = 512
#: Of layers and sizes of calls, and of tables, what is found at once.
_MAX_KNOWN = 4096

_Job = SlabJob | ResidentSlabJob
#: Jobs of one kind that nobody uses.
_Free = list[_Job]


class Ready(msgspec.Struct, frozen=True):
    """A call that only has to be enqueued, and what that rests on."""

    call: SlabCall
    memory: SlabMemory
    layer: DeviceLayer
    #: The layer's table of experts.
    table: Memory
    #: As `SlabCalls` had it.
    stamp: object
    #: In order, each with where it belongs afterwards.
    jobs: list[tuple[_Job, _Free]]


class SlabCalls:
    """What begins calls from slabs on one device.

    `turn`: held by whoever uses the device's stream, and by whoever changes the workspace.

    A call is made ready before its turn, in a job that is its own until it is begun. What was made
    ready with one stamp is made anew when there is another.
    """

    def __init__(
        self,
        device: Device,
        kernels: Kernels,
        workspace: Workspace,
        experts: DeviceExperts,
        turn: Turn,
        resident: Resident | None = None,
    ) -> None:
        self._resident = resident
        self._device = device
        self._kernels = kernels
        self._workspace = workspace
        self._experts = experts
        self._turn = turn
        self._tables = SlotTables(device)
        #: Kinds come and go with the turn; their jobs are taken and given back without, too.
        self._jobs: dict[SlabKind, _Free] = {}
        #: Of them, by numbers, which are found sooner.
        self._known: dict[tuple[int, ...], _Free] = {}
        #: Where tables of slots are on the device, by `id`, with the table, whose `id` it stays.
        self._addresses: dict[int, tuple[npt.NDArray[np.int32], int]] = {}
        #: Another whenever something goes that a call which was made ready may use.
        self._stamp = object()

    def make_ready(self, call: SlabCall, memory: SlabMemory) -> Ready:
        """Do what can be done before its turn, on the thread that begins it. InvalidCall."""
        self._device.use()
        ready = self._find_ready(call, memory)
        if ready is None:
            with self._turn:
                ready = self._make_ready(call, memory)
        return ready

    def begin(self, ready: Ready) -> None:
        """Enqueue the call. InvalidCall: nothing was begun. DeviceError: what was begun is over."""
        try:
            # The resident kernel stays for what it computes itself.
            is_resident = all(job.is_resident for job, _ in ready.jobs)
            with self._turn.kept if is_resident else self._turn:
                is_ready = ready.stamp is self._stamp and ready.table is ready.layer.table
                if is_ready:
                    self._enqueue(ready)
            if not is_ready:
                # What was filled in may be gone.
                self.give_back(ready)
                with self._turn:
                    ready = self._make_ready(ready.call, ready.memory)
                    self._enqueue(ready)
        finally:
            self.give_back(ready)

    def _enqueue(self, ready: Ready) -> None:
        """For whoever has the turn."""
        try:
            for job, _ in ready.jobs:
                job.commands.enqueue()
        except BaseException:
            # The slab is the client's again once it is told of the error.
            with contextlib.suppress(DeviceError):
                self._device.wait()
            raise

    def give_back(self, ready: Ready) -> None:
        """Its jobs may begin other calls; those for a workspace that is gone are forgotten."""
        while ready.jobs:
            job, free = ready.jobs.pop()
            free.append(job)

    def finish(self, commands: CommandList) -> None:
        """Enqueue these after everything that was begun, and wait for all of it."""
        with self._turn:
            self._device.use()
            commands.enqueue()
            self._device.wait()

    def wait(self) -> None:
        """Until everything that was begun is done."""
        if self._resident is not None:
            with self._turn.kept:
                if self._resident.wait_for_all():
                    return
        with self._turn:
            self._device.use()
            self._device.wait()

    def prepare(self, shape: Shape, size: Size, dtype: DType) -> None:
        """Make jobs for such calls in both kinds of slabs, as long as there is room for more. For
        whoever has the turn."""
        for is_pinned in (False, True):
            kind = SlabKind(shape, size, dtype, is_pinned, is_last=True, is_whole=True)
            if kind not in self._jobs and len(self._jobs) < _MAX_JOBS // 2:
                self._free(kind).append(self._make_job(kind))

    def forget_jobs(self) -> None:
        """The workspace changes. For whoever uses the device's stream."""
        self._known.clear()
        self._jobs.clear()
        # Last: who sees it finds nothing of what went.
        self._stamp = object()

    def _find_ready(self, call: SlabCall, memory: SlabMemory) -> Ready | None:
        """The call, ready; None where that takes the turn."""
        # Before everything that it stands for.
        stamp, layer = self._stamp, self._experts.layers[call.layer]
        table, address = layer.table, 0
        if call.slots is not None:
            found = self._addresses.get(id(call.slots))
            if found is None:
                return None
            address = found[1]
        free = self._known.get(_numbers(layer.n_slots, call, memory))
        job = None if free is None else _take(free)
        if free is None or job is None:
            return None
        job.fill(call, layer, memory, address, 0)
        return Ready(call, memory, layer, table, stamp, [(job, free)])

    def _make_ready(self, call: SlabCall, memory: SlabMemory) -> Ready:
        """As `_find_ready`, with whatever is missing. For whoever has the turn."""
        layer = self._experts.layers[call.layer]
        # Once, for all that is found by it: other threads add and remove experts meanwhile.
        n_slots = layer.n_slots
        kinds = self._kinds(layer, n_slots, call, memory)
        address = self._address(call)
        ready = Ready(call, memory, layer, layer.table, self._stamp, [])
        for first, kind in kinds.items():
            free = self._free(kind)
            job = _take(free) or self._make_job(kind)
            job.fill(call, layer, memory, address, first)
            ready.jobs.append((job, free))
        if len(kinds) == 1:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[_numbers(n_slots, call, memory)] = free
        return ready

    def _kinds(
        self, layer: DeviceLayer, n_slots: int, call: SlabCall, memory: SlabMemory
    ) -> dict[int, SlabKind]:
        """By the first token of each part: several where there is not memory for all of it."""
        shape, n_tokens, top_k = layer.shape, call.n_tokens, call.top_k
        if shape.hidden != shape.hidden_size:
            raise InvalidCall(
                f"hidden_size={shape.hidden_size} is no multiple of 8; pass arrays in host memory"
            )
        is_pinned = memory.host_data is not None
        most = self._workspace.most_tokens(shape, top_k, n_slots)
        return {
            first: SlabKind(
                shape,
                Size(min(most, n_tokens - first), top_k, n_slots),
                call.dtype,
                is_pinned,
                is_last=first + most >= n_tokens,
                is_whole=n_tokens <= most,
            )
            # One part, too, of a call without tokens.
            for first in range(0, max(n_tokens, 1), most)
        }

    def _address(self, call: SlabCall) -> int:
        """Where the call's table of slots is on the device; 0 for none."""
        if call.slots is None:
            return 0
        n_replaced = self._tables.n_replaced
        address = self._tables.find(call.slots)
        if self._tables.n_replaced != n_replaced:
            self._addresses.clear()
            self._stamp = object()
        if len(self._addresses) >= _MAX_KNOWN:
            self._addresses.clear()
        self._addresses[id(call.slots)] = call.slots, address
        return address

    def _free(self, kind: SlabKind) -> _Free:
        """Of that kind. For whoever has the turn."""
        free = self._jobs.get(kind)
        if free is None:
            if len(self._jobs) >= _MAX_JOBS:
                # The oldest; sizes that come often are soon there again.
                del self._jobs[next(iter(self._jobs))]
                self._known.clear()
            free = self._jobs[kind] = []
        return free

    def _make_job(self, kind: SlabKind) -> _Job:
        shape, size = kind.shape, kind.size
        plan = self._kernels.plan(shape, size, kind.dtype)
        resident = self._resident
        if resident is not None and kind.is_whole and resident.takes(plan, size):
            return ResidentSlabJob(resident, kind, plan, self._workspace)
        n_values = n_values_admitted(kind, plan)
        admit = self._launch(None, self._kernels.admit(size.n_pairs, n_values))
        experts = [self._launch(shape, step) for step in plan.steps]
        return SlabJob(self._device, kind, plan, admit, experts, self._workspace)

    def _launch(self, shape: Shape | None, step: Step) -> Launch:
        return Launch(step, self._kernels.load(shape, step))


def _take(free: _Free) -> _Job | None:
    """One, of which others take too, with the turn or without; None if there is none."""
    try:
        return free.pop()
    except IndexError:
        return None


def _numbers(n_slots: int, call: SlabCall, memory: SlabMemory) -> tuple[int, ...]:
    """What tells the kinds of such calls apart, as something that is soon compared."""
    is_pinned = memory.host_data is not None
    return call.layer, n_slots, call.n_tokens, call.top_k, call.dtype, is_pinned
