"""Calls whose arrays are on the engine's GPU: given to a slab, taken from it, and watched.

Everything is enqueued on the caller's stream at once, which then waits for a word in shared memory:
see transport/slab.py. A thread looks after what is on its way, so that no stream waits for ever.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import descriptors, settings
from ._words import load_word, store_word, wait_for_word
from .descriptors import Descriptor
from .device_arrays import DeviceInputs
from .dtypes import Array
from .errors import (
    CallError,
    DeadlineExceeded,
    DeviceError,
    InvalidCall,
    MoeshmError,
    NotReady,
    ProtocolError,
    RingFull,
    WorkerDied,
    WorkerFailed,
)
from .link import Link, another, too_late
from .protocol import Message, Reply
from .transport.slab import DONE, GIVEN, REFUSED, TAKEN, TOLD, Allocator, Claim, Places, Segment

_log = logging.getLogger(__name__)

#: How often what is on its way is looked after.
_SLICE_S = 0.01
#: Looks at nothing after which the thread sleeps until it is woken: to wake it for every call would
#: take longer than the rest of a `submit`.
_IDLE_LOOKS = 100
#: How long a sender leaves a full slab alone.
_FULL_PAUSE_S = 0.0002
#: A worker that lives tells of a missed deadline itself, so long after it at most.
_GRACE_S = 0.25
#: Longer than taking in a reply that was sent takes.
_REPLY_LIMIT_S = 5.0

#: `(layer, hidden_states, topk_ids, topk_weights, cause)`: the output, computed elsewhere.
HostFallback = Callable[[int, Array, Array, Array, WorkerDied | DeadlineExceeded], Array]


class Mover(Protocol):
    """Moves arrays between the engine's GPU and a slab; `backends.gpu.mover` has the real one."""

    def give(self, stream: int, arrays: DeviceInputs, at: Places, sequence: int) -> None:
        """Enqueue the copies of a call's arrays into the slab, and then setting `given`."""
        ...

    def take(self, stream: int, out: int, n_bytes: int, at: Places, sequence: int) -> None:
        """Enqueue waiting for `done`, the copy of the output to `out`, and setting `taken`."""
        ...

    def fetch(self, offset: int, n_bytes: int) -> Array:
        """A copy, as uint8, of what is there in the slab's data."""
        ...

    def put(self, offset: int, array: Array) -> None:
        """Copy the array to there."""
        ...

    def close(self) -> None:
        """Let go of the slab, which nothing on a stream uses any more."""
        ...


class Given(NamedTuple):
    """A call's arrays, checked, and the stream's handle."""

    layer: int
    inputs: DeviceInputs
    #: What the caller gets, and where that is.
    output: Any
    out_address: int
    stream: int


class DeviceCall(NamedTuple):
    """A call that is to be enqueued; all checked."""

    link: Link
    given: Given
    #: Of time.monotonic, and how far that was away.
    deadline: float
    timeout_s: float
    #: The number of the view, and what ids are.
    view: int
    are_global: bool
    #: Most tokens in one descriptor.
    slice_tokens: int
    fallback: HostFallback | None
    #: Is told the bytes of each part's output, once it was taken.
    on_taken: Callable[[int], None]


