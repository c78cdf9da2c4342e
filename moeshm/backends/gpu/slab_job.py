"""A call from a slab made ready: its commands, for all calls of that kind; nobody waits for it."""

from __future__ import annotations

from typing import NamedTuple

from ...dtypes import DType
from ...transport.slab import DONE, REFUSED, SLOT_BYTES
from .. import SlabCall
from ._launch import Fields
from .abi import Admitted, Asked
from .choice import Plan, Shape, Size
from .device import Device
from .experts import DeviceLayer
from .job import IN_PLACE_BYTES, Launch, structs
from .workspace import Workspace, lay_out


class SlabKind(NamedTuple):
    """What calls from slabs, or parts of them, have in common that one job begins."""

    shape: Shape
    size: Size
    #: Of activations and results.
    dtype: DType
    #: True where the slab's data is memory of the host.
    is_pinned: bool
    #: The call is done after this.
    is_last: bool
    #: It is all of the call.
    is_whole: bool


class SlabMemory(NamedTuple):
    """Where a slab is, by the device's addresses."""

    flags: int
    data: int
    #: The data, as the host has it; None for device memory.
    host_data: int | None


class SlabJob:
    """A call of some kind that only lacks its addresses.

    Ids and weights go to the workspace, where the client cannot change them. Memory of the host is
    read once, as kernels would read activations again and again; large results are copied there.
    One thread at a time may use it, and none once the workspace has been resized.
    """

    is_resident = False

    def __init__(
        self,
        device: Device,
        kind: SlabKind,
        plan: Plan,
        admit: Launch,
        experts: list[Launch],
        workspace: Workspace,
    ) -> None:
        size, dtype = kind.size, kind.dtype
        at, base = lay_out(kind.shape, plan, size, dtype), workspace.address
        self._row_bytes = dtype.itemsize * kind.shape.hidden
        self._call, route = structs(size, plan.x_dtype, dtype, at, base)
        n_values = n_values_admitted(kind, plan)
        asked = Asked(n_pairs=size.n_pairs, x_dtype=dtype)
        admitted = Admitted(
            ids=base + at.ids,
            weights=base + at.weights,
            x=base + at.x,
            n_values=n_values,
            x_dtype=plan.x_dtype,
        )
        #: What begins the call that it was filled with.
        self.commands = commands = device.command_list()
        admit.add_to(commands, asked, admitted, overlaps=False)
        for index, launch in enumerate(experts):
            # Kernels that overlap with the one ahead read ids at once.
            launch.add_to(commands, self._call, route, overlaps=index > 0)
        #: The copy of results to the host's memory; None where kernels write them there.
        self._copy_of_out: int | None = None
        out_bytes = self._row_bytes * size.n_tokens
        if kind.is_pinned and out_bytes > IN_PLACE_BYTES:
            self._copy_of_out = commands.copy_out(0, base + at.out, out_bytes)
        #: The write of the flag; None where more of the call comes after this.
        self._done = commands.write_value(0) if kind.is_last else None
        self._fields = Fields(
            *((asked, name) for name in ("ids", "weights", "slots", "n_ids", "first_pair")),
            (admitted, "refused"),
            *((self._call, name) for name in ("experts", "alpha", "limit")),
            (asked if n_values else self._call, "x"),
        )

    def fill(
        self, call: SlabCall, layer: DeviceLayer, memory: SlabMemory, slots: int, first: int
    ) -> None:
        """Have it compute this call, from its token `first` on.

        `slots`: where the table of slots is, 0 for none.
        """
        slot, hidden_states, topk_ids, topk_weights, out = call.places
        flags, data, host_data = memory
        flags += slot * SLOT_BYTES
        row, pair, info = first * self._row_bytes, first * call.top_k, layer.info
        self._fields.set(
            data + topk_ids + pair * 4,
            data + topk_weights + pair * 4,
            slots,
            call.n_ids,
            pair,
            flags + REFUSED,
            layer.table.address,
            info.activation_alpha,
            info.activation_limit,
            data + hidden_states + row,
        )
        if self._copy_of_out is None:
            self._call.out = data + out + row
        else:
            assert host_data is not None
            self.commands.set_host_address(self._copy_of_out, host_data + out + row)
        if self._done is not None:
            self.commands.set_value(self._done, flags + DONE, call.sequence)


def n_values_admitted(kind: SlabKind, plan: Plan) -> int:
    """Of activations that are brought to the workspace: all or none."""
    is_brought = kind.is_pinned or kind.dtype is not plan.x_dtype
    return kind.size.n_tokens * kind.shape.hidden if is_brought else 0
