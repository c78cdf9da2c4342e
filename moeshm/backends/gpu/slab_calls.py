"""Calls whose arrays lie in slabs: made ready beforehand, and begun in order, a part at a time."""

from __future__ import annotations

import contextlib

import msgspec
import numpy as np
import numpy.typing as npt

from ...dtypes import DType
from ...errors import DeviceError, InvalidCall
from .. import BetweenSteps, SlabCall
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
from .workspace import Workspace, step_tokens

#: Kinds of calls that stay made ready.
_MAX_JOBS = 512
#: Of layers and sizes of calls, and of tables, what is found at once.
_MAX_KNOWN = 4096

_Job = SlabJob | ResidentSlabJob
#: Jobs of one kind that nobody uses.
_Free = list[_Job]


class Ready(msgspec.Struct, frozen=True):
    """A call, or a part of one, that only has to be enqueued, and what that rests on."""

    call: SlabCall
    memory: SlabMemory
    layer: DeviceLayer
    #: The layer's table of experts.
    table: Memory
    #: As `SlabCalls` had it.
    stamp: object
    job: _Job
    #: Where that belongs afterwards.
    free: _Free
    #: The first token after it.
    end: int

    @property
    def is_last(self) -> bool:
        """Nothing of the call comes after it."""
        return self.end == self.call.n_tokens


class SlabCalls:
    """What begins calls from slabs on one device.

    `turn`: held by whoever uses the device's stream, and by whoever changes the workspace.

    A call is made ready before its turn, in a job that is its own until it is begun. What was made
    ready with one stamp is made anew when there is another. Of a call of several parts, each has a
    turn, in which it is made ready, if it is not the first, and waited for, if it is not the last.
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
        #: Tokens of a step, by layer, top_k and slots.
        self._step_tokens: dict[tuple[int, int, int], int] = {}
        #: Another whenever something goes that a call which was made ready may use.
        self._stamp = object()

    def share_of_step(self, call: SlabCall) -> float:
        """As `WorkerSlab.share_of_step`."""
        layer = self._experts.layers[call.layer]
        key = call.layer, call.top_k, layer.n_slots
        tokens = self._step_tokens.get(key)
        if tokens is None:
            if len(self._step_tokens) >= _MAX_KNOWN:
                self._step_tokens.clear()
            tokens = self._step_tokens[key] = step_tokens(layer.shape, *key[1:])
        return call.n_tokens / tokens

    def make_ready(self, call: SlabCall, memory: SlabMemory) -> Ready:
        """Do what can be done before its turn, on the thread that begins it. InvalidCall."""
        self._device.use()
        ready = self._find_ready(call, memory)
        if ready is None:
            with self._turn:
                ready = self._make_ready(call, memory, 0)
        return ready

    def begin(self, ready: Ready, between_steps: BetweenSteps) -> None:
        """Enqueue the call, and wait for all of it but the last part. InvalidCall: nothing was
        begun. DeviceError, and what `between_steps` raises: what was begun is over."""
        ready = self._begin_first(ready)
        while not ready.is_last:
            if between_steps.is_due():
                between_steps()
            ready = self._begin_part(ready.call, ready.memory, ready.end)

    def _begin_first(self, ready: Ready) -> Ready:
        """What was made ready, and else its like."""
        is_ready = False
        try:
            # The resident kernel stays for what it computes itself.
            with self._turn.kept if ready.job.is_resident else self._turn:
                is_ready = ready.stamp is self._stamp and ready.table is ready.layer.table
                if is_ready:
                    self._enqueue(ready)
        finally:
            self.give_back(ready)
        # What was filled in may be gone.
        return ready if is_ready else self._begin_part(ready.call, ready.memory, 0)

    def _begin_part(self, call: SlabCall, memory: SlabMemory, first: int) -> Ready:
        """From the token `first` on: others may have had a turn, and changed what there was."""
        with self._turn:
            ready = self._make_ready(call, memory, first)
            try:
                self._enqueue(ready)
            finally:
                self.give_back(ready)
        return ready

    def _enqueue(self, ready: Ready) -> None:
        """For whoever has the turn; a part that others come after is waited for."""
        try:
            ready.job.commands.enqueue()
            if not ready.is_last:
                self._device.wait()
        except BaseException:
            # The slab is the client's again once it is told of the error.
            with contextlib.suppress(DeviceError):
                self._device.wait()
            raise

    def give_back(self, ready: Ready) -> None:
        """Once: its job may begin other calls; one for a workspace that is gone is forgotten."""
        ready.free.append(ready.job)

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
        return Ready(call, memory, layer, table, stamp, job, free, call.n_tokens)

    def _make_ready(self, call: SlabCall, memory: SlabMemory, first: int) -> Ready:
        """As `_find_ready`, with whatever is missing: the part from the token `first` on. For
        whoever has the turn."""
        layer = self._experts.layers[call.layer]
        # Once, for all that is found by it: other threads add and remove experts meanwhile.
        n_slots = layer.n_slots
        end, kind = self._part(layer, n_slots, call, memory, first)
        address = self._address(call)
        free = self._free(kind)
        job = _take(free) or self._make_job(kind)
        job.fill(call, layer, memory, address, first)
        if kind.is_whole:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[_numbers(n_slots, call, memory)] = free
        return Ready(call, memory, layer, layer.table, self._stamp, job, free, end)

    def _part(
        self, layer: DeviceLayer, n_slots: int, call: SlabCall, memory: SlabMemory, first: int
    ) -> tuple[int, SlabKind]:
        """Where the part that begins with the token `first` ends, and its kind."""
        shape, top_k = layer.shape, call.top_k
        if shape.hidden != shape.hidden_size:
            raise InvalidCall(
                f"hidden_size={shape.hidden_size} is no multiple of 8; pass arrays in host memory"
            )
        left = call.n_tokens - first
        n_tokens = self._workspace.part_tokens(left, shape, top_k, n_slots)
        kind = SlabKind(
            shape,
            Size(n_tokens, top_k, n_slots),
            call.dtype,
            is_pinned=memory.host_data is not None,
            is_last=n_tokens == left,
            is_whole=n_tokens == call.n_tokens,
        )
        return first + n_tokens, kind

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
