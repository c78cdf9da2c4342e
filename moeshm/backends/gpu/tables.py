"""Tables of slots on the device, by which kernels find the experts that ids stand for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .device import Device, HostMemory, Memory

#: Tables that are kept: one of each layer, for each engine that placed experts; after a change of
#: experts a new one. Far more than are in use at a time, or each call would have to upload one.
MAX_TABLES = 2048


class SlotTables:
    """What was uploaded, by content. For whoever uses the device's stream."""

    def __init__(self, device: Device) -> None:
        self._device = device
        #: Tables that are not where they were found.
        self.n_replaced = 0
        #: The oldest first.
        self._tables: dict[bytes, Memory] = {}
        self._staging: HostMemory | None = None

    def find(self, slots: npt.NDArray[np.int32] | None) -> int:
        """Where the table is on the device; 0 for None. Uploaded if it is not there.

        It stays until so many others were asked for that it is replaced, for which the device is
        waited for.
        """
        if slots is None:
            return 0
        content = slots.tobytes()
        table = self._tables.get(content)
        if table is None:
            table = self._upload(content)
        return table.address

    def _upload(self, content: bytes) -> Memory:
        table, staging = self._device.allocate(len(content)), self._staging
        if staging is None or len(staging.array) < len(content):
            staging = self._staging = self._device.pin(len(content))
        staging.array[: len(content)] = np.frombuffer(content, np.uint8)
        commands = self._device.command_list()
        commands.copy_in(table.address, staging.address, len(content))
        commands.enqueue()
        # Also for calls on their way, which may use the one that is replaced.
        self._device.wait()
        self._tables[content] = table
        # Last: whoever knows where it was learns of it only if all of this came to its end.
        if len(self._tables) > MAX_TABLES:
            self.n_replaced += 1
            self._tables.pop(next(iter(self._tables))).close()
        return table
