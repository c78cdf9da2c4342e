"""A call made ready: where its arrays are and its launches, for all calls of that size."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import numpy as np

from ...dtypes import Array, DType, dtype_of, narrow
from ...errors import DeviceError
from .abi import Call, Route
from .choice import Plan, Shape, Size, Step
from .device import Bytes, Device, Module
from .experts import DeviceLayer
from .operands import DeviceArray, Operand
from .workspace import Workspace, lay_out


class Launch(NamedTuple):
    """A step of a plan, compiled."""

    step: Step
    module: Module

    def enqueue(self, call: Call, route: Route) -> None:
        """On the device's stream."""
        step = self.step
        self.module.launch(step.kernel, step.grid, step.block, step.shared_bytes, call, route)


class Job:
    """A call to a layer of some shape, of some size and formats, that only lacks its values.

    `convert`: what comes first where activations in device memory are not in the plan's format. One
    thread at a time may use it, and none once the workspace has been resized.
    """

    def __init__(
        self,
        shape: Shape,
        size: Size,
        plan: Plan,
        out_dtype: DType,
        launches: list[Launch],
        convert: Launch | None,
        workspace: Workspace,
    ) -> None:
        self._plan = plan
        self._launches = launches
        self._convert = convert
        at = self._layout = lay_out(shape, plan, size, out_dtype)
        self._base = base = workspace.address
        self._host_base, host = workspace.host.address, workspace.host.array
        pairs, rows = (size.n_tokens, size.top_k), (size.n_tokens, shape.hidden)
        self._ids = _view(host, at.ids, np.dtype(np.int32), pairs)
        self._weights = _view(host, at.weights, np.dtype(np.float32), pairs)
        x = _view(host, at.x, plan.x_dtype.numpy, rows)
        self._x, self._x_padding = np.split(x, [shape.hidden_size], axis=1)
        out = _view(host, at.out, out_dtype.numpy, rows)
        self._out, self._out_bytes = out[:, : shape.hidden_size], out.nbytes
        self._call = Call(
            inner=base + at.inner,
            partial=base + at.partial,
            n_tokens=size.n_tokens,
            top_k=size.top_k,
            n_slots=size.n_slots,
            x_dtype=plan.x_dtype,
            out_dtype=out_dtype,
        )
        self._route = Route(
            begin=base + at.begin,
            pairs=base + at.pairs,
            n_tiles=base + at.n_tiles,
            tiles=base + at.tiles,
        )

    def run(
        self,
        device: Device,
        layer: DeviceLayer,
        x: Operand,
        ids: Operand,
        weights: Operand,
        out: Operand,
    ) -> None:
        """Compute the call with these values; returns when `out` is written."""
        try:
            self._run(device, layer, x, ids, weights, out)
        except BaseException:
            # As by Ctrl-C: what is on its way still uses what the next call writes.
            with contextlib.suppress(DeviceError):
                device.wait()
            raise

    def _run(
        self,
        device: Device,
        layer: DeviceLayer,
        x: Operand,
        ids: Operand,
        weights: Operand,
        out: Operand,
    ) -> None:
        call, at = self._call, self._layout
        call.experts = layer.table.address
        call.alpha = layer.info.activation_alpha
        call.limit = layer.info.activation_limit
        self._copy_in(device, x, ids, weights)
        call.out = out.address if isinstance(out, DeviceArray) else self._base + at.out
        for launch in self._launches:
            launch.enqueue(call, self._route)
        if isinstance(out, DeviceArray):
            device.wait()
            return
        device.copy_out(self._host_base + at.out, self._base + at.out, self._out_bytes)
        device.wait()
        np.copyto(out, self._out)

    def _copy_in(self, device: Device, x: Operand, ids: Operand, weights: Operand) -> None:
        """What is in the host's memory, with one copy; where everything is goes into the call."""
        call, at, base = self._call, self._layout, self._base
        end = at.ids
        if isinstance(ids, DeviceArray):
            call.ids = ids.address
        else:
            np.copyto(self._ids, ids)
            call.ids, end = base + at.ids, at.weights
        if isinstance(weights, DeviceArray):
            call.weights = weights.address
        else:
            np.copyto(self._weights, weights)
            call.weights, end = base + at.weights, at.x
        call.x = base + at.x
        if not isinstance(x, DeviceArray):
            self._stage_rows(x)
            end = at.out
        elif self._convert is None:
            call.x = x.address
        if end > at.ids:
            device.copy_in(base + at.ids, self._host_base + at.ids, end - at.ids)
        if isinstance(x, DeviceArray) and self._convert is not None:
            before = Call(
                x=x.address,
                out=base + at.x,
                n_tokens=call.n_tokens,
                x_dtype=x.dtype,
                out_dtype=self._plan.x_dtype,
            )
            self._convert.enqueue(before, self._route)

    def _stage_rows(self, x: Array) -> None:
        if dtype_of(x) is self._plan.x_dtype:
            np.copyto(self._x, x)
        else:
            narrow(x, self._plan.x_dtype, out=self._x)
        self._x_padding[...] = 0


def _view(host: Bytes, offset: int, dtype: np.dtype[np.generic], shape: tuple[int, int]) -> Array:
    n_bytes = dtype.itemsize * shape[0] * shape[1]
    return host[offset : offset + n_bytes].view(dtype).reshape(shape)
