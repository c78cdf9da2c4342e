"""What is on its way in one slab, and the thread that looks after it: no stream waits for ever."""

from __future__ import annotations

import collections
import logging
import math
import operator
import threading
import time
import traceback
from typing import Protocol

import numpy as np

from ._claims import Allocator, sizes
from ._role import Bell
from .device_arrays import DeviceInputs
from .device_future import HostFallback, Part
from .dtypes import Array
from .errors import (
    CallError,
    DeadlineExceeded,
    DeviceError,
    InvalidCall,
    WorkerDied,
    WorkerFailed,
)
from .link import Link
from .receivers import GRACE_S, another, too_late
from .transport.slab import DONE, GIVEN, TOLD, Places, Segment

_log = logging.getLogger(__name__)

#: How often what is on its way is looked after.
_SLICE_S = 0.01
#: Looks at nothing after which the thread sleeps until it is woken: to wake it for every call would
#: take longer than the rest of a `submit`.
_IDLE_LOOKS = 100
#: A call whose own stream was late, or one before it, is given to the worker after its deadline; of
#: one behind others its turn may come then. So long the worker has to come to it and to say so; the
#: session of one that lives must not be lost.
_LATE_GRACE_S = 0.25
#: Longer than taking in a reply that was sent takes.
_REPLY_LIMIT_S = 5.0

_call = operator.methodcaller("__call__")


class Mover(Protocol):
    """Moves arrays between the engine's GPU and a slab; `backends.gpu.mover` has the real one."""

    def is_capturing(self, stream: int) -> bool:
        """Whether what is enqueued there is recorded instead of done."""
        ...

    def give(self, stream: int, arrays: DeviceInputs, at: Places, sequence: int) -> None:
        """Enqueue the copies of a call's arrays into the slab, and then setting `given`."""
        ...

    def take(self, stream: int, out: int, n_bytes: int, at: Places, sequence: int) -> None:
        """Enqueue waiting for `done`, the copy of the output to `out`, and setting `taken`."""
        ...

    def exchange(
        self, stream: int, arrays: DeviceInputs, out: int, n_bytes: int, at: Places, sequence: int
    ) -> bool:
        """Enqueue all of `give` and `take` as one launch, for a call that its worker was told of.

        False, and nothing is enqueued, where that is not for such a call.
        """
        ...

    def count_enqueued(self) -> tuple[int, int]:
        """How many calls were given and taken on streams, up to now: also where that was
        interrupted as it ended."""
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


