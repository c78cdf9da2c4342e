"""The question: does a GPU copy from and to rings as fast as from and to memory made for that?"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moeshm import RingConsumer, RingProducer
from moeshm.backends.gpu._launch import address_of
from moeshm.backends.gpu.cupy_device import open_device
from moeshm.backends.gpu.device import Bytes, CommandList, Device, Memory
from moeshm.backends.gpu.registered import RegisteredMemory
from moeshm.errors import DeviceError, UnsupportedPlatform

from . import harness
from .harness import CellSamples, Plan, Samples
from .schema import CopyReport, CopyRow

#: What ratios are taken over: pinned memory that the driver allocated.
BASE = "pinned"
CONTENDERS = (BASE, "ring", "ring-across", "ring-unregistered")
DIRECTIONS = ("in", "out")
#: Copies in a command list, and command lists between two looks at the clock: at least so many
#: bytes together, for the time of a launch and of a wait to be spread over many copies.
_LIST_COPIES = 8
_ROUND_BYTES = 256 << 20
#: Rounds of a repeat, of which the first is not counted.
_ROUNDS = 4


class Cell(NamedTuple):
    """One direction and size."""

    direction: str
    size_bytes: int

    @property
    def name(self) -> str:
        """Of its samples."""
        return f"{self.direction}-{self.size_bytes}"


class Host(NamedTuple):
    """A contender's memory, and the same bytes where they may be written."""

    address: int
    array: Bytes


def open_gpu(name: str) -> Device:
    """The GPU of that name; UnsupportedPlatform: there is none."""
    try:
        return open_device(name)
    except DeviceError as error:
        raise UnsupportedPlatform(f"copies need a GPU: {error}") from error


def measure(
    device: Device, sizes: Sequence[int], plan: Plan, on_step: Callable[[str], None]
) -> CopyReport:
    """Copy all sizes both ways, the contenders in turns; `on_step` hears of each turn."""
    device.use()
    cells = [Cell(direction, size) for direction in DIRECTIONS for size in sizes]
    samples: Samples = {(name, cell.name): [] for name in CONTENDERS for cell in cells}

    def run(contender: str) -> bool:
        found = [_time(device, contender, cell, plan.seed) for cell in cells]
        for one in found:
            samples[contender, one.cell].append(one)
        on_step(contender)
        return any(one.error is None for one in found)

    meta = harness.metadata("copies", plan)
    harness.interleave(CONTENDERS, plan, run)
    rows = [_row(name, cell, samples) for cell in cells for name in CONTENDERS]
    base = {(row.direction, row.size_bytes): row for row in rows if row.contender == BASE}
    for row in rows:
        if row.contender != BASE:
            # Of bandwidths: the other way round than of times.
            other = base[row.direction, row.size_bytes]
            row.pinned_ratio = harness.ratio(other, row)
    return CopyReport(meta=meta, device=device.features.name, results=rows)


def count_steps(plan: Plan) -> int:
    """How often `measure` calls `on_step`."""
    return plan.repeats * len(CONTENDERS)


def _row(contender: str, cell: Cell, samples: Samples) -> CopyRow:
    row = CopyRow(
        contender=contender,
        direction=cell.direction,
        size_bytes=cell.size_bytes,
        **harness.summarise(samples[contender, cell.name]),
    )
    row.gb_per_s = harness.gb_per_s(cell.size_bytes, row.p50_us)
    return row


def _time(device: Device, contender: str, cell: Cell, seed: int) -> CellSamples:
    """The rounds of one repeat; its error, if it cannot be measured."""
    n_lists = max(1, _ROUND_BYTES // (_LIST_COPIES * cell.size_bytes))
    try:
        with (
            contextlib.closing(device.allocate(cell.size_bytes)) as memory,
            _host_memory(device, contender, cell) as host,
        ):
            _check(device, memory, host, cell, seed)
            durations_ns = [
                _time_round(device, memory, host, cell, n_lists) for _ in range(_ROUNDS)
            ]
    except DeviceError as error:
        return CellSamples(cell.name, error=str(error))
    return CellSamples(cell.name, n_lists * _LIST_COPIES, durations_ns[1:])


def _time_round(device: Device, memory: Memory, host: Host, cell: Cell, n_lists: int) -> int:
    """So many lists of copies, from the first's being enqueued until all are done, in ns."""
    commands = device.command_list()
    for _ in range(_LIST_COPIES):
        _add_copy(commands, memory, host.address, cell)
    start_ns = time.perf_counter_ns()
    for _ in range(n_lists):
        commands.enqueue()
    device.wait()
    return time.perf_counter_ns() - start_ns


def _add_copy(commands: CommandList, memory: Memory, address: int, cell: Cell) -> None:
    if cell.direction == "in":
        commands.copy_in(memory.address, address, cell.size_bytes)
    else:
        commands.copy_out(address, memory.address, cell.size_bytes)


def _check(device: Device, memory: Memory, host: Host, cell: Cell, seed: int) -> None:
    """DeviceError unless what is copied arrives."""
    other = Cell("out" if cell.direction == "in" else "in", cell.size_bytes)
    with contextlib.closing(device.pin(cell.size_bytes)) as pinned:
        source, target = host.array, pinned.array
        if cell.direction == "out":
            source, target = target, source
        source[:] = np.frombuffer(np.random.default_rng(seed).bytes(len(source)), np.uint8)
        target[:] = 0
        both = [(cell, host.address), (other, pinned.address)]
        commands = device.command_list()
        # What goes in first.
        for each, address in sorted(both, key=lambda pair: pair[0].direction):
            _add_copy(commands, memory, address, each)
        commands.enqueue()
        device.wait()
        if not np.array_equal(source, target):
            raise DeviceError(f"a copy {cell.direction} of {cell.size_bytes} bytes went wrong")


@contextlib.contextmanager
def _host_memory(device: Device, contender: str, cell: Cell) -> Iterator[Host]:
    """Where a contender's bytes are in the host's memory."""
    size = cell.size_bytes
    if contender == BASE:
        with contextlib.closing(device.pin(size)) as pinned:
            yield Host(pinned.address, pinned.array)
        return
    with (
        RingProducer.create(None, size) as producer,
        RingConsumer.attach(producer.fileno()) as consumer,
        contextlib.ExitStack() as stack,
    ):
        # A worker reads calls, and writes replies.
        memory = (consumer if cell.direction == "in" else producer).memory()
        if contender != "ring-unregistered":
            used = stack.enter_context(contextlib.closing(RegisteredMemory(device).use(memory)))
            if used.direct_bytes < memory.nbytes:
                raise DeviceError("rings cannot be registered here; moeshm doctor says why")
        # Half of what lies across is at the end of the data area, half at its beginning.
        offset = (memory.nbytes - size) // 2 if contender == "ring-across" else 0
        array = np.frombuffer(producer.memory(), np.uint8, size, offset)
        yield Host(address_of(memory) + offset, array)
