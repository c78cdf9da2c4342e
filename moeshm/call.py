"""One call as the caller holds it: a future that knows its inputs until it has its result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from . import arrays
from ._formats import add_rows
from .arrays import Inputs
from .dtypes import Array, DType, FloatArray, narrow, widen
from .errors import CallError, DeadlineExceeded, InvalidCall, NotReady, WorkerDied
from .link import Link
from .protocol import Message, Reply
from .receivers import GRACE_S, Receiver, too_late
from .stats import CallTimes

#: `(layer, inputs, output array, cause)`: computes elsewhere what the worker did not.
Fallback = Callable[[int, Inputs, Array, WorkerDied | DeadlineExceeded], None]


class CallFuture:
    """The result of a `submit`, now or later.

    The inputs belong to the call until then: a fallback may read them. Made by ExpertClient.
    """

    is_in_turn = True

    __slots__ = (
        "_answered",
        "_bytes_in",
        "_bytes_out",
        "_compute_ns",
        "_error",
        "_fallback",
        "_finishing",
        "_is_finished",
        "_link",
        "_n_parts",
        "_on_received",
        "_output",
        "_pack_ns",
        "_received",
        "_start_ns",
        "_timeout_s",
        "_total",
        "_unpack_ns",
        "_waited_ns",
        "_writing",
        "deadline",
        "inputs",
        "is_done",
        "layer",
        "rows",
        "times",
        "wire",
    )

    def __init__(
        self,
        layer: int,
        inputs: Inputs,
        output: tuple[Any, Array] | None,
        wire: DType,
        deadline: float,
        timeout_s: float,
        fallback: Fallback | None,
        on_received: Callable[[int, int, int, int], None],
    ) -> None:
        self.layer = layer
        self.inputs = inputs
        #: How rows travel.
        self.wire = wire
        self.deadline = deadline
        #: True once nothing more will come from the worker for it.
        self.is_done = False
        #: The tokens that are sent, rising; None for all.
        self.rows: npt.NDArray[np.int64] | None = None
        #: What it took, once the result was taken.
        self.times: CallTimes | None = None
        self._timeout_s = timeout_s
        #: What the caller gets, and the array behind it; made when it is needed.
        self._output = output
        self._fallback = fallback
        self._on_received = on_received
        self._link: Link | None = None
        self._received: Array | None = None
        #: What the only message's rows are added to.
        self._total: FloatArray | None = None
        self._error: CallError | None = None
        self._n_parts = 0
        #: The numbers of the parts that were.
        self._answered: set[int] = set()
        self._bytes_out = self._bytes_in = 0
        self._start_ns = self._pack_ns = 0
        self._compute_ns = self._unpack_ns = self._waited_ns = 0
        self._is_finished = False
        self._finishing = threading.Lock()
        #: Held while rows are written to what is its caller's again once it has failed.
        self._writing = threading.Lock()

    def expect(self, link: Link, n_parts: int, rows: npt.NDArray[np.int64] | None) -> None:
        """What will be on its way: so many parts, which together are these rows, or all."""
        self._link = link
        self._n_parts = n_parts
        self.rows = rows

    def sent(self, start_ns: int, pack_ns: int, n_parts: int, bytes_out: int) -> None:
        """All parts are on their way, since `start_ns` (of time.perf_counter); with none, it is
        done."""
        self._start_ns, self._pack_ns = start_ns, pack_ns
        self._bytes_out = bytes_out
        if n_parts == 0:
            self.is_done = True

    def part(self, rows: slice) -> Receiver:
        """Who receives these of the rows that were sent."""
        return _Part(self, self._buffer()[rows], rows.start)

    def done(self) -> bool:
        """True when `result` need not wait for the worker. Receives nothing by itself."""
        return self.is_done

    def result(self, timeout_s: float | None = None) -> Any:
        """The weighted sum of the selected experts' outputs, like hidden_states.

        Waits for at most `timeout_s`, then NotReady, and until the call's deadline, then
        DeadlineExceeded: the session is given up, unless the worker may be at an earlier call of it
        that has time left. WorkerDied: the worker went away. InvalidCall, WorkerFailed: it said so.
        With a fallback, the first two do not happen.
        """
        if not self.is_done:
            self._wait(timeout_s)
        if not self._is_finished:
            # Of several threads that ask, one unpacks or falls back.
            with self._finishing:
                if not self._is_finished:
                    self._finish()
        if self._error is not None:
            raise self._error
        assert self._output is not None
        return self._output[0]

    def add_to(self, total: FloatArray) -> None:
        """Instead of `result`: add it to `total`, float32 [n_tokens, hidden_size].

        Spares the array of a result that is one of several, and one message's rows every copy: they
        are added where they lie. Waits and raises as `result`; after an error, `total` is as it
        was. Once only, by one thread. InvalidCall: another dtype or shape, or not contiguous.
        """
        wanted = self.inputs.hidden_states.shape
        if total.dtype != np.float32 or total.shape != wanted or not total.flags.carray:
            raise InvalidCall(
                f"total is {total.dtype} {list(total.shape)}; pass a writable, contiguous float32 "
                f"{list(wanted)}"
            )
        if not self.is_done:
            if self._n_parts == 1:
                self._total = total
            self._wait(None)
        if self._error is not None:
            add_rows(total, None, arrays.as_array(self.result()))
        elif self._n_parts:
            if self._received is not None:
                start_ns = time.perf_counter_ns()
                add_rows(total, self.rows, self._received)
                self._unpack_ns += time.perf_counter_ns() - start_ns
            self._report()

    @property
    def whole(self) -> object:
        """As `Receiver.whole`."""
        return self

    def fail(self, error: CallError) -> None:
        """As `Receiver.fail`."""
        with self._writing:
            if not self.is_done:
                self._error = error
                self.is_done = True

    def take(
        self, reply: Reply, record: Message, into: Array | None = None, number: int = 0
    ) -> None:
        """The reply to the part with that number, or the only one; the first error stays."""
        with self._writing:
            if self.is_done:
                # It failed: what it was to write to is its caller's again.
                return
            # Once, also where an interrupt has it taken again.
            if number not in self._answered:
                start_ns = time.perf_counter_ns()
                self._error = self._error or reply.error
                if into is not None:
                    reply.copy_rows(record, into, self.wire)
                elif self._total is None or reply.error is not None:
                    reply.copy_rows(record, self._buffer(), self.wire)
                else:
                    self._add(reply, record, self._total)
                self._answered.add(number)
                self._bytes_in += len(record)
                self._compute_ns += reply.compute_ns
                self._unpack_ns += time.perf_counter_ns() - start_ns
            if len(self._answered) == self._n_parts:
                self.is_done = True

    def _add(self, reply: Reply, record: Message, total: FloatArray) -> None:
        """Add the rows where they lie."""
        rows = reply.rows(record, (self._n_rows, total.shape[1]), self.wire)
        # What was copied there before an interrupt is not to be added, too.
        self._received = None
        try:
            try:
                add_rows(total, self.rows, rows)
            finally:
                # Also when a signal's handler raises right after it: they are added.
                self.is_done = True
        finally:
            # A traceback must not keep a view of the record, which then could not be released.
            del rows

    @property
    def _n_rows(self) -> int:
        """That are sent."""
        return len(self.inputs.hidden_states) if self.rows is None else len(self.rows)

    def _buffer(self) -> Array:
        """Where replies go: the result itself, if they are all of it."""
        if self._received is None:
            inputs = self.inputs
            if self.rows is None and self.wire is inputs.dtype:
                array = self._array()
                # A part's result must not replace what other parts, or the fallback, still read.
                if self._n_parts == 1 or not np.may_share_memory(array, inputs.hidden_states):
                    self._received = array
                    return array
            shape = (self._n_rows, inputs.hidden_states.shape[1])
            self._received = np.empty(shape, self.wire.numpy)
        return self._received

    def _array(self) -> Array:
        """Where the result goes."""
        if self._output is None:
            self._output = arrays.make_output(self.inputs, None)
        return self._output[1]

    def _wait(self, timeout_s: float | None) -> None:
        start_ns, unpacked_ns = time.perf_counter_ns(), self._unpack_ns
        last = deadline = self.deadline + GRACE_S
        if timeout_s is not None:
            deadline = min(last, time.monotonic() + timeout_s)
        link = self._link
        if link is not None and not link.wait(self, deadline):
            if deadline < last:
                raise NotReady(f"no result within {timeout_s} s; the call is still on its way")
            is_held_up = link.is_held_up(self)
            late = too_late(self._timeout_s, is_held_up)
            self.fail(late)
            if self._error is late and not is_held_up:
                link.lose(late)
        # Replies that this thread took in meanwhile are counted as unpacking.
        waited_ns = time.perf_counter_ns() - start_ns - (self._unpack_ns - unpacked_ns)
        self._waited_ns = max(0, waited_ns)

    def _finish(self) -> None:
        """Put the result where the caller looks for it; again, should this be interrupted."""
        error = self._error
        if error is None:
            start_ns = time.perf_counter_ns()
            self._unpack(self._array())
            self._unpack_ns += time.perf_counter_ns() - start_ns
        elif self._fallback is not None and isinstance(error, WorkerDied | DeadlineExceeded):
            self._fallback(self.layer, self.inputs, self._array(), error)
            self._error = None
        self._is_finished = True
        self._report()

    def _report(self) -> None:
        self.times = CallTimes(
            self._n_parts,
            self._bytes_out,
            self._bytes_in,
            self._pack_ns,
            self._waited_ns,
            self._compute_ns,
            self._unpack_ns,
            time.perf_counter_ns() - self._start_ns,
        )
        self._on_received(self._bytes_in, self._waited_ns, self._compute_ns, self._unpack_ns)

    def _unpack(self, array: Array) -> None:
        values = self._received
        if values is None:
            array[...] = 0
            return
        if values is array:
            return
        if self.wire is not self.inputs.dtype:
            values = narrow(widen(values), self.inputs.dtype)
        if self.rows is None:
            np.copyto(array, values)
        else:
            array[...] = 0
            array[self.rows] = values


class _Part:
    """Receives one of the messages that a call was cut into."""

    __slots__ = ("_into", "_number", "deadline", "is_done", "whole")
    is_in_turn = True

    def __init__(self, future: CallFuture, into: Array, number: int) -> None:
        self.deadline = future.deadline
        self.is_done = False
        #: As `Receiver.whole`.
        self.whole = future
        self._into = into
        self._number = number

    def take(self, reply: Reply, record: Message) -> None:
        """As `Receiver.take`."""
        self.whole.take(reply, record, self._into, self._number)
        self.is_done = True

    def fail(self, error: CallError) -> None:
        """As `Receiver.fail`."""
        self.whole.fail(error)