class DeviceFuture:
    """The result of a `submit` of arrays on a GPU. Made by ExpertClient.

    The inputs and the output belong to the call until the stream has passed it.
    """

    def __init__(self, call: DeviceCall) -> None:
        self.layer = call.given.layer
        self.deadline = call.deadline
        self.timeout_s = call.timeout_s
        self.on_taken = call.on_taken
        #: Descriptors that the call was cut into, and bytes that were given.
        self.n_parts = self.bytes_out = 0
        self._output = call.given.output
        #: That are not settled: they refer to the session, which must end with its client.
        self._parts: list[_Part] = []
        self._watch: _Watch | None = None
        self._error: CallError | None = None

    def result(self) -> Any:
        """The weighted sum of the selected experts' outputs, like hidden_states: an array for what
        is enqueued later on the call's stream. Waits for nothing.

        An error that is known by now is raised; `wait` tells of any. The array's content is
        undefined then, and the stream goes on.
        """
        if self._error is not None:
            raise another(self._error)
        return self._output

    def done(self) -> bool:
        """True when the stream has passed the call."""
        return all(part.has_reached(TAKEN) for part in list(self._parts))

    def wait(self, timeout_s: float | None = None) -> Any:
        """As `result`, once the stream has passed the call; waits for that on the host.

        NotReady: not within `timeout_s`. DeadlineExceeded, WorkerDied: no worker, and no fallback.
        InvalidCall: an id is out of range. WorkerFailed: the worker said so.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for part in list(self._parts):
            while not (part.is_settled or part.wait(TAKEN, _SLICE_S)):
                if until is not None and time.monotonic() > until:
                    raise NotReady(f"no result within {timeout_s} s; the call is still on its way")
        if self._watch is not None:
            self._watch.settle()
        return self.result()

    def add(self, part: _Part, n_bytes: int, watch: _Watch) -> None:
        """It is on its way."""
        self._watch = watch
        self._parts.append(part)
        self.n_parts += 1
        self.bytes_out += n_bytes

    def fail(self, error: CallError) -> None:
        """The first error of several stays."""
        self._error = self._error or error

    def settled(self, part: _Part) -> None:
        """Nothing of it is on its way."""
        self._parts.remove(part)
        self.on_taken(part.inputs.n_bytes)


class _Part:
    """One descriptor's part of a call; a `link.Receiver` of what is wrong with it."""

    def __init__(
        self,
        future: DeviceFuture,
        link: Link,
        claim: Claim,
        memory: memoryview,
        inputs: DeviceInputs,
        fallback: HostFallback | None,
    ) -> None:
        self.future = future
        self.link = link
        self.call_id = link.new_id()
        self.claim = claim
        self.inputs = inputs
        self.fallback = fallback
        self.deadline = future.deadline
        #: What the worker said, and why there will be no more words of its.
        self.told: CallError | None = None
        self.loss: CallError | None = None
        #: Whoever submits it has enqueued what there will be of it.
        self.is_begun = False
        #: `take` is on the stream: `taken` will be set.
        self.has_take = False
        #: The stream need not wait for the worker any more.
        self.is_released = False
        #: Nothing of it is on its way, and its future knows.
        self.is_settled = False
        self._memory = memory

    @property
    def is_done(self) -> bool:
        """No more will be said of it."""
        return self.told is not None or self.loss is not None

    def take(self, reply: Reply, record: Message) -> None:  # noqa: ARG002
        """As `Receiver.take`: replies to descriptors are errors."""
        if reply.error is None:
            raise ProtocolError(f"call {self.call_id} has its output in a slab, and got a reply")
        self.told = self.told or reply.error

    def fail(self, error: CallError) -> None:
        """As `Receiver.fail`."""
        self.loss = self.loss or error

    def release(self, error: CallError | None) -> None:
        """Let the stream go on, in the worker's place."""
        self.is_released = True
        if error is not None:
            self.future.fail(error)
        self.set(DONE, self.claim.sequence)

    def has_reached(self, flag: int) -> bool:
        """That flag was set for it."""
        return self.wait(flag, 0.0)

    def wait(self, flag: int, timeout_s: float) -> bool:
        """Until that flag is set for it; False at the timeout."""
        at, spin_ns = self.claim.flag(flag), int(settings.current().spin_us * 1e3)
        return wait_for_word(self._memory, at, self.claim.sequence, int(timeout_s * 1e9), spin_ns)

    def set(self, flag: int, value: int) -> None:
        """By the host."""
        store_word(self._memory, self.claim.flag(flag), value)

    @property
    def refused(self) -> int:
        """That flag."""
        return load_word(self._memory, self.claim.flag(REFUSED))


