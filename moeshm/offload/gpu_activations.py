"""What one forward is given, and the sum that it gives back, on the engine's GPU.

Rows are chosen by ids, and so these are brought to the host, with the weights; that waits for the
caller's stream, once a forward. Afterwards the rows are known to be there, for every stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np

from .. import arrays, device_arrays
from .._inputs import used_rows
from ..arrays import Inputs
from ..backends import Backend, Ids
from ..call import CallFuture
from ..client import ExpertClient
from ..device_future import DeviceFuture
from ..dtypes import DType, FloatArray, widen
from ..engine_device import EngineDevice
from ..errors import DeadlineExceeded, DeviceError, DeviceLost, InvalidCall, NotReady, RingFull
from ..held import HeldView
from ..layers import LayerInfo
from ..policy import SLABS, Choice
from ..stats import CallTimes
from . import gpu_lanes
from .activations import Pending, WayLost, compute, submit_rows
from .gpu_lanes import Lane, Term


class _Unfinished(NamedTuple):
    """A call whose forward is over, and whose stream has not passed it."""

    future: DeviceFuture
    #: What it reads and writes.
    arrays: tuple[Any, ...]
    #: That it is on, if that was lent.
    lane: Lane | None


class EngineGpu:
    """The engine's GPU for one offload: streams for what goes beside the callers' own.

    DeviceError: it is not there.
    """

    def __init__(self, engine: EngineDevice) -> None:
        self.engine = engine
        #: For what no caller asks for.
        self._own, self._bus_id = gpu_lanes.open_gpu(engine)
        self._idle: list[Lane] = []
        self._unfinished: list[_Unfinished] = []
        self._lock = threading.Lock()

    def check(
        self,
        layer: int,
        info: LayerInfo,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        stream: Any,
        on_brought: Callable[[], None],
    ) -> GpuActivations:
        """The arrays of a forward; waits for their stream. InvalidCall.

        `on_brought` is told if all the rows have to be brought to the host.
        """
        given = device_arrays.check_device(
            layer, info, hidden_states, topk_ids, topk_weights, self.engine.number
        )
        lane = gpu_lanes.lane_of(hidden_states, stream, self.engine)
        if lane.is_capturing():
            raise InvalidCall(
                "the stream is being captured into a graph, and rows are chosen by the host; leave "
                "the forward out of the graph"
            )
        for name, array in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            if not lane.holds(array):
                raise InvalidCall(
                    f"{name} is {_kind_of(array)}, and hidden_states {_kind_of(hidden_states)}; "
                    "pass all arrays as one library's"
                )
        ids = lane.fetch(topk_ids)
        weights = widen(lane.fetch(topk_weights))
        # Where the rows are brought to, if they are; until then no page of it is touched.
        buffer = np.empty((given.n_tokens, given.hidden_size), given.dtype.numpy)
        inputs = arrays.check(layer, info, buffer, ids, weights, False)
        return GpuActivations(self, lane, hidden_states, inputs, on_brought)

    def probe(self, inputs: Inputs) -> GpuActivations:
        """These of the host's, as a forward would have them; one at a time."""
        lane = self._own
        hidden_states = lane.put(inputs.hidden_states, inputs.dtype)
        lane.fetch(hidden_states)
        return GpuActivations(self, lane, hidden_states, inputs, lambda: None)

    def computes(self, backend: Backend) -> bool:
        """Whether the backend is on this GPU: then it takes arrays there in place."""
        # Who has no GPU need not load it.
        from ..backends.gpu.backend import GpuBackend

        if not isinstance(backend, GpuBackend) or not self._bus_id:
            return False
        return (backend.vendor, backend.bus_id) == (self.engine.vendor, self._bus_id)

    def lend(self, beside: Lane) -> Lane:
        """A lane of the same library, on a stream that nobody uses."""
        with self._lock:
            self._forget_finished()
            for lane in self._idle:
                if type(lane) is type(beside):
                    self._idle.remove(lane)
                    return lane
        return beside.beside()

    def give_back(self, lanes: list[Lane]) -> None:
        """They are for others again."""
        with self._lock:
            self._idle += lanes

    def keep(self, call: _Unfinished) -> None:
        """Its arrays and its lane, until its stream has passed it."""
        with self._lock:
            self._forget_finished()
            self._unfinished.append(call)

    def _forget_finished(self) -> None:
        for call in [each for each in self._unfinished if each.future.done()]:
            self._unfinished.remove(call)
            if call.lane is not None:
                self._idle.append(call.lane)


