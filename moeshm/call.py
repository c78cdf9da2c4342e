"""One call as the caller holds it: a future that knows its inputs until it has its result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Inputs
from .dtypes import Array, DType, narrow, widen
from .errors import CallError, DeadlineExceeded, NotReady, WorkerDied
from .link import Link, Receiver, too_late
from .protocol import Message, Reply

#: `(layer, inputs, output array, cause)`: computes elsewhere what the worker did not.
Fallback = Callable[[int, Inputs, Array, WorkerDied | DeadlineExceeded], None]


class CallFuture:
    """The result of a `submit`, now or later.

    The inputs belong to the call until then: a fallback may read them. Made by ExpertClient.
    """

    __slots__ = (
        "_array",
        "_bytes_in",
        "_compute_ns",
        "_error",
        "_fallback",
        "_finishing",
        "_is_finished",
        "_link",
        "_n_open",
        "_on_received",
        "_output",
        "_received",
        "_timeout_s",
        "_unpack_ns",
        "_waited_ns",
        "_wire",
        "deadline",
        "inputs",
        "is_done",
        "layer",
        "rows",
    )

    def __init__(
        self,
        layer: int,
        inputs: Inputs,
        output: Any,
        array: Array,
        wire: DType,
        deadline: float,
        timeout_s: float,
        fallback: Fallback | None,
        on_received: Callable[[int, int, int, int], None],
    ) -> None:
        self.layer = layer
        self.inputs = inputs
        self.deadline = deadline
        #: True once nothing more will come from the worker for it.
        self.is_done = False
        self.rows: npt.NDArray[np.intp] | None = None
        self._timeout_s = timeout_s
        self._output = output
        self._array = array
        self._fallback = fallback
        self._on_received = on_received
        self._link: Link | None = None
        self._wire = wire
        self._received = array
        self._error: CallError | None = None
        self._n_open = 0
        self._bytes_in = self._compute_ns = self._unpack_ns = self._waited_ns = 0
        self._is_finished = False
        self._finishing = threading.Lock()

    def expect(self, link: Link | None, n_parts: int, rows: npt.NDArray[np.intp] | None) -> None:
        """What is on its way: so many parts, which together are these rows, or all."""
        self._link = link
        self._n_open = n_parts
        self.is_done = n_parts == 0
        self.rows = rows
        if (
            rows is not None
            or self._wire is not self.inputs.dtype
            # A part's result must not replace what other parts, or the fallback, still read.
            or (n_parts > 1 and np.may_share_memory(self._array, self.inputs.hidden_states))
        ):
            shape = (len(self._array) if rows is None else len(rows), self._array.shape[1])
            self._received = np.empty(shape, self._wire.numpy)

    def part(self, rows: slice) -> Receiver:
        """Who receives these of the rows that were sent."""
        return _Part(self, self._received[rows])

    def done(self) -> bool:
        """True when `result` need not wait for the worker. Receives nothing by itself."""
        return self.is_done

    def result(self, timeout_s: float | None = None) -> Any:
        """The weighted sum of the selected experts' outputs, like hidden_states.

        Waits for at most `timeout_s`, then NotReady, and until the call's deadline, then
        DeadlineExceeded (the session is given up). WorkerDied: the worker went away. InvalidCall,
        WorkerFailed: it said so. With a fallback, the first two do not happen.
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
        return self._output

    def fail(self, error: CallError) -> None:
        """As `Receiver.fail`."""
        if not self.is_done:
            self._error = error
            self.is_done = True

    def take(self, reply: Reply, record: Message, into: Array | None = None) -> None:
        """One part's reply, or the only one; the first error of several stays."""
        if into is None:
            into = self._received
        start_ns = time.perf_counter_ns()
        self._error = self._error or reply.error
        reply.copy_rows(record, into, self._wire)
        self._bytes_in += len(record)
        self._compute_ns += reply.compute_ns
        self._unpack_ns += time.perf_counter_ns() - start_ns
        self._n_open -= 1
        if self._n_open == 0:
            self.is_done = True

    def _wait(self, timeout_s: float | None) -> None:
        start_ns = time.perf_counter_ns()
        deadline = self.deadline
        if timeout_s is not None:
            deadline = min(deadline, time.monotonic() + timeout_s)
        link = self._link
        if link is not None and not link.wait(self, deadline):
            if deadline < self.deadline:
                raise NotReady(f"no result within {timeout_s} s; the call is still on its way")
            late = too_late(self._timeout_s)
            self.fail(late)
            link.lose(late)
        self._waited_ns = time.perf_counter_ns() - start_ns

    def _finish(self) -> None:
        """Put the result where the caller looks for it; again, should this be interrupted."""
        error = self._error
        if error is None:
            if self._received is not self._array:
                self._unpack()
        elif self._fallback is not None and isinstance(error, WorkerDied | DeadlineExceeded):
            self._fallback(self.layer, self.inputs, self._array, error)
            self._error = None
        self._is_finished = True
        # Replies that this call took in while it waited are part of both times.
        waited_ns = max(0, self._waited_ns - self._unpack_ns)
        self._on_received(self._bytes_in, waited_ns, self._compute_ns, self._unpack_ns)

    def _unpack(self) -> None:
        values = self._received
        if self._wire is not self.inputs.dtype:
            values = narrow(widen(values), self.inputs.dtype)
        if self.rows is None:
            np.copyto(self._array, values)
        else:
            self._array[...] = 0
            self._array[self.rows] = values


class _Part:
    """Receives one of the messages that a call was cut into."""

    __slots__ = ("_future", "_into", "deadline")

    def __init__(self, future: CallFuture, into: Array) -> None:
        self.deadline = future.deadline
        self._future = future
        self._into = into

    def take(self, reply: Reply, record: Message) -> None:
        """As `Receiver.take`."""
        self._future.take(reply, record, self._into)

    def fail(self, error: CallError) -> None:
        """As `Receiver.fail`."""
        self._future.fail(error)
