"""The engine's side of one worker: hand over a layer's activations, get the experts' sum back."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, overload

from . import arrays, orders, process, settings, windows
from ._inputs import used_rows
from .arrays import Inputs
from .backends import Backend
from .call import CallFuture
from .choice import MAX_TIMEOUT_S
from .device_arrays import is_device_array
from .device_future import DeviceFuture
from .dtypes import Array, DType
from .engine_device import Engine, EngineDevice
from .errors import (
    DeadlineExceeded,
    ForkedProcess,
    InvalidCall,
    RingFull,
    WorkerDied,
)
from .fallback import Fallback
from .handshake import SlabWish
from .held import HOLD_TIMEOUT_S, HeldView
from .layers import LayerInfo
from .link import Link
from .protocol import MAX_TOKENS
from .sessions import Opened, Sessions
from .stats import ClientStats, StatsCounter


class ExpertClient:
    """A worker as the engine sees it; made by `connect` or `spawn_worker`.

    Any thread may call it, and several calls may be on their way at a time. A lost worker is
    looked for again by the next call. It belongs to the process that opened it: after a fork, the
    child gets ForkedProcess.
    """

    def __init__(
        self,
        open_session: Callable[[SlabWish], Opened],
        on_close: Callable[[], None],
        wire_dtype: str,
        fallback: Backend | None,
        batch_capacity: int | None = None,
        engine: EngineDevice | None = None,
    ) -> None:
        self._pid = os.getpid()
        self._wire = None if wire_dtype == "auto" else DType.parse(wire_dtype)
        self._timeout_s = settings.current().timeout_s
        self._counter = StatsCounter()
        self._engine = Engine(engine, self._counter, fallback is not None)
        capacity = batch_capacity or settings.current().batch_capacity
        self._sessions = Sessions(open_session, on_close, capacity, self._engine, self._counter)
        #: What the worker held for this client when it was opened, as the view that calls are of
        #: when they name none.
        self.view = self._sessions.first_view
        #: The same, by layer number.
        self.layers: Mapping[int, LayerInfo] = self.view.layers
        self._fallback: Fallback | None = None
        try:
            if fallback is not None:
                self._fallback = Fallback(fallback, self.layers, self._counter)
        except BaseException:
            self.close()
            raise

    @property
    def _link(self) -> Link:
        """The newest session."""
        return self._sessions.link

    @property
    def transport(self) -> str:
        """How activations travel in this session: "shared" or "stream"."""
        return self._link.session.welcome.transport

    @property
    def slab(self) -> str | None:
        """Where arrays on the engine's GPU go: "device", memory of the worker's GPU, or "pinned",
        of the host's; None for none."""
        offer = self._link.session.welcome.slab
        return None if offer is None or self._link.device_calls is None else offer.kind

    @property
    def engine_device(self) -> str | None:
        """The GPU whose arrays calls may hold, like "cuda:0"; None where they cannot go."""
        return self._engine.name if self.slab is not None else None

    @property
    def worker_pid(self) -> int:
        """The worker's process id; that of the last one, when it was lost."""
        return int(self._link.session.control.peer_pid)

    @property
    def wire_dtype(self) -> DType | None:
        """How rows travel; None for as the caller holds them."""
        return self._wire

    @property
    def has_fallback(self) -> bool:
        """True when calls that a lost worker leaves are computed in this process."""
        return self._fallback is not None

    @property
    def max_tokens(self) -> int:
        """Most tokens in one message; longer calls are cut."""
        return self._link.max_tokens

    @property
    def buffer_bytes(self) -> int:
        """Bytes that may be on their way to the worker before a sender waits."""
        return self._link.session.transport.buffer_bytes

    def compute(
        self,
        layer: int,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        *,
        out: Any = None,
        timeout_s: float | None = None,
        global_ids: bool = False,
        view: HeldView | None = None,
    ) -> Any:
        """`submit(…).result()`, in less time when no other thread waits for this worker; of arrays
        on a GPU `submit(…).wait()`."""
        start_ns = time.perf_counter_ns()
        timeout_s = self._check_timeout(timeout_s)
        view = view or self.view
        if is_device_array(hidden_states):
            given = hidden_states, topk_ids, topk_weights, out
            return self._submit_on_device(view, layer, given, timeout_s, global_ids).wait()
        link = self._sessions.link
        number = link.views.of(view)
        inputs = self._check(view, layer, hidden_states, topk_ids, topk_weights, global_ids)
        if not self._is_plain(inputs, link):
            made = None if out is None else arrays.make_output(inputs, out)
            return _result_of(self._submit(view, layer, inputs, made, timeout_s, start_ns))
        output, array = made = arrays.make_output(inputs, out)
        try:
            answer = link.call(
                layer,
                inputs.hidden_states,
                inputs.topk_ids,
                inputs.topk_weights,
                inputs.dtype,
                number,
                array,
                timeout_s,
            )
        except (WorkerDied, DeadlineExceeded) as error:
            if self._fallback is None:
                raise
            self._fallback.compute(view, layer, inputs, array, error)
            return output
        if answer is None:
            return _result_of(self._submit(view, layer, inputs, made, timeout_s, start_ns))
        self._counter.answered(answer, len(array), start_ns)
        if answer.error is None:
            return output
        if self._fallback is None or not isinstance(answer.error, DeadlineExceeded):
            raise answer.error
        self._fallback.compute(view, layer, inputs, array, answer.error)
        return output

    @overload
    def submit(
        self,
        layer: int,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        *,
        out: Any = ...,
        timeout_s: float | None = ...,
        global_ids: bool = ...,
        view: HeldView | None = ...,
        wire_dtype: DType | None = ...,
        slice_tokens: int | None = ...,
        stream: None = ...,
    ) -> CallFuture: ...

    @overload
    def submit(
        self,
        layer: int,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        *,
        out: Any = ...,
        timeout_s: float | None = ...,
        global_ids: bool = ...,
        view: HeldView | None = ...,
        slice_tokens: int | None = ...,
        stream: object,
    ) -> DeviceFuture: ...

    def submit(
        self,
        layer: int,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        *,
        out: Any = None,
        timeout_s: float | None = None,
        global_ids: bool = False,
        view: HeldView | None = None,
        wire_dtype: DType | None = None,
        slice_tokens: int | None = None,
        stream: Any = None,
    ) -> CallFuture | DeviceFuture:
        """Send a layer's call; `result()` gives the weighted sum of the selected experts' outputs.

        NumPy arrays or CPU tensors. `hidden_states`: [n_tokens, hidden_size] float32, float16 or
        bfloat16 (uint16 bit patterns in NumPy). `topk_ids`: [n_tokens, top_k] integers, -1 for an
        empty slot; local ids (rows of `layers[layer].experts`), or the model's with
        `global_ids`. `topk_weights`: [n_tokens, top_k]. `out`: like hidden_states, to write the
        result into; by default a new one. `timeout_s`: until the deadline, by default
        MOESHM_TIMEOUT_S. `view`: what `hold` gave, whose layers and local ids these are, instead
        of the client's `layers`. `wire_dtype`: how rows travel, by default as the client was told.
        `slice_tokens`: a message for each so many tokens, by default as few as the worker takes;
        while it computes one, the next is on its way.

        With `stream`, arrays on the engine's GPU (CuPy's, torch's; ids int32 or int64): everything
        is enqueued on that stream of CuPy's or torch's, and nothing waits for it; the result is for
        what comes later on the stream. Rows travel as they are, and calls of all streams begin in
        the order of their submits. A fallback computes calls on their way when a worker is lost; a
        later one waits for a worker, and without one is WorkerDied. RingFull: no room until the
        deadline. DeviceError: the GPU refused it.

        InvalidCall: shapes, ids, dtype or layer are not allowed; nothing was sent. WorkerDied,
        DeadlineExceeded: no worker, and no fallback. ForkedProcess, ClientClosed.
        """
        start_ns = time.perf_counter_ns()
        timeout_s = self._check_timeout(timeout_s)
        if slice_tokens is not None and slice_tokens < 1:
            raise InvalidCall(f"slice_tokens={slice_tokens}; it must be at least 1")
        view = view or self.view
        if stream is not None or is_device_array(hidden_states):
            if wire_dtype is not None:
                raise InvalidCall(f"wire_dtype={wire_dtype}; arrays on a GPU travel as they are")
            if stream is None:
                raise InvalidCall(
                    "hidden_states is on a GPU; pass the stream that the call goes on, as "
                    "stream=torch.cuda.current_stream()"
                )
            given = hidden_states, topk_ids, topk_weights, out
            return self._submit_on_device(
                view, layer, given, timeout_s, global_ids, stream, slice_tokens
            )
        self._link.views.of(view)
        inputs = self._check(view, layer, hidden_states, topk_ids, topk_weights, global_ids)
        made = None if out is None else arrays.make_output(inputs, out)
        return self._submit(
            view, layer, inputs, made, timeout_s, start_ns, wire_dtype, slice_tokens
        )

    def hold(
        self, experts: Mapping[int, Sequence[int]], *, timeout_s: float | None = None
    ) -> HeldView:
        """Let the worker hold these experts, by layer the model's ids in local order; a view for
        `submit` and `compute`, once it has loaded those that it lacked.

        Calls of other threads go on meanwhile, and calls of other views always. A client that
        connects anew has its views held again. `timeout_s`: by default 600.

        InvalidCall: the worker, or the fallback, cannot hold them, or the worker takes no orders.
        WorkerFailed: loading failed. DeadlineExceeded: it takes longer. WorkerDied, ForkedProcess,
        ClientClosed. Nothing is held then.
        """
        self._check_process()
        timeout_s = HOLD_TIMEOUT_S if timeout_s is None else self._check_timeout(timeout_s)
        deadline = time.monotonic() + timeout_s
        wanted = orders.check_experts(experts)
        if self._fallback is not None:
            self._fallback.check_experts(wanted)
        while True:
            link = self._sessions.live(deadline, self.has_fallback)
            number, layers = link.views.hold(wanted, max(0.0, deadline - time.monotonic()))
            try:
                if self._fallback is not None:
                    self._fallback.check(layers)
                view = HeldView(layers)
                # Another thread may have connected anew: what the old session holds is in vain.
                if self._sessions.views.add(view, number, link, lambda: self._link):
                    return view
            except BaseException:
                link.views.release_number(number)
                raise

    def offer(self, view: HeldView) -> None:
        """Let the worker begin new sessions with this view's experts, instead of those that it
        was started with or that were offered last; they stay for that also when the view is
        released. A worker that cannot load takes no notice.

        A client that connects anew offers its last one again, unless it was released. InvalidCall:
        the view was released, or is another client's.
        """
        self._check_process()
        self._sessions.views.offer(view, lambda: self._link)

    def release(self, view: HeldView) -> None:
        """Let the worker drop the experts that no other view lists; the view, which may be the
        client's own, cannot be called any more. Results of earlier calls still come.

        InvalidCall: it was released before, or is another client's.
        """
        self._check_process()
        self._sessions.views.discard(view)
        self._link.views.release(view)

    def stats(self) -> ClientStats:
        """Counts and times since the client was opened."""
        return self._counter.snapshot()

    def close(self) -> None:
        """End the session, and the worker if it was spawned; calls on their way get ClientClosed.

        Again, it does nothing; in a forked child it leaves the parent's session alone.
        """
        if os.getpid() == self._pid:
            self._sessions.close()

    def __enter__(self) -> ExpertClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- sending ------------------------------------------------------------------------

    def _check(
        self,
        view: HeldView,
        layer: int,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        global_ids: bool,
    ) -> Inputs:
        info = self._info(view, layer)
        return arrays.check(layer, info, hidden_states, topk_ids, topk_weights, global_ids)

    def _info(self, view: HeldView, layer: int) -> LayerInfo:
        self._check_process()
        info = view.layers.get(layer)
        if info is None:
            raise InvalidCall(
                f"layer {layer} is not on this worker; it holds {sorted(view.layers)}"
            )
        return info

    def _check_process(self) -> None:
        if process.own_pid != self._pid:
            raise ForkedProcess(
                f"this client belongs to process {self._pid}; connect anew in {process.own_pid}"
            )

    def _check_timeout(self, timeout_s: float | None) -> float:
        if timeout_s is None:
            return self._timeout_s
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise InvalidCall(f"timeout_s={timeout_s}; it must lie in 0..{MAX_TIMEOUT_S:g}")
        return timeout_s

    def _is_plain(self, inputs: Inputs, link: Link) -> bool:
        """Goes as it is, in one message, to a worker that is there."""
        return (
            not inputs.n_empty
            and (self._wire is None or self._wire is inputs.dtype)
            and 0 < len(inputs.topk_ids) <= link.max_tokens
            and link.loss is None
        )

    def _submit_on_device(
        self,
        view: HeldView,
        layer: int,
        arrays_given: tuple[Any, Any, Any, Any],
        timeout_s: float,
        are_global: bool,
        stream: Any = None,
        slice_tokens: int | None = None,
    ) -> DeviceFuture:
        """Of hidden_states, topk_ids, topk_weights, out; `stream`: None for the current one."""
        given = self._engine.check(layer, self._info(view, layer), *arrays_given, stream)
        # The fallback takes over calls that are on their way, and this one is not yet.
        deadline = time.monotonic() + timeout_s
        return self._engine.submit(
            given,
            self._sessions.live(deadline, can_fall_back=False),
            view,
            deadline,
            timeout_s,
            are_global,
            slice_tokens or MAX_TOKENS,
            self._fallback,
        )

    def _submit(
        self,
        view: HeldView,
        layer: int,
        inputs: Inputs,
        output: tuple[Any, Array] | None,
        timeout_s: float,
        start_ns: int,
        wire: DType | None = None,
        slice_tokens: int | None = None,
    ) -> CallFuture:
        future = CallFuture(
            layer,
            inputs,
            output,
            wire or self._wire or inputs.dtype,
            time.monotonic() + timeout_s,
            timeout_s,
            None if self._fallback is None else functools.partial(self._fallback.compute, view),
            self._counter.received,
        )
        try:
            self._send(future, view, slice_tokens or MAX_TOKENS, start_ns)
        except WorkerDied as error:
            if self._fallback is None:
                raise
            future.fail(error)
        except BaseException:
            # Parts may have left: after an interrupt nothing may get to `out`.
            future.fail(WorkerDied("the call was interrupted as it was sent"))
            raise
        return future

    def _send(self, future: CallFuture, view: HeldView, slice_tokens: int, start_ns: int) -> None:
        """Cut the call as wished and as the worker allows, and send the parts."""
        inputs = future.inputs
        n_tokens = len(inputs.topk_ids)
        if inputs.n_empty == n_tokens:
            future.sent(start_ns, 0, 0, 0)
            self._counter.sent(0, 0, 0, time.perf_counter_ns() - start_ns)
            return
        link = self._sessions.link
        if link.loss is not None:
            lost_ns = time.perf_counter_ns()
            link = self._sessions.live(future.deadline, self.has_fallback)
            # To start a worker anew is no part of packing.
            start_ns += time.perf_counter_ns() - lost_ns
        number = link.views.of(view)
        rows = used_rows(inputs.topk_ids) if inputs.n_empty else None
        parts = windows.cut(n_tokens, rows, slice_tokens, link.max_tokens)
        future.expect(link, len(parts), rows)
        try:
            n_bytes = sum(
                self._send_part(link, number, future, part, len(parts) == 1) for part in parts
            )
        except RingFull as error:
            late = DeadlineExceeded(f"the worker took no call before the deadline: {error}")
            future.fail(late)
            if not link.is_held_up(future):
                link.lose(late)
            if self._fallback is None:
                raise late from error
            n_bytes = 0
        pack_ns = time.perf_counter_ns() - start_ns
        future.sent(start_ns, pack_ns, len(parts), n_bytes)
        self._counter.sent(len(parts), n_tokens - inputs.n_empty, n_bytes, pack_ns)

    def _send_part(
        self, link: Link, view: int, future: CallFuture, part: slice, is_whole: bool
    ) -> int:
        inputs, rows = future.inputs, future.rows
        hidden, ids, weights = inputs.hidden_states, inputs.topk_ids, inputs.topk_weights
        if rows is not None:
            rows = rows[part]
        elif not is_whole:
            hidden, ids, weights = hidden[part], ids[part], weights[part]
        return link.send(
            future if is_whole else future.part(part),
            future.layer,
            hidden,
            ids,
            weights,
            future.wire,
            view,
            rows,
        )


def _result_of(future: CallFuture) -> Any:
    """Of one that nobody else has."""
    try:
        return future.result()
    except BaseException:
        # After an interrupt its reply must not get to `out`, which is the caller's again.
        future.fail(WorkerDied("the call was interrupted"))
        raise
