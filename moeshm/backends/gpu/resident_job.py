"""Calls made ready for a resident kernel: from arrays of a call, and from a slab."""

from __future__ import annotations

import contextlib
import ctypes
from typing import cast

import numpy as np

from ...dtypes import Array
from ...errors import DeviceError
from ...transport.slab import DONE, REFUSED, SLOT_BYTES
from .. import SlabCall
from ._launch import Fields
from ._mailbox import set_pairs
from .abi import COMMAND_PAIRS, Admitted, Asked, Command
from .choice import Plan
from .experts import DeviceLayer
from .job import Kind, Staging, structs
from .operands import Operand, Place, RegisteredArray
from .resident import Resident
from .slab_job import SlabKind, SlabMemory, n_values_admitted
from .workspace import Workspace, lay_out


class ResidentJob:
    """As `job.Job`, of a kind that the resident kernel takes.

    The kernel reads staged and registered memory of the host where it is, and writes results there.
    """

    def __init__(self, resident: Resident, kind: Kind, plan: Plan, workspace: Workspace) -> None:
        shape, size, places = kind.shape, kind.size, kind.places
        at = lay_out(shape, plan, size, kind.out_dtype)
        base, host = workspace.address, workspace.host
        self._resident = resident
        self._shape = shape
        self._staging = Staging.of(kind, plan.x_dtype, at, host.array)
        is_staged = places.x is Place.HOST
        self._narrow_to = plan.x_dtype if is_staged and kind.x_dtype is not plan.x_dtype else None
        call, _ = structs(size, plan.x_dtype, kind.out_dtype, at, base)
        call.out = host.address + at.out
        asked = Asked(
            ids=host.address + at.ids,
            weights=host.address + at.weights,
            x=host.address + at.x,
            n_pairs=size.n_pairs,
            n_ids=size.n_slots,
            x_dtype=plan.x_dtype if is_staged else kind.x_dtype,
        )
        admitted = Admitted(
            ids=base + at.ids,
            weights=base + at.weights,
            # Ids were checked: none is refused.
            refused=base + at.partial,
            x=base + at.x,
            n_values=size.n_tokens * shape.hidden,
            x_dtype=plan.x_dtype,
        )
        #: Whether the command itself has the pairs.
        self._has_pairs = size.n_tokens == 1 and size.top_k <= COMMAND_PAIRS
        if self._has_pairs:
            asked.ids = 0
        command = self._command = Command(call, asked, admitted)
        self._address = ctypes.addressof(command)
        self._of_layer = Fields(*((command.call, name) for name in ("experts", "alpha", "limit")))
        self._x = Fields((command.asked, "x"))
        self._out = Fields((command.call, "out"))

    def run(
        self, layer: DeviceLayer, x: Operand, ids: Operand, weights: Operand, out: Operand
    ) -> None:
        """As `Job.run`."""
        info = layer.info
        self._of_layer.set(layer.table.address, info.activation_alpha, info.activation_limit)
        self._take_pairs(layer, cast(Array, ids), cast(Array, weights))
        if isinstance(x, RegisteredArray):
            self._x.set(x.device_address)
        else:
            self._staging.put_rows(cast(Array, x), self._narrow_to)
        if isinstance(out, RegisteredArray):
            self._out.set(out.device_address)
        try:
            self._resident.wait(self._resident.begin(self._shape, self._address))
        except BaseException:
            # As by Ctrl-C: what is on its way still uses what the next call writes.
            with contextlib.suppress(DeviceError):
                self._resident.start_over()
            raise
        if isinstance(out, np.ndarray):
            out[...] = self._staging.out

    def _take_pairs(self, layer: DeviceLayer, ids: Array, weights: Array) -> None:
        if self._has_pairs:
            set_pairs(self._address, ids, weights, layer.addresses)
            return
        self._staging.ids[...] = ids
        self._staging.weights[...] = weights


class _Posted:
    """What begins a call, as a command list does."""

    def __init__(self, resident: Resident, kind: SlabKind, command: Command) -> None:
        self._resident = resident
        self._shape = kind.shape
        self._address = ctypes.addressof(command)

    def enqueue(self) -> None:
        """Without a wait."""
        self._resident.begin(self._shape, self._address)


class ResidentSlabJob:
    """As `slab_job.SlabJob`, of a kind that the resident kernel takes; results are written to where
    they belong."""

    is_resident = True

    def __init__(
        self, resident: Resident, kind: SlabKind, plan: Plan, workspace: Workspace
    ) -> None:
        size, dtype = kind.size, kind.dtype
        at, base = lay_out(kind.shape, plan, size, dtype), workspace.address
        call, _ = structs(size, plan.x_dtype, dtype, at, base)
        n_values = n_values_admitted(kind, plan)
        command = self._command = Command(
            call,
            Asked(n_pairs=size.n_pairs, x_dtype=dtype),
            Admitted(
                ids=base + at.ids,
                weights=base + at.weights,
                x=base + at.x,
                n_values=n_values,
                x_dtype=plan.x_dtype,
            ),
        )
        #: What begins the call that it was filled with.
        self.commands = _Posted(resident, kind, command)
        self._fields = Fields(
            *((command.asked, name) for name in ("ids", "weights", "slots", "n_ids")),
            (command.admitted, "refused"),
            *((command.call, name) for name in ("experts", "alpha", "limit", "out")),
            (command.asked if n_values else command.call, "x"),
            (command, "done"),
            (command, "done_value"),
        )

    def fill(
        self, call: SlabCall, layer: DeviceLayer, memory: SlabMemory, slots: int, _first: int
    ) -> None:
        """As `SlabJob.fill`; the call is whole."""
        slot, hidden_states, topk_ids, topk_weights, out = call.places
        flags, data, _ = memory
        flags += slot * SLOT_BYTES
        info = layer.info
        self._fields.set(
            data + topk_ids,
            data + topk_weights,
            slots,
            call.n_ids,
            flags + REFUSED,
            layer.table.address,
            info.activation_alpha,
            info.activation_limit,
            data + out,
            data + hidden_states,
            flags + DONE,
            call.sequence,
        )
