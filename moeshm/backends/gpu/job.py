"""A call made ready: where its arrays are and its commands, for all calls of that kind."""

from __future__ import annotations

import contextlib
from ctypes import Structure
from typing import NamedTuple

import numpy as np

from ...dtypes import Array, DType, narrow
from ...errors import DeviceError
from ._launch import Fields
from .abi import Call, Route
from .choice import Plan, Shape, Size, Step
from .device import Bytes, CommandList, Device, Kernel
from .experts import DeviceLayer
from .operands import DeviceArray, Operand, Place, RegisteredArray
from .workspace import Layout, Workspace, lay_out

#: Outputs of up to so many bytes are written into pinned memory by the kernels, across the bus,
#: others are copied there when they are done. On an H100 that made a call of one token 57 us
#: instead of 61.
IN_PLACE_BYTES = 16 << 10


class Places(NamedTuple):
    """Where the arrays of a call are; ids and weights are never REGISTERED."""

    ids: Place
    weights: Place
    x: Place
    out: Place


class Kind(NamedTuple):
    """What calls have in common that one job computes."""

    shape: Shape
    size: Size
    x_dtype: DType
    out_dtype: DType
    places: Places


class Launch(NamedTuple):
    """A step of a plan, and its kernel."""

    step: Step
    kernel: Kernel

    def add_to(
        self,
        commands: CommandList,
        first: Structure,
        second: Structure,
        *,
        overlaps: bool = True,
    ) -> None:
        """To what a job enqueues, with the kernel's arguments."""
        step = self.step
        how = (step.grid, step.block, step.shared_bytes, first, second)
        commands.launch(self.kernel, *how, overlaps=overlaps)


class Staging(NamedTuple):
    """A call's arrays in pinned memory."""

    ids: Array
    weights: Array
    x: Array
    #: What kernels take for values of hidden_size, up to a multiple of 8; None where that is one.
    x_padding: Array | None
    out: Array

    @classmethod
    def of(cls, kind: Kind, x_dtype: DType, at: Layout, host: Bytes) -> Staging:
        """Where the layout says."""
        shape, size = kind.shape, kind.size
        pairs, rows = (size.n_tokens, size.top_k), (size.n_tokens, shape.hidden)
        x = _view(host, at.x, x_dtype.numpy, rows)
        return cls(
            ids=_view(host, at.ids, np.dtype(np.int32), pairs),
            weights=_view(host, at.weights, np.dtype(np.float32), pairs),
            x=x[:, : shape.hidden_size],
            x_padding=x[:, shape.hidden_size :] if shape.hidden > shape.hidden_size else None,
            out=_view(host, at.out, kind.out_dtype.numpy, rows)[:, : shape.hidden_size],
        )

    def put_rows(self, x: Array, narrow_to: DType | None) -> None:
        """Activations, in another format if one is named."""
        if narrow_to is None:
            self.x[...] = x
        else:
            narrow(x, narrow_to, out=self.x)
        if self.x_padding is not None:
            self.x_padding[...] = 0