class _Watch:
    """What is on its way in one slab, and the thread that looks after it.

    It knows no client: one that is forgotten ends at once, and its slab once nothing uses it.
    """

    def __init__(self, segment: Segment, data_bytes: int, mover: Mover) -> None:
        self.lock = threading.Lock()
        self.memory = segment.memory
        self.mover = mover
        self.allocator = Allocator(data_bytes)
        #: Nothing more is added: seen by whoever holds the lock.
        self.is_over = False
        #: Oldest first, one for each of the allocator's claims.
        self.parts: collections.deque[_Part] = collections.deque()
        self._segment = segment
        self._woken = threading.Event()
        self._is_asleep = False
        self._thread = threading.Thread(target=self._run, name="moeshm-slab", daemon=True)
        self._thread.start()

    def add(self, part: _Part) -> None:
        """Look after it, too; holds the lock."""
        self.parts.append(part)
        if self._is_asleep:
            self._woken.set()

    def end(self) -> None:
        """Take no more, and let go of the slab as soon as nothing is on its way."""
        self.is_over = True
        self._woken.set()

    def join(self, timeout_s: float) -> None:
        """Wait until it is let go of."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def settle(self) -> None:
        """Tell the futures of parts that the stream has passed, and free their room."""
        with self.lock:
            while self.parts and self._is_over_for(self.parts[0]):
                part = self.parts.popleft()
                self.allocator.free_oldest()
                self._tell(part)

    def _is_over_for(self, part: _Part) -> bool:
        if not part.is_begun:
            return False
        return part.has_reached(TAKEN) if part.has_take else part.is_released

    def _tell(self, part: _Part) -> None:
        link, refused = part.link, part.refused
        if part.is_released:
            pass  # it knows
        elif refused == TOLD:
            # Sent before the flags were set; another thread may be about to take it in.
            link.wait(part, time.monotonic() + _REPLY_LIMIT_S)
            part.future.fail(part.told or part.loss or WorkerFailed("the worker gave no reason"))
        elif refused:
            token, slot = divmod(refused - 1, part.inputs.top_k)
            part.future.fail(
                InvalidCall(
                    f"topk_ids[{token}, {slot}] of this call, or of a part of it, is no id of "
                    f"layer {part.future.layer} here; pass ids of the view, and -1 for an empty "
                    "slot"
                )
            )
        link.forget_now(part.call_id)
        part.future.settled(part)
        part.is_settled = True

    def _run(self) -> None:
        n_idle = 0
        while not (self.is_over and not self.parts):
            n_idle = 0 if self.parts else n_idle + 1
            if n_idle > _IDLE_LOOKS:
                self._sleep()
                n_idle = 0
            if self.parts:
                time.sleep(_SLICE_S)
            else:
                self._woken.wait(_SLICE_S)
            try:
                self._look()
            except Exception:  # whatever it is, streams must not wait for ever
                _log.exception("what is on its way to the worker was not looked after")
        try:
            self.mover.close()
        except DeviceError as error:
            _log.warning("a slab was not closed: %s", error)
        self.memory = memoryview(b"")
        self._segment.close()

    def _sleep(self) -> None:
        """Until there is something to look after."""
        self._is_asleep = True
        # Looked at after that was said: whoever adds a part meanwhile sees the one or the other.
        if not (self.parts or self.is_over):
            self._woken.wait()
        self._is_asleep = False
        if not self.is_over:
            self._woken.clear()

    def _look(self) -> None:
        self.settle()
        with self.lock:
            parts = list(self.parts)
        for part in parts:
            if part.is_begun and not part.is_released:
                self._look_at(part)

    def _look_at(self, part: _Part) -> None:
        link = part.link
        if link.loss is None and link.session.peer_is_gone():
            link.lose(WorkerDied("its process is gone"))
        # Before the arrays are given the caller's own stream is late, and the worker says so.
        is_late = time.monotonic() > part.deadline + _GRACE_S and part.has_reached(GIVEN)
        if link.loss is None and is_late and not part.has_reached(DONE):
            late = too_late(part.future.timeout_s)
            part.fail(late)
            link.lose(late)
        if link.loss is not None and not part.has_reached(DONE):
            self._release(part)

    def _release(self, part: _Part) -> None:
        """Its worker is lost: compute it elsewhere if that can be, and let the stream go on."""
        error = part.told or part.loss or WorkerDied("the session is over")
        fallback = part.fallback
        if fallback is None or not (
            part.has_take and isinstance(error, WorkerDied | DeadlineExceeded)
        ):
            part.release(error)
        elif part.has_reached(GIVEN):
            part.release(self._fall_back(part, fallback, error))

    def _fall_back(
        self, part: _Part, fallback: HostFallback, cause: WorkerDied | DeadlineExceeded
    ) -> CallError | None:
        """Put what the fallback computes where the stream takes the output from."""
        inputs, at = part.inputs, part.claim.places
        rows, pairs = (inputs.n_tokens, inputs.hidden_size), (inputs.n_tokens, inputs.top_k)
        sizes = descriptors.sizes(*rows, inputs.top_k, inputs.dtype)
        fetch = self.mover.fetch
        try:
            output = fallback(
                part.future.layer,
                fetch(at.hidden_states, sizes[0]).view(inputs.dtype.numpy).reshape(rows),
                fetch(at.topk_ids, sizes[1]).view(np.int32).reshape(pairs),
                fetch(at.topk_weights, sizes[2]).view(np.float32).reshape(pairs),
                cause,
            )
            self.mover.put(at.out, output)
        except CallError as error:
            return error
        except MoeshmError as error:
            return WorkerDied(f"{cause}; and the fallback could not compute it: {error}")
        return None


class DeviceCalls:
    """The device calls of one session. Any thread may submit."""

    def __init__(self, link: Link, segment: Segment, data_bytes: int, mover: Mover) -> None:
        self._max_tokens = link.max_tokens
        self._most_tokens = functools.lru_cache(64)(
            functools.partial(descriptors.most_tokens, data_bytes)
        )
        self._watch = _Watch(segment, data_bytes, mover)
        #: Held by whoever enqueues on a stream: the mover is for one thread at a time.
        self._moving = threading.Lock()
        # Weakly known: a client that is forgotten ends at once, and then this.
        weakref.finalize(self, self._watch.end).atexit = False

    def submit(self, call: DeviceCall) -> DeviceFuture:
        """Enqueue the call on its stream, in parts as the slab and the worker need.

        RingFull: no room before its deadline; what was enqueued is on its way. WorkerDied: the
        session is over. DeviceError: the engine's GPU refused something; the session is given up.
        """
        inputs = call.given.inputs
        future = DeviceFuture(call)
        most = self._most_tokens(inputs.hidden_size, inputs.top_k, inputs.dtype)
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
        with watch.lock:
            claim = watch.allocator.claim(sizes)
            while claim is None:
                claim = self._wait_for_room(sizes, call.deadline)
            if watch.is_over:
                raise another(link.loss or WorkerDied("the session is over"))
            part = _Part(future, link, claim, watch.memory, inputs, call.fallback)
            watch.add(part)
        future.add(part, sum(sizes[:3]), watch)
        try:
            part.set(REFUSED, 0)
            # First: there may be no room for it. The worker waits for the arrays.
            link.describe(part, part.call_id, descriptors.pack(_descriptor(call, part)))
            self._enqueue(call, part, first)
        finally:
            if not part.has_take:
                # Nothing takes the output; or something might, after an interrupt.
                part.release(None)
            part.is_begun = True

    def _enqueue(self, call: DeviceCall, part: _Part, first: int) -> None:
        given, inputs, claim = call.given, part.inputs, part.claim
        out = given.out_address + first * inputs.hidden_size * inputs.dtype.itemsize
        mover, where = self._watch.mover, (claim.places, claim.sequence)
        try:
            with self._moving:
                mover.give(given.stream, inputs, *where)
                mover.take(given.stream, out, inputs.n_bytes, *where)
            part.has_take = True
        except BaseException as error:
            # The worker waits for arrays that may never come.
            why = (
                error if isinstance(error, DeviceError) else WorkerDied("a submit was interrupted")
            )
            call.link.lose(why)
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


def _descriptor(call: DeviceCall, part: _Part) -> Descriptor:
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