class GpuActivations:
    """`Activations` on the engine's GPU."""

    on_gpu = True

    def __init__(
        self,
        gpu: EngineGpu,
        lane: Lane,
        hidden_states: Any,
        inputs: Inputs,
        on_brought: Callable[[], None],
    ) -> None:
        self.topk_ids = inputs.topk_ids
        self.dtype = inputs.dtype
        self._gpu = gpu
        #: The caller's stream, and others for calls of this forward.
        self._lane = lane
        self._lent: list[Lane] = []
        self._hidden_states = hidden_states
        #: Its rows were not brought yet.
        self._inputs = inputs
        self._shape: tuple[int, int] = (len(inputs.hidden_states), inputs.hidden_states.shape[1])
        self._is_brought = False
        self._on_brought = on_brought
        self._has_call = False
        self._calls: list[_Unfinished] = []
        #: Of those that are on the host still, what `add` was given.
        self._terms: list[Term | FloatArray] = []

    def inputs(self) -> Inputs:
        """As `Activations.inputs`."""
        if not self._is_brought:
            # The caller's stream may be waiting for a worker.
            lane = self._gpu.lend(self._lane)
            try:
                lane.fetch(self._hidden_states, self._inputs.hidden_states)
            finally:
                self._gpu.give_back([lane])
            self._is_brought = True
            self._on_brought()
        return self._inputs

    def submit(
        self,
        client: ExpertClient,
        layer: int,
        local_ids: Ids,
        choice: Choice,
        view: HeldView,
        timeout_s: float | None,
    ) -> Pending:
        """As `Activations.submit`."""
        start_ns = time.perf_counter_ns()
        if choice.transport in SLABS:
            return self._submit_in_slab(client, layer, local_ids, choice, view, timeout_s, start_ns)
        inputs = self.inputs()
        brought_ns = time.perf_counter_ns() - start_ns
        future = submit_rows(client, layer, inputs, local_ids, choice, view, timeout_s)
        return _Brought(future, self._lane, self.dtype, start_ns, brought_ns)

    def take(self, pending: Any) -> None:
        """As `Activations.take`."""
        self._terms.append(pending.take())

    def run(self, backend: Backend, layer: int, local_ids: Ids) -> None:
        """As `Activations.run`; in place, if it is on this GPU, where it has its own stream."""
        if not self._gpu.computes(backend):
            self.add(compute(backend, layer, self.inputs(), local_ids))
            return
        shape = self._shape
        # Not of the caller's stream: its other threads' work may still use what it gets there.
        lane = self._lend()
        out = lane.empty(shape, DType.F32)
        # The backend's stream waits for none.
        lane.wait()
        address_of = lane.address_of
        rows: Any = _Ready(address_of(self._hidden_states), shape, self.dtype)
        written: Any = _Ready(address_of(out), shape, DType.F32)
        backend.ffn(layer, rows, local_ids, self._inputs.topk_weights, written)
        self._terms.append(Term(None, out, True))

    def add(self, part: FloatArray) -> None:
        """As `Activations.add`."""
        # Put there by `result`: now the caller's stream may be waiting for a worker.
        self._terms.append(part)

    def result(self) -> Any:
        """As `Activations.result`; what is enqueued on the caller's stream finds it there."""
        terms = [
            each if isinstance(each, Term) else Term(None, self._lane.put(each))
            for each in self._terms
        ]
        return self._lane.add_up(self._shape, self.dtype, terms)

    def close(self) -> None:
        """As `Activations.close`; lanes are for others after what is enqueued by now, or once a
        call that nobody waits for has left them."""
        for lane in self._lent:
            lane.follow(self._lane)
        for call in self._calls:
            if not call.future.done():
                self._gpu.keep(call)
                if call.lane is not None:
                    self._lent.remove(call.lane)
        self._gpu.give_back(self._lent)
        self._lent, self._calls = [], []

    def _lend(self) -> Lane:
        """A lane, until `close`."""
        lane = self._gpu.lend(self._lane)
        self._lent.append(lane)
        return lane

    def _submit_in_slab(
        self,
        client: ExpertClient,
        layer: int,
        local_ids: Ids,
        choice: Choice,
        view: HeldView,
        timeout_s: float | None,
        start_ns: int,
    ) -> Pending:
        # Of several workers each has a stream: what comes behind a call waits for its result.
        is_lent, self._has_call = self._has_call, True
        lane = self._lend() if is_lent else self._lane
        hidden_states, weights = self._hidden_states, self._inputs.topk_weights
        used, rows = used_rows(local_ids), None
        if len(used) < len(local_ids):
            rows = lane.put(used)
            hidden_states = lane.take(hidden_states, rows)
            local_ids, weights = local_ids[used], weights[used]
        shape = len(used), self._shape[1]
        out = lane.empty(shape, self.dtype)
        ids_there, weights_there = lane.put(local_ids), lane.put(weights)
        try:
            future = client.submit(
                layer,
                hidden_states,
                ids_there,
                weights_there,
                out=out,
                timeout_s=timeout_s,
                slice_tokens=choice.slice_tokens,
                view=view,
                stream=lane.stream,
            )
        except (RingFull, DeviceError, InvalidCall) as error:
            # Its words alone: its frames hold on to the session.
            loss = _loss_of(error, client, choice.transport)
            if loss is None:
                raise
        else:
            arrays_there = hidden_states, ids_there, weights_there, out, rows
            self._calls.append(_Unfinished(future, arrays_there, lane if is_lent else None))
            if client.slab == choice.transport:
                out_bytes = shape[0] * shape[1] * self.dtype.itemsize
                return _InSlab(future, Term(rows, out, is_lent), out_bytes, start_ns)
            loss = _other_slab(client)
        raise loss


