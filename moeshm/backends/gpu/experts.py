"""The experts on the device: their blocks, and by layer and slot where these are."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Mapping, Sequence

import numpy as np

from ...checkpoint.layer import ExpertLayer
from ...errors import CheckpointError, DeviceLost, OutOfDeviceMemory
from ...layers import LayerInfo
from .choice import Shape
from .device import Device, Memory
from .packing import pack
from .turn import Turn

#: Pinned memory through which weights go to the device, a part at a time: as long as one takes may
#: a call have to wait.
STAGING_BYTES = 8 << 20
#: Blocks start at multiples of it.
_ALIGNMENT = 256
#: What drivers round each allocation of device memory up to.
_PAGE_BYTES = 2 << 20
#: Left free for compiled modules, for what they need when they run, and for tables of layers.
MARGIN_BYTES = 128 << 20


class BlockPool:
    """Device memory in blocks of one size: what is given back is taken again.

    Blocks are allocated in slabs; a slab is freed when all of its blocks are back.
    """

    def __init__(self, device: Device, block_bytes: int) -> None:
        self._device = device
        self._step = _round_up(block_bytes, _ALIGNMENT)
        self._slabs: dict[int, Memory] = {}
        #: By the address of each slab that has some.
        self._free: dict[int, list[int]] = {}

    def bytes_for(self, parts: Sequence[int]) -> int:
        """What has to be allocated for so many more blocks, each part taken by itself."""
        needed, n_free = 0, self._n_free()
        for n_blocks in parts:
            n_new = max(0, n_blocks - n_free)
            needed += _round_up(n_new * self._step, _PAGE_BYTES)
            n_free += n_new - n_blocks
        return needed

    def take(self, n_blocks: int) -> list[int]:
        """Addresses of so many blocks."""
        n_new = n_blocks - self._n_free()
        if n_new > 0:
            slab = self._device.allocate(n_new * self._step)
            self._slabs[slab.address] = slab
            self._free[slab.address] = [slab.address + i * self._step for i in range(n_new)]
        taken: list[int] = []
        for address in list(self._free):
            blocks = self._free[address]
            n_taken = min(len(blocks), n_blocks - len(taken))
            taken += blocks[:n_taken]
            del blocks[:n_taken]
            if not blocks:
                del self._free[address]
        return taken

    def give_back(self, addresses: Sequence[int]) -> list[Memory]:
        """No call that comes uses these blocks any more; slabs to be freed once none on its way
        does, either."""
        unused: list[Memory] = []
        for address in addresses:
            base = max(slab for slab in self._slabs if slab <= address)
            blocks = self._free.setdefault(base, [])
            blocks.append(address)
            if len(blocks) * self._step == self._slabs[base].nbytes:
                del self._free[base]
                unused.append(self._slabs.pop(base))
        return unused

    def _n_free(self) -> int:
        return sum(map(len, self._free.values()))


class DeviceLayer:
    """The experts of one layer: where each slot's block is, here and on the device."""

    def __init__(self, device: Device, info: LayerInfo, has_bias: bool) -> None:
        self.info = info
        self.shape = Shape.of(info, has_bias)
        self.table = device.allocate(8 * info.num_experts)
        #: Addresses by slot; 0 for one that is taken and not there yet.
        self.blocks: dict[int, int] = {}
        #: The same as an array, uint64 by slot, replaced when it changes.
        self.addresses = np.zeros(0, np.uint64)
        #: What the ids of calls are below.
        self.n_slots = 1

    @property
    def capacity(self) -> int:
        """Slots of the table."""
        return self.table.nbytes // 8

    def note_blocks(self) -> None:
        """Have everything follow `blocks`."""
        self.n_slots = max(self.blocks, default=0) + 1
        addresses = np.zeros(self.n_slots, np.uint64)
        for slot, address in self.blocks.items():
            addresses[slot] = address
        self.addresses = addresses

    def take_slots(self, n_slots: int) -> list[int]:
        """The lowest slots that are free."""
        free = (slot for slot in itertools.count() if slot not in self.blocks)
        slots = list(itertools.islice(free, n_slots))
        self.blocks.update(dict.fromkeys(slots, 0))
        return slots