class Job:
    """A call of some kind that only lacks its values.

    `convert`: what comes first, where activations that the host does not stage are not in the
    plan's format. One thread at a time may use it, and none once the workspace has been resized.
    """

    def __init__(
        self,
        device: Device,
        kind: Kind,
        plan: Plan,
        launches: list[Launch],
        convert: Launch | None,
        workspace: Workspace,
    ) -> None:
        at = lay_out(kind.shape, plan, kind.size, kind.out_dtype)
        base, host = workspace.address, workspace.host
        out_bytes = kind.out_dtype.itemsize * kind.size.n_tokens * kind.shape.hidden
        is_in_place = out_bytes <= IN_PLACE_BYTES
        self._device = device
        self._staging = Staging.of(kind, plan.x_dtype, at, host.array)
        #: The format that activations are staged in, if it is another one than theirs.
        self._narrow_to = None if kind.x_dtype is plan.x_dtype else plan.x_dtype
        self._call, route = structs(kind.size, plan.x_dtype, kind.out_dtype, at, base)
        self._of_layer = Fields(*((self._call, name) for name in ("experts", "alpha", "limit")))
        if is_in_place:
            self._call.out = host.address + at.out
        commands = self._commands = device.command_list()
        if kind.places.x is Place.REGISTERED and convert is None:
            n_bytes = plan.x_dtype.itemsize * kind.size.n_tokens * kind.shape.hidden
            #: The copy of activations from registered memory; None where there is none.
            self._copy_of_x: int | None = commands.copy_in(base + at.x, 0, n_bytes)
        else:
            self._copy_of_x = None
        first, end = _staged(kind, at)
        if first < end:
            commands.copy_in(base + first, host.address + first, end - first)
        #: What takes activations from where they are, if no copy does.
        self._taker = self._call
        if convert is not None:
            self._taker = Call(
                out=base + at.x,
                n_tokens=kind.size.n_tokens,
                x_dtype=kind.x_dtype,
                out_dtype=plan.x_dtype,
            )
            convert.add_to(commands, self._taker, route)
        for launch in launches:
            launch.add_to(commands, self._call, route)
        #: The copy of outputs; None where there is none.
        self._copy_of_out: int | None = None
        if not (kind.places.out is Place.DEVICE or is_in_place):
            self._copy_of_out = commands.copy_out(host.address + at.out, base + at.out, out_bytes)

    def run(
        self, layer: DeviceLayer, x: Operand, ids: Operand, weights: Operand, out: Operand
    ) -> None:
        """Compute the call with these values; returns when `out` is written."""
        try:
            self._take(layer, x, ids, weights, out)
            self._commands.enqueue()
            self._device.wait()
        except BaseException:
            # As by Ctrl-C: what is on its way still uses what the next call writes.
            with contextlib.suppress(DeviceError):
                self._device.wait()
            raise
        if isinstance(out, np.ndarray):
            out[...] = self._staging.out

    def _take(
        self, layer: DeviceLayer, x: Operand, ids: Operand, weights: Operand, out: Operand
    ) -> None:
        """Addresses of what the device reaches go into call and copies, other values are staged."""
        call, staging, info = self._call, self._staging, layer.info
        self._of_layer.set(layer.table.address, info.activation_alpha, info.activation_limit)
        if isinstance(ids, DeviceArray):
            call.ids = ids.address
        else:
            # Not by numpy.copyto, whose call costs more than so few values.
            staging.ids[...] = ids
        if isinstance(weights, DeviceArray):
            call.weights = weights.address
        else:
            staging.weights[...] = weights
        if isinstance(x, DeviceArray):
            self._taker.x = x.address
        elif not isinstance(x, RegisteredArray):
            staging.put_rows(x, self._narrow_to)
        elif self._copy_of_x is None:
            self._taker.x = x.device_address
        else:
            self._commands.set_host_address(self._copy_of_x, x.address)
        if isinstance(out, DeviceArray):
            call.out = out.address
        elif not isinstance(out, RegisteredArray):
            return
        elif self._copy_of_out is None:
            call.out = out.device_address
        else:
            self._commands.set_host_address(self._copy_of_out, out.address)


def structs(
    size: Size, x_dtype: DType, out_dtype: DType, at: Layout, base: int
) -> tuple[Call, Route]:
    """What kernels are called with when all arrays are in the workspace, but for a layer's own."""
    call = Call(
        x=base + at.x,
        ids=base + at.ids,
        weights=base + at.weights,
        out=base + at.out,
        inner=base + at.inner,
        partial=base + at.partial,
        n_tokens=size.n_tokens,
        top_k=size.top_k,
        n_slots=size.n_slots,
        x_dtype=x_dtype,
        out_dtype=out_dtype,
    )
    route = Route(
        begin=base + at.begin,
        pairs=base + at.pairs,
        n_tiles=base + at.n_tiles,
        tiles=base + at.tiles,
    )
    return call, route


def _staged(kind: Kind, at: Layout) -> tuple[int, int]:
    """Where the inputs that the host stages begin and end: one copy takes them all."""
    parts = zip(kind.places, (at.ids, at.weights, at.x), (at.weights, at.x, at.out), strict=False)
    staged = [(begin, end) for place, begin, end in parts if place is Place.HOST]
    return (staged[0][0], staged[-1][1]) if staged else (0, 0)


def _view(host: Bytes, offset: int, dtype: np.dtype[np.generic], shape: tuple[int, int]) -> Array:
    n_bytes = dtype.itemsize * shape[0] * shape[1]
    return host[offset : offset + n_bytes].view(dtype).reshape(shape)