class Watch:
    """What is on its way in one slab, and the thread that looks after it.

    It knows no client: one that is forgotten ends at once, and its slab once nothing uses it.
    """

    def __init__(self, segment: Segment, data_bytes: int, mover: Mover) -> None:
        self.lock = threading.Lock()
        self.mover = mover
        self.allocator = Allocator(segment.memory, data_bytes)
        #: Nothing more is added: seen by whoever holds the lock.
        self.is_over = False
        #: Oldest first, one for each of the allocator's claims.
        self.parts: collections.deque[Part] = collections.deque()
        #: Forgets the oldest part, and frees its room.
        self._free_steps = self.parts.popleft, self.allocator.free_oldest
        self._done_steps: collections.deque[None] = collections.deque(maxlen=0)
        self._segment = segment
        #: Kinds of errors that the log has.
        self._logged: set[str] = set()
        self._bell = Bell()
        self._is_asleep = False
        self._thread = threading.Thread(target=self._run, name="moeshm-slab", daemon=True)
        self._thread.start()

    def add(self, part: Part) -> None:
        """Look after it, too; holds the lock."""
        self.parts.append(part)
        if self._is_asleep:
            self._bell.ring()

    def end(self) -> None:
        """Take no more, and let go of the slab as soon as nothing is on its way."""
        self.is_over = True
        self._bell.ring()

    def join(self, timeout_s: float) -> None:
        """Wait until it is let go of."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def settle(self) -> None:
        """Tell the futures of parts that are over, and free the room of the oldest of them."""
        me = threading.get_ident()
        refused: list[tuple[Part, int]] = []
        try:
            with self.lock:
                for part in self.parts:
                    if part.is_settled or part.teller not in (0, me) or not part.is_over:
                        continue
                    flag = 0 if part.is_released else part.claim.refused
                    if flag:
                        refused.append((part, flag))
                        part.teller = me
                    else:
                        # Its future has the output, or knows why not.
                        self._end(part)
                unheard = self._free_settled()
            # Not under the lock: what the worker said may still have to be taken in.
            if refused:
                unheard += self._tell(refused)
            for part in unheard:
                self._take_in_reply(part)
                part.link.forget_now(part.call_id)
        finally:
            # After an interrupt some are untold, and any thread's to tell of.
            for part, _ in refused:
                if part.teller == me:
                    part.teller = 0

    def _tell(self, refused: list[tuple[Part, int]]) -> list[Part]:
        """Their futures why the worker computed nothing; each with that flag of its. As
        `_free_settled`."""
        for part, flag in refused:
            try:
                error = self._reason(part, flag)
            except Exception as cause:  # whatever it is, the output is no result
                if threading.current_thread() is threading.main_thread():
                    # A signal's handler may have raised it; the watch's thread will tell.
                    raise
                error = WorkerFailed(f"the worker refused the call, and why is unknown: {cause}")
            # Not after an interrupt: one that ends untold has succeeded.
            self._fail(part, error)
            self._end(part)
        with self.lock:
            return self._free_settled()

    def _take_in_reply(self, part: Part) -> None:
        # Sent before the flags were set; another thread may be about to take it in.
        part.link.wait(part, time.monotonic() + _REPLY_LIMIT_S)

    def _reason(self, part: Part, refused: int) -> CallError:
        if refused == TOLD:
            self._take_in_reply(part)
            return part.told or part.loss or WorkerFailed("the worker gave no reason")
        token, slot = divmod(refused - 1, part.inputs.top_k)
        return InvalidCall(
            f"topk_ids[{token}, {slot}] of this call, or of a part of it, is no id of layer "
            f"{part.future.layer} here; pass ids of the view, and -1 for an empty slot"
        )

    def _end(self, part: Part) -> None:
        """Its future has no more of it; nor will a reply come, unless the worker comes to it."""
        if not part.is_abandoned:
            part.link.forget_now(part.call_id)
        part.settle()

    def _free_settled(self) -> list[Part]:
        """The room of the oldest ones; which of them have a reply to take in. Holds the lock."""
        parts = self.parts
        unheard: list[Part] = []
        while parts and parts[0].is_settled:
            part = parts[0]
            if part.is_abandoned:
                # The worker may still write to it. When it is over nothing is claimed.
                if not (part.is_passed or self.is_over):
                    break
                if part.claim.refused == TOLD:
                    unheard.append(part)
                else:
                    part.link.forget_now(part.call_id)
            # In one step of the interpreter: no handler of a signal runs in between, which would
            # lose the room.
            self._done_steps.extend(map(_call, self._free_steps))
        return unheard

    def _fail(self, part: Part, error: CallError) -> None:
        part.future.fail(error)
        # Whoever uses results on a stream may never ask for errors.
        kind = type(error).__name__
        if kind not in self._logged:
            self._logged.add(kind)
            _log.warning("layer %d, arrays on a GPU: %s: %s", part.future.layer, kind, str(error))

    def _run(self) -> None:
        n_idle = 0
        while not self._is_through():
            n_idle = 0 if self.parts else n_idle + 1
            if n_idle > _IDLE_LOOKS:
                self._sleep()
                n_idle = 0
            self._bell.wait(self._pause_s())
            try:
                self._look()
            except Exception:  # whatever it is, the next look must come
                _log.error("calls on their way were not looked after: %s", traceback.format_exc())
        try:
            self.mover.close()
        except DeviceError as error:
            _log.warning("a slab was not closed: %s", error)
        self.allocator.close()
        self._segment.close()

    def _is_through(self) -> bool:
        """It is over, and nothing is on its way any more."""
        # Under the lock: whoever holds it may have found that it is not over, and be adding a part.
        with self.lock:
            return self.is_over and not self.parts

    def _sleep(self) -> None:
        """Until there is something to look after."""
        self._is_asleep = True
        # Looked at after that was said: whoever adds a part meanwhile sees the one or the other.
        if not (self.parts or self.is_over):
            self._bell.wait(math.inf)
        self._is_asleep = False

    def _pause_s(self) -> float:
        """Until the next look: at what is to be given up, in time."""
        now = time.monotonic()
        with self.lock:
            ends = [end for part in self.parts for end in (part.late_at, part.given_up_at)]
        return min([_SLICE_S, *(end - now for end in ends if end > now)])

    def _look(self) -> None:
        self.settle()
        with self.lock:
            parts = list(self.parts)
        are_given = is_first = True
        for part in parts:
            # Before its turn comes, and its arrays are given, the worker cannot do anything:
            # others' streams, or the caller's own, are late, and it says so when it gets there.
            are_given = are_given and (part.has_reached(GIVEN) or part.has_reached(DONE))
            if part.is_passed:
                continue
            if part.is_begun:
                self._try_to_look_at(part, are_given, is_first)
            is_first = False

    def _try_to_look_at(self, part: Part, is_workers: bool, is_first: bool) -> None:
        try:
            self._look_at(part, is_workers, is_first)
        except Exception as error:  # whatever it is, streams must not wait for ever
            if part.is_abandoned:
                return  # it was said
            words = traceback.format_exc()
            _log.error("what is on its way to the worker was not looked after: %s", words)
            self._fail(part, WorkerDied(f"the call could not be looked after: {error}"))
            part.abandon()

    def _look_at(self, part: Part, is_workers: bool, is_first: bool) -> None:
        """`is_workers`: nobody but the worker keeps it from being done; `is_first`: nor does a part
        before it."""
        link = part.link
        if link.loss is None and _is_gone(link):
            link.lose(WorkerDied("its process is gone"))
        if link.loss is None and is_workers:
            self._look_at_time(part, is_first)
        if link.loss is not None and not part.has_reached(DONE):
            self._release(part)

    def _look_at_time(self, part: Part, is_first: bool) -> None:
        """When a part is late: the session ends if the worker is at it, else the part alone."""
        now, link, timeout_s = time.monotonic(), part.link, part.future.timeout_s
        is_new = not part.late_at
        if is_new:
            # A look later than it was given, at most.
            is_late = now > part.deadline + _SLICE_S
            grace_s = _LATE_GRACE_S if is_late else GRACE_S
            part.late_at = max(part.deadline, now) + grace_s
        # Calls through the ring come before it, too.
        if is_first and not part.given_up_at and not link.is_held_up(part.whole):
            part.given_up_at = part.late_at if is_new else max(part.late_at, now + _LATE_GRACE_S)
        if now < part.late_at or part.is_passed:
            return
        # What a fallback computes must not be where the worker still writes for a living session.
        if part.fallback is not None or 0 < part.given_up_at <= now:
            late = too_late(timeout_s)
            part.fail(late)
            link.lose(late)
        elif not part.is_abandoned:
            self._fail(part, part.told or too_late(timeout_s, is_held_up=True))
            part.abandon()

    def _release(self, part: Part) -> None:
        """Its worker is lost: compute it elsewhere if that can be, and let the stream go on."""
        # The link knows before the part is told.
        loss = part.link.loss or WorkerDied("the session is over")
        error = part.told or part.loss or another(loss)
        fallback = part.fallback
        if fallback is not None and isinstance(error, WorkerDied | DeadlineExceeded):
            if not part.has_reached(GIVEN):
                return  # the stream has not come so far
            outcome = self._fall_back(part, fallback, error)
        else:
            outcome = error
        if outcome is not None:
            self._fail(part, outcome)
        part.release()

    def _fall_back(
        self, part: Part, fallback: HostFallback, cause: WorkerDied | DeadlineExceeded
    ) -> CallError | None:
        """Put what the fallback computes where the stream takes the output from."""
        inputs, at = part.inputs, part.claim.places
        rows, pairs = (inputs.n_tokens, inputs.hidden_size), (inputs.n_tokens, inputs.top_k)
        n_bytes = sizes(*rows, inputs.top_k, inputs.dtype)
        fetch = self.mover.fetch
        try:
            output = fallback(
                part.future.layer,
                fetch(at.hidden_states, n_bytes[0]).view(inputs.dtype.numpy).reshape(rows),
                fetch(at.topk_ids, n_bytes[1]).view(np.int32).reshape(pairs),
                fetch(at.topk_weights, n_bytes[2]).view(np.float32).reshape(pairs),
                cause,
            )
            self.mover.put(at.out, output)
        except CallError as error:
            return error
        except Exception as error:  # a backend's own, or the GPU's
            # As text: a record with the error's frames would hold on to the slab.
            words = traceback.format_exc()
            _log.error("layer %d: the fallback failed: %s", part.future.layer, words)
            return WorkerDied(f"{cause}; and the fallback could not compute it: {error}")
        return None


def _is_gone(link: Link) -> bool:
    try:
        return link.session.peer_is_gone()
    except ValueError:
        # Another thread has just closed it, and says why.
        return False