class DeviceExperts:
    """The experts of all layers, which come and go while calls use others.

    `turn`: held by whoever uses the device's stream.
    """

    def __init__(self, device: Device, turn: Turn) -> None:
        self._device = device
        self._turn = turn
        #: For everything but the content of memory.
        self._changing = threading.Lock()
        self._uploading = threading.Lock()
        self._staging = device.pin(STAGING_BYTES)
        self._pools: dict[int, BlockPool] = {}
        self.layers: dict[int, DeviceLayer] = {}

    def check_room(self, parts: Sequence[tuple[Shape, int]], other_bytes: int) -> None:
        """OutOfDeviceMemory unless so many experts, each part added by itself, and so many other
        bytes fit."""
        by_size: dict[int, list[int]] = {}
        for shape, n_blocks in parts:
            by_size.setdefault(shape.block_bytes, []).append(n_blocks)
        with self._changing:
            needed = _round_up(other_bytes, _PAGE_BYTES) + sum(
                self._pool(block_bytes).bytes_for(each) for block_bytes, each in by_size.items()
            )
        free = self._device.free_bytes()
        # What needs nothing more fits, however little is left.
        if needed and needed + MARGIN_BYTES > free:
            raise OutOfDeviceMemory(
                f"{sum(n for _, n in parts)} experts need {_size(needed)} with what calls use, and "
                f"{_size(MARGIN_BYTES)} for kernels, but {_size(free)} of "
                f"{_size(self._device.features.total_bytes)} are free on {self._device.name} "
                f"({self._device.features.name}); hold fewer experts there"
            )

    def add_layer(self, number: int, info: LayerInfo, has_bias: bool) -> DeviceLayer:
        """The layer, without experts if it is new. CheckpointError: it was without biases."""
        with self._changing:
            if number not in self.layers:
                self.layers[number] = DeviceLayer(self._device, info, has_bias)
            layer = self.layers[number]
        if has_bias and not layer.shape.has_bias:
            raise CheckpointError(
                f"layer {number} was loaded without biases, and now comes an expert with some; "
                "start the worker anew"
            )
        return layer

    def add(self, number: int, experts: ExpertLayer) -> list[int]:
        """Upload experts of a layer that is here; the slot of each.

        Where it fails, nothing has changed. Calls wait for a part of a matrix at most.
        """
        layer = self.layers[number]
        with self._changing:
            blocks = self._pool(layer.shape.block_bytes).take(len(experts))
            slots = layer.take_slots(len(experts))
        try:
            for local_id, block in enumerate(blocks):
                self._upload(layer.shape, experts, local_id, block)
            self._enter(layer, dict(zip(slots, blocks, strict=True)))
        except BaseException:
            with self._changing:
                unused = self._forget(layer, slots, blocks)
            self._free(unused)
            raise
        return slots

    def remove(self, number: int, slots: Sequence[int]) -> None:
        """Forget the experts in these slots, which no call that comes uses."""
        layer = self.layers[number]
        with self._changing:
            unused = self._forget(layer, slots, [layer.blocks[slot] for slot in slots])
            layer.note_blocks()
        self._free(unused)

    def _forget(
        self, layer: DeviceLayer, slots: Sequence[int], blocks: Sequence[int]
    ) -> list[Memory]:
        for slot in slots:
            del layer.blocks[slot]
        return self._pool(layer.shape.block_bytes).give_back(blocks)

    def _free(self, unused: Sequence[Memory]) -> None:
        """What calls from slabs may still use that were begun."""
        if not unused:
            return
        # A device that is lost computes nothing any more.
        with self._turn, contextlib.suppress(DeviceLost):
            self._device.wait()
        for memory in unused:
            memory.close()

    def _pool(self, block_bytes: int) -> BlockPool:
        return self._pools.setdefault(block_bytes, BlockPool(self._device, block_bytes))

    def _upload(self, shape: Shape, experts: ExpertLayer, local_id: int, block: int) -> None:
        with self._uploading:
            weights = experts.expert(local_id)
            for offset, n_bytes in pack(shape, weights, self._staging.array):
                self._copy(block + offset, n_bytes)

    def _enter(self, layer: DeviceLayer, blocks: Mapping[int, int]) -> None:
        """Note where these slots' experts are, here and in the layer's table."""
        with self._uploading:
            n_slots = max(blocks, default=0) + 1
            if n_slots > layer.capacity:
                self._enlarge(layer, n_slots)
            for slot, block in blocks.items():
                self._staging.array[:8].view(np.uint64)[0] = block
                self._copy(layer.table.address + 8 * slot, 8)
            with self._changing:
                layer.blocks.update(blocks)
                layer.note_blocks()

    def _enlarge(self, layer: DeviceLayer, n_slots: int) -> None:
        """Have a table for more slots than the model has experts: what one engine gave up may still
        be here when another asks for it again."""
        table = self._device.allocate(8 * max(n_slots, 2 * layer.capacity))
        with self._changing:
            blocks = [layer.blocks.get(slot, 0) for slot in range(layer.capacity)]
        self._staging.array[: 8 * len(blocks)].view(np.uint64)[:] = blocks
        self._copy(table.address, 8 * len(blocks))
        with self._turn:
            old, layer.table = layer.table, table
        self._free([old])

    def _copy(self, to: int, n_bytes: int) -> None:
        """The first bytes of the staging memory, which is free again afterwards."""
        commands = self._device.command_list()
        commands.copy_in(to, self._staging.address, n_bytes)
        with self._turn:
            commands.enqueue()
            self._device.wait()


def has_bias(layer: ExpertLayer) -> bool:
    """True when any of its experts has one."""
    experts = map(layer.expert, range(len(layer)))
    return any(
        bias is not None
        for each in experts
        for bias in (each.gate_bias, each.up_bias, each.down_bias)
    )


def _round_up(n_bytes: int, unit: int) -> int:
    return -(-n_bytes // unit) * unit


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"
