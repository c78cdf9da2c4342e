"""Calls whose arrays are on the engine's GPU: enqueued on the caller's stream, all at once.

The arrays go into a slab, the stream waits for a word in shared memory, and the output is taken
from the slab: see transport/slab.py.
"""

from __future__ import annotations

import functools
import threading
import time
import weakref

from . import descriptors
from .descriptors import Descriptor
from .device_future import DeviceCall, DeviceFuture, Part
from .device_watch import Mover, Watch
from .errors import DeviceError, InvalidCall, RingFull, WorkerDied
from .link import Link, another
from .transport.slab import REFUSED, Claim, Segment

#: How long a sender leaves a full slab alone.
_FULL_PAUSE_S = 0.0002


class DeviceCalls:
    """The device calls of one session. Any thread may submit."""

    def __init__(self, link: Link, segment: Segment, data_bytes: int, mover: Mover) -> None:
        self._max_tokens = link.max_tokens
        self._most_tokens = functools.lru_cache(64)(
            functools.partial(descriptors.most_tokens, data_bytes)
        )
        self._watch = Watch(segment, data_bytes, mover)
        #: Held from a descriptor until its arrays are given and its output is taken.
        self._submitting = threading.Lock()
        # Weakly known: a client that is forgotten ends at once, and then this.
        weakref.finalize(self, self._watch.end).atexit = False

    def submit(self, call: DeviceCall) -> DeviceFuture:
        """Enqueue the call on its stream, in parts as the slab and the worker need.

        RingFull: no room before its deadline; what was enqueued is on its way. WorkerDied: the
        session is over. DeviceError: the engine's GPU refused something; the session is given up.
        """
        inputs = call.given.inputs
        if self._watch.mover.is_capturing(call.given.stream):
            raise InvalidCall(
                "the stream is being captured into a graph, which cannot tell a worker of each "
                "replay; leave the call out of the graph"
            )
        future = DeviceFuture(call)
        most = self._most_tokens(inputs.hidden_size, inputs.top_k, inputs.dtype)
        if most < 1:
            raise InvalidCall(
                f"the worker's slab has no room for one token of hidden_size={inputs.hidden_size}; "
                "pass arrays in the host's memory"
            )
        step = min(most, self._max_tokens, call.slice_tokens)
        for first in range(0, inputs.n_tokens, step):
            self._submit_part(call, future, first, min(first + step, inputs.n_tokens))
        return future

    def end(self) -> None:
        """The session is over: take no more, let streams go on, and let go of the slab."""
        self._watch.end()

    def join(self, timeout_s: float) -> None:
        """Wait until the slab is let go of, at most so long."""
        self._watch.join(timeout_s)

    def _submit_part(self, call: DeviceCall, future: DeviceFuture, first: int, end: int) -> None:
        link, watch, whole = call.link, self._watch, call.given.inputs
        inputs = whole if end - first == whole.n_tokens else whole.rows(first, end)
        sizes = descriptors.sizes(inputs.n_tokens, inputs.hidden_size, inputs.top_k, inputs.dtype)
        # In the order of their descriptors: the worker waits for each one's arrays, and on a stream
        # that waits for a later call's output an earlier one's would never come.
        if not self._submitting.acquire(timeout=max(0.0, call.deadline - time.monotonic())):
            raise RingFull("other threads' calls waited for room until this one's deadline")
        try:
            with watch.lock:
                claim = watch.allocator.claim(sizes)
                while claim is None:
                    claim = self._wait_for_room(sizes, call.deadline)
                if watch.is_over:
                    raise another(link.loss or WorkerDied("the session is over"))
                part = Part(future, link, watch, claim, inputs, call.fallback)
                watch.add(part)
            future.add(part, sum(sizes[:3]))
            try:
                part.set(REFUSED, 0)
                # First: there may be no room for it.
                link.describe(part, part.call_id, descriptors.pack(_descriptor(call, part)))
                self._enqueue(call, part, first)
            finally:
                if not part.has_take:
                    part.release()
                part.is_begun = True
        finally:
            self._submitting.release()

    def _enqueue(self, call: DeviceCall, part: Part, first: int) -> None:
        given, inputs, claim = call.given, part.inputs, part.claim
        out = given.out_address + first * inputs.hidden_size * inputs.dtype.itemsize
        mover, where = self._watch.mover, (claim.places, claim.sequence)
        try:
            mover.give(given.stream, inputs, *where)
            part.has_give = True
            mover.take(given.stream, out, inputs.n_bytes, *where)
            part.has_take = True
        except BaseException as error:
            # The worker waits for arrays that may never come.
            is_said = isinstance(error, DeviceError)
            call.link.lose(DeviceError(str(error)) if is_said else WorkerDied("it was interrupted"))
            raise

    def _wait_for_room(self, sizes: tuple[int, int, int, int], deadline: float) -> Claim | None:
        """Let go of the lock for a moment, and try again. RingFull: until the deadline."""
        watch = self._watch
        watch.lock.release()
        try:
            watch.settle()
            if time.monotonic() > deadline:
                raise RingFull(
                    "the slab was full of earlier calls until this one's deadline; wait for their "
                    "results, or allow more time"
                )
            time.sleep(_FULL_PAUSE_S)
        finally:
            watch.lock.acquire()
        return watch.allocator.claim(sizes)


def _descriptor(call: DeviceCall, part: Part) -> Descriptor:
    inputs, claim = part.inputs, part.claim
    return Descriptor(
        part.call_id,
        call.given.layer,
        int(call.deadline * 1e9),
        inputs.n_tokens,
        inputs.hidden_size,
        inputs.top_k,
        call.are_global,
        inputs.dtype,
        claim.sequence,
        claim.places,
        call.view,
    )
