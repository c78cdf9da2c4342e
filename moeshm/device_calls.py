"""Calls whose arrays are on the engine's GPU: enqueued on the caller's stream, all at once.

The arrays go into a slab, the stream waits for a word in shared memory, and the output is taken
from the slab: see transport/slab.py.
"""

from __future__ import annotations

import time
import weakref

from ._role import Role
from .device_arrays import DeviceInputs
from .device_future import DeviceCall, DeviceFuture, Part
from .device_watch import Mover, Watch
from .errors import ClientClosed, DeviceError, InvalidCall, RingFull, WorkerDied
from .link import Link
from .receivers import another
from .transport.slab import Segment

#: How long a sender leaves a full slab alone.
_FULL_PAUSE_S = 0.0002


class DeviceCalls:
    """The device calls of one session. Any thread may submit."""

    def __init__(self, link: Link, segment: Segment, data_bytes: int, mover: Mover) -> None:
        self._max_tokens = link.max_tokens
        self._mover = mover
        self._watch = Watch(segment, data_bytes, mover)
        self._most_tokens = self._watch.allocator.most_tokens
        #: Held from a descriptor until its arrays are given and its output is taken.
        self._submitting = Role()
        #: Calls that were given and taken, of the mover's, by those who had it before.
        self._n_given = self._n_taken = 0
        # Weakly known: a client that is forgotten ends at once, and then this.
        weakref.finalize(self, self._watch.end).atexit = False

    def submit(self, call: DeviceCall) -> DeviceFuture:
        """Enqueue the call on its stream, in parts as the slab and the worker need.

        RingFull: no room before its deadline; what was enqueued is on its way. WorkerDied: the
        session is over. DeviceError: the engine's GPU refused something; the session is given up.
        """
        given = call.given
        inputs = given.inputs
        if self._mover.is_capturing(given.stream):
            raise InvalidCall(
                "the stream is being captured into a graph, which cannot tell a worker of each "
                "replay; leave the call out of the graph"
            )
        hidden_size, dtype = inputs.hidden_size, inputs.dtype
        most = self._most_tokens(hidden_size, inputs.top_k, dtype)
        if most < 1:
            raise InvalidCall(
                f"the worker's slab has no room for one token of hidden_size={hidden_size}; "
                "pass arrays in the host's memory"
            )
        future = DeviceFuture(
            given.layer, call.deadline, call.timeout_s, call.on_taken, given.output
        )
        n_tokens = inputs.n_tokens
        if 0 < n_tokens <= most and n_tokens <= self._max_tokens and n_tokens <= call.slice_tokens:
            self._submit_part(call, future, inputs, given.out_address)
            return future
        step = min(most, self._max_tokens, call.slice_tokens)
        for first in range(0, n_tokens, step):
            out = given.out_address + first * hidden_size * dtype.itemsize
            rows = inputs.rows(first, min(first + step, n_tokens))
            self._submit_part(call, future, rows, out)
        return future

    def end(self) -> None:
        """The session is over: take no more, let streams go on, and let go of the slab."""
        self._watch.end()

    def join(self, timeout_s: float) -> None:
        """Wait until the slab is let go of, at most so long."""
        self._watch.join(timeout_s)

    def _submit_part(
        self, call: DeviceCall, future: DeviceFuture, inputs: DeviceInputs, out: int
    ) -> None:
        watch = self._watch
        # In the order of their descriptors: the worker waits for each one's arrays, and on a stream
        # that waits for a later call's output an earlier one's would never come.
        with self._submitting.taken(call.deadline):
            #: The part, whatever interrupts this once it is looked after.
            begun: list[Part] = []
            try:
                while not begun:
                    with watch.lock:
                        self._begin(call, future, inputs, begun)
                    if not begun:
                        self._wait_for_room(call.deadline)
                part = begun[0]
                future.add(part)
                self._send(call, part, out)
            finally:
                for part in begun:
                    if not part.has_take:
                        part.release()
                    part.is_begun = True

    def _begin(
        self, call: DeviceCall, future: DeviceFuture, inputs: DeviceInputs, begun: list[Part]
    ) -> None:
        """Add a part with room in the slab, which is looked after from now on; nothing where there
        is none. Holds the lock. WorkerDied."""
        watch, link = self._watch, call.link
        if watch.is_over:
            raise another(link.loss or WorkerDied("the session is over"))
        part: Part | None = None
        try:
            claim = watch.allocator.claim(
                inputs.n_tokens, inputs.hidden_size, inputs.top_k, inputs.dtype
            )
            if claim is not None:
                part = Part(
                    future, link, watch, claim, inputs, call.fallback, link.new_id(), call.deadline
                )
                begun.append(part)
                watch.add(part)
        except BaseException:
            # An interrupt. Room is given back in the order of parts, and a claim may have none.
            if part is not None:
                part.release()
                part.is_begun = True
            link.lose(WorkerDied("it was interrupted"))
            raise

    def _send(self, call: DeviceCall, part: Part, out: int) -> None:
        """Tell the worker, and enqueue what gives the arrays, waits, and takes the output."""
        link, given, mover = call.link, call.given, self._mover
        stream, inputs, claim, call_id = given.stream, part.inputs, part.claim, part.call_id
        try:
            packed = claim.describe(call_id, given.layer, call.deadline, call.view, call.are_global)
            # First: there may be no room for it, and what is enqueued waits for its answer.
            link.describe(part, call_id, packed)
            places, sequence, n_bytes = claim.places, claim.sequence, claim.out_bytes
            if mover.exchange(stream, inputs, out, n_bytes, places, sequence):
                part.has_give = part.has_take = True
            else:
                mover.give(stream, inputs, places, sequence)
                part.has_give = True
                mover.take(stream, out, n_bytes, places, sequence)
                part.has_take = True
            self._n_given += 1
            self._n_taken += 1
        except (RingFull, WorkerDied, ClientClosed):
            # The worker was not told, or there is none any more.
            raise
        except BaseException as error:
            # Interrupted right after a launch, which the slab must outlive.
            n_given, n_taken = mover.count_enqueued()
            part.has_give = part.has_give or n_given > self._n_given
            part.has_take = part.has_take or n_taken > self._n_taken
            # The worker may wait for arrays that never come.
            is_said = isinstance(error, DeviceError)
            link.lose(DeviceError(str(error)) if is_said else WorkerDied("it was interrupted"))
            raise

    def _wait_for_room(self, deadline: float) -> None:
        """For a moment. RingFull: until the deadline."""
        self._watch.settle()
        if time.monotonic() > deadline:
            raise RingFull(
                "the slab was full of earlier calls until this one's deadline; wait for their "
                "results, or allow more time"
            )
        time.sleep(_FULL_PAUSE_S)
