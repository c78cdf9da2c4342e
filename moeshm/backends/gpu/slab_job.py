"""A call from a slab made ready: its commands, for all calls of that kind; nobody waits for it."""

from __future__ import annotations

from typing import NamedTuple

from ...dtypes import DType
from .abi import Admitted, Asked, Call
from .choice import Plan, Shape, Size
from .device import Device
from .experts import DeviceLayer
from .job import IN_PLACE_BYTES, Launch, structs
from .workspace import Workspace, lay_out


class SlabKind(NamedTuple):
    """What calls from slabs have in common that one job begins."""

    shape: Shape
    size: Size
    #: Of activations and results.
    dtype: DType
    #: True where the slab's data is memory of the host.
    is_pinned: bool


class Steps(NamedTuple):
    """The launches of such a call, in this order."""

    admit: Launch
    #: Brings activations to the workspace; None where kernels take them as they are in the slab.
    convert: Launch | None
    experts: list[Launch]


class Arrays(NamedTuple):
    """Where a call's arrays are, by the device's addresses."""

    hidden_states: int
    topk_ids: int
    topk_weights: int
    out: int
    #: As the host has it; of no meaning in a slab of device memory.
    host_out: int
    #: The flag that tells of a wrong id.
    refused: int


class SlabJob:
    """A call of some kind that only lacks its addresses.

    Ids and weights go to the workspace, where the client cannot change them. Memory of the host is
    read once, as kernels would read activations again and again; large results are copied there.
    One thread at a time may use it, and none once the workspace has been resized.
    """

    def __init__(
        self, device: Device, kind: SlabKind, plan: Plan, steps: Steps, workspace: Workspace
    ) -> None:
        size, dtype = kind.size, kind.dtype
        at, base = lay_out(kind.shape, plan, size, dtype), workspace.address
        out_bytes = dtype.itemsize * size.n_tokens * kind.shape.hidden
        self._call, route = structs(size, plan.x_dtype, dtype, at, base)
        self._asked = Asked(n_pairs=size.n_pairs)
        self._admitted = Admitted(ids=base + at.ids, weights=base + at.weights)
        commands = self._commands = device.command_list()
        steps.admit.add_to(commands, self._asked, self._admitted, overlaps=False)
        launches = [(each, self._call) for each in steps.experts]
        #: What takes activations from the slab.
        self._taker = self._call
        if steps.convert is not None:
            self._taker = Call(
                out=base + at.x, n_tokens=size.n_tokens, x_dtype=dtype, out_dtype=plan.x_dtype
            )
            launches.insert(0, (steps.convert, self._taker))
        for index, (launch, call) in enumerate(launches):
            # Kernels that overlap with the one ahead read ids at once.
            launch.add_to(commands, call, route, overlaps=index > 0)
        #: The copy of results to the host's memory; None where kernels write them there.
        self._copy_of_out: int | None = None
        if kind.is_pinned and out_bytes > IN_PLACE_BYTES:
            self._copy_of_out = commands.copy_out(0, base + at.out, out_bytes)

    def begin(
        self, layer: DeviceLayer, arrays: Arrays, slots: int, n_ids: int, first_pair: int
    ) -> None:
        """Enqueue the call with these arrays.

        `slots`: where the table of slots is, 0 for none. `first_pair`: of all of the call's pairs,
        the number of the first one here.
        """
        asked, call = self._asked, self._call
        asked.ids = arrays.topk_ids
        asked.weights = arrays.topk_weights
        asked.slots = slots
        asked.n_ids = n_ids
        asked.first_pair = first_pair
        self._admitted.refused = arrays.refused
        call.experts = layer.table.address
        call.alpha = layer.info.activation_alpha
        call.limit = layer.info.activation_limit
        self._taker.x = arrays.hidden_states
        if self._copy_of_out is None:
            call.out = arrays.out
        else:
            self._commands.set_host_address(self._copy_of_out, arrays.host_out)
        self._commands.enqueue()
