"""A kernel that stays on a device of its own, and computes what it finds in its mailbox."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ... import settings
from ..._words import wait_for_word
from ...errors import DeviceError
from . import choice
from ._mailbox import FINISHED, MAILBOX_BYTES, Mailbox
from .abi import ROOMS_BYTES, Command, Route
from .abi import Resident as Arguments
from .choice import Plan, Shape, Size
from .compiled import Kernels
from .device import CommandList, Device
from .sharing import Neighbours

_log = logging.getLogger(__name__)

#: Without a call for so long the kernel ends, and the card rests.
IDLE_NS = 20_000_000
#: A kernel that has calls all the time is ended after so long: what waits for the whole device, as
#: the driver does to free memory, is to have its turn.
_LONGEST_S = 1.0
#: How often whoever waits for a call looks whether the device still lives.
_SLICE_NS = 100_000_000
#: How old what is known of other processes may be when a kernel is launched.
_LOOK_S = 1.0
_STOP = 1


class ResidentStats(NamedTuple):
    """What came of a kernel that was to stay."""

    #: That it has begun; all others were launched.
    n_calls: int
    #: Of the kernel itself.
    n_launched: int
    #: Why calls are not for it now; empty if they are.
    why_not: str


class Resident:
    """Calls to layers of one shape at a time; another shape's have the kernel launched anew.

    All methods are for whoever has the device's turn, `yield_device` for whoever is about to;
    `load` is for any thread. `n_calls`: that it has begun; `n_launched`: kernels.

    DeviceError: the device cannot have such a kernel, or is not this process's alone;
    `count_others` says how many more use it.
    """

    def __init__(
        self, device: Device, kernels: Kernels, count_others: Callable[[], int] | None = None
    ) -> None:
        self._device = device
        self._kernels = kernels
        _check_features(device)
        self._count_others = count_others or Neighbours(device.features.bus_id).count
        #: Why calls are not for it; empty if they are.
        self.why_not = ""
        #: Told when that has changed, by whoever has the turn.
        self.on_change: Callable[[], object] = lambda: None
        self.look_for_others()
        if self.why_not:
            raise DeviceError(f"no resident kernel: {self.why_not}; use another GPU, or do without")
        self._memory = device.pin(MAILBOX_BYTES)
        self._mailbox = Mailbox(self._memory.array)
        self._rooms = device.allocate(ROOMS_BYTES)
        self._clear_rooms()
        self._stop = Command(what=_STOP)
        self._launches: dict[Shape, tuple[Arguments, CommandList]] = {}
        #: What the kernel that runs, if one does, takes.
        self._shape: Shape | None = None
        self._launched_at = 0.0
        #: The number of the last command that was begun.
        self._last = 0
        #: Something may be in the mailbox that no kernel is to find.
        self._is_spoilt = False
        self._spin_ns = int(settings.current().spin_us * 1e3)
        self.n_launched = 0
        self.n_calls = 0

    @property
    def stats(self) -> ResidentStats:
        """The figures now."""
        return ResidentStats(self.n_calls, self.n_launched, self.why_not)

    def takes(self, plan: Plan, size: Size) -> bool:
        """Whether such calls are for it."""
        return not self.why_not and choice.is_resident(plan, size)

    def load(self, shape: Shape, top_k: int) -> None:
        """Have its kernel compiled and on the device, if calls to such layers are for it."""
        size = Size(1, top_k, 1)
        plan = self._kernels.plan(shape, size, shape.weight_dtype)
        if choice.is_resident(plan, size):
            self._load(shape)
            return
        _log.warning(
            "the resident kernel on %s takes no calls of layers of %d x %d in %s: kernels are %s",
            self._device.name,
            shape.hidden_size,
            shape.inner,
            shape.weight_dtype,
            plan.steps[0].file,
        )

    def _load(self, shape: Shape) -> None:
        if shape in self._launches:
            return
        step = choice.resident(shape, self._device.features)
        arguments = Arguments(self._memory.address, self._rooms.address, IDLE_NS)
        commands = self._device.command_list()
        kernel = self._kernels.load(shape, step)
        how = (step.grid, step.block, step.shared_bytes, arguments, Route())
        commands.launch(kernel, *how, overlaps=False)
        self._launches[shape] = arguments, commands

    def begin(self, shape: Shape, command: int) -> int:
        """Have it compute the `Command` at that address, after those before; the number to wait
        for. DeviceError: it was not begun, and never will be once the device has been waited for.
        """
        if self._is_spoilt:
            self.start_over()
        try:
            self._last = self._begin(shape, command)
        except BaseException:
            self._is_spoilt = True
            raise
        self.n_calls += 1
        return self._last

    def _begin(self, shape: Shape, command: int) -> int:
        if self._shape != shape or time.monotonic() - self._launched_at > _LONGEST_S:
            self.yield_device()
            self._launch(shape)
        number = self._mailbox.post(command)
        while number is None:
            self._wait_for_room()
            number = self._mailbox.post(command)
        if self._mailbox.n_ended == self.n_launched:
            # It had been idle; what is in the mailbox is for the next one.
            self._launch(shape)
        return number

    def wait(self, number: int) -> None:
        """Until that command is done. DeviceLost: it never will be."""
        memory = self._memory.array
        while not wait_for_word(memory, FINISHED, number, _SLICE_NS, self._spin_ns):
            self._device.use()
            self._device.check()
            if self._shape is not None and self._mailbox.n_ended == self.n_launched:
                # Not that one is known that ends and leaves a command.
                self._launch(self._shape)

    def start_over(self) -> None:
        """Return when no kernel runs any more; what none of them has found is forgotten.
        DeviceError: as `Device.wait`, and the next `begin` does it again."""
        self._is_spoilt = True
        self._shape = None
        # Nothing comes, so they end.
        self._device.wait()
        self._clear_rooms()
        self._mailbox = Mailbox(self._memory.array)
        self._last = 0
        self._is_spoilt = False

    def wait_for_all(self) -> bool:
        """Until every command is done; False if its kernel has yielded, behind which there may be
        more to wait for."""
        if self._shape is None:
            return False
        self.wait(self._last)
        return True

    def yield_device(self) -> None:
        """As `Yielding.yield_device`."""
        if self._shape is None:
            return
        self._shape = None
        # Also where a kernel says that it has ended: it looks once more after that, and would take
        # what is meant for the next. A kernel that comes later leaves this alone.
        self._stop.launch = self.n_launched
        try:
            while self._mailbox.post(ctypes.addressof(self._stop)) is None:
                self._wait_for_room()
        except BaseException:
            self._is_spoilt = True
            raise

    def _wait_for_room(self) -> None:
        self.wait((self._mailbox.n_posted - 8) & 0xFFFFFFFF)

    def look_for_others(self) -> None:
        """See whether the device is this process's alone; else no call is for this kernel."""
        try:
            n_others = self._count_others()
            why = f"{n_others} other processes use {self._device.name}" if n_others else ""
        except DeviceError as error:
            why = str(error)
        self._looked_at = time.monotonic()
        if why != self.why_not:
            level = logging.WARNING if why else logging.INFO
            state = f"steps aside, calls are launched: {why}" if why else "takes calls again"
            _log.log(level, "the resident kernel on %s %s", self._device.name, state)
            self.why_not = why
            self.on_change()

    def _launch(self, shape: Shape) -> None:
        if time.monotonic() - self._looked_at > _LOOK_S:
            # What is begun with this launch is its last call, if there are others.
            self.look_for_others()
        self._load(shape)
        arguments, commands = self._launches[shape]
        arguments.launch = self.n_launched + 1
        commands.enqueue()
        self.n_launched += 1
        self._shape, self._launched_at = shape, time.monotonic()

    def _clear_rooms(self) -> None:
        """The first command and the first round have number 1, and nothing was counted."""
        first = np.zeros(ROOMS_BYTES // 4, np.uint32)
        first[:2] = 1
        source = self._device.pin(ROOMS_BYTES)
        source.array[:] = first.view(np.uint8)
        commands = self._device.command_list()
        commands.copy_in(self._rooms.address, source.address, ROOMS_BYTES)
        commands.enqueue()
        self._device.wait()
        source.close()


def _check_features(device: Device) -> None:
    features = device.features
    why = ""
    if not features.has_mma:
        why = f"it needs a CUDA GPU of sm_80 or later, and this is {features.arch}"
    elif features.ends_long_kernels:
        why = "the driver ends kernels that run for seconds, as on a card with a display"
    if why:
        raise DeviceError(f"no resident kernel on {device.name}: {why}; leave out --resident")