def _loss_of(error: Exception, client: ExpertClient, way: str) -> WayLost | DeadlineExceeded | None:
    """What it means for that way to the worker; None where it is no loss of a way."""
    if isinstance(error, RingFull):
        return DeadlineExceeded(str(error))
    if isinstance(error, InvalidCall):
        return None if client.slab == way else _other_slab(client)
    return None if isinstance(error, DeviceLost) else WayLost(str(error))


def _other_slab(client: ExpertClient) -> WayLost:
    """It was lost, and found again with less."""
    why = "; ".join(client.stats().stepped_down)
    return WayLost(f"the client's slab is {client.slab or 'none'} now" + (why and f": {why}"))


def _kind_of(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


class _Ready:
    """An array on the GPU for whoever uses it there, and need not wait for any stream."""

    def __init__(self, address: int, shape: tuple[int, int], dtype: DType) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": dtype.numpy.str,
            "data": (address, False),
            "stream": None,
            "version": 3,
        }


class _InSlab:
    """A worker's part whose rows travel in a slab."""

    times: CallTimes | None = None

    def __init__(self, future: DeviceFuture, term: Term, out_bytes: int, start_ns: int) -> None:
        self._future = future
        self._term = term
        self._out_bytes = out_bytes
        self._start_ns = start_ns
        self._pack_ns = time.perf_counter_ns() - start_ns

    def take(self) -> Term:
        """Once its stream has passed it, of which other streams then need not know.

        DeadlineExceeded: it has not by the call's deadline, as other calls hold it up.
        """
        future, begun_ns = self._future, time.perf_counter_ns()
        # To see that takes longer than the shortest wait that teaches anything of the worker.
        was_done = future.done()
        try:
            future.wait(max(0.0, future.deadline - time.monotonic()))
        except NotReady:
            late = f"no output in the slab after {future.timeout_s:g} s; allow more (timeout_s)"
        else:
            now_ns = time.perf_counter_ns()
            self.times = CallTimes(
                future.n_parts,
                future.bytes_out,
                self._out_bytes,
                self._pack_ns,
                0 if was_done else now_ns - begun_ns,
                0,
                0,
                now_ns - self._start_ns,
            )
            return self._term
        raise DeadlineExceeded(late)


class _Brought:
    """A worker's part whose rows travel in the host's memory."""

    times: CallTimes | None = None

    def __init__(
        self, future: CallFuture, lane: Lane, dtype: DType, start_ns: int, brought_ns: int
    ) -> None:
        self._future = future
        self._lane = lane
        self._dtype = dtype
        self._start_ns = start_ns
        self._brought_ns = brought_ns

    def take(self) -> Term:
        """Put its result on the GPU: what that takes is a part of its way."""
        result = self._future.result()
        begun_ns = time.perf_counter_ns()
        values = self._lane.put(result, self._dtype)
        now_ns = time.perf_counter_ns()
        taken = self._future.times
        assert taken is not None
        self.times = msgspec.structs.replace(
            taken,
            pack_ns=taken.pack_ns + self._brought_ns,
            unpack_ns=taken.unpack_ns + now_ns - begun_ns,
            elapsed_ns=now_ns - self._start_ns,
        )
        return Term(None, values)
