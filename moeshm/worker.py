"""The serve loop: one thread a session takes calls, waits its turn, and answers."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from . import descriptors, orders, protocol
from .backends import SlabCall, in_steps
from .descriptors import DESCRIPTOR, Descriptor
from .errors import (
    CallError,
    Corrupt,
    DeviceLost,
    InvalidCall,
    MoeshmError,
    PeerDied,
    ProtocolError,
    RingClosed,
    RingEmpty,
    RingFull,
    WorkerFailed,
)
from .handshake import Goodbye
from .layers import without_experts
from .logs import PeerLog, limited
from .orders import Offer, Release
from .protocol import Call, Message, Outgoing
from .session import Session
from .slab_server import SlabServer
from .turns import Place, Turns, deadline_passed
from .views import SessionViews

_log = limited(__name__)

#: How often an idle session looks whether the worker shuts down.
_IDLE_SLICE_S = 0.1
#: The same while experts are loaded for it: how late it may hear that they are there.
_LOADING_SLICE_S = 0.005
#: How often a session whose client's GPU is to put arrays into a slab looks for its end.
_ARRAYS_SLICE_S = 0.025
#: After a call that took longer, a look whether anybody still waits for the next ones.
_LONG_CALL_NS = 1_000_000
#: A client that leaves its replies unread for so long, and past the deadline of the call whose
#: reply finds no room, loses its session.
REPLY_TIMEOUT_S = 10.0
#: A client that sends on while the worker drains is answered for so long.
DRAIN_LIMIT_S = 20.0


class _ClientLeft(PeerDied):
    """In the middle of its call."""


class _BetweenSteps:
    """As `BetweenSteps`, of one session's calls, one after the other."""

    def __init__(self, session: Session, place: Place) -> None:
        self._session = session
        self._place = place
        self._deadline_ns = 0
        #: Since `begin`: how long others computed.
        self.paused_ns = 0
        #: What ended the call, which is no error of the backend's.
        self.error: MoeshmError | None = None

    def begin(self, deadline_ns: int) -> None:
        """Of a call."""
        self._deadline_ns, self.paused_ns, self.error = deadline_ns, 0, None

    def is_due(self) -> bool:
        """As `BetweenSteps.is_due`."""
        return (
            self._place.is_wanted()
            or 0 < self._deadline_ns < time.monotonic_ns()
            or self._session.peer_is_gone()
        )

    def __call__(self) -> None:
        """DeadlineExceeded, _ClientLeft: the call is of no more use."""
        start_ns = time.monotonic_ns()
        try:
            if self._session.peer_is_gone():
                raise _ClientLeft("the client is gone; its call is not finished")
            _check_deadline(self._deadline_ns, start_ns, is_begun=True)
            self._place.offer(self._deadline_ns)
        except MoeshmError as error:
            self.error = error
            raise
        finally:
            self.paused_ns += time.monotonic_ns() - start_ns


class SessionServer:
    """Answers the calls of one session until it ends; `serve` runs in a thread of its own."""

    def __init__(
        self,
        session: Session,
        views: SessionViews,
        turns: Turns,
        draining: threading.Event,
        slab: SlabServer | None = None,
        peers: PeerLog | None = None,
    ) -> None:
        self._session = session
        self._peers = peers or PeerLog(_log)
        self._transport = session.transport
        self._max_tokens = session.welcome.max_tokens
        self._views = views
        self._shapes = views.shapes
        self._orders = views.queue
        # Not every process has a number here: one of another namespace has 0.
        self._place = turns.place(session.control.peer_pid or session)
        self._between_steps = _BetweenSteps(session, self._place)
        self._ffn = in_steps(views.backend)
        self._draining = draining
        self._slab = slab or SlabServer(views.backend)
        self._compute_ns = 0
        self._drain_until = math.inf
        #: Why this worker's device will compute no call any more; the session ends with it.
        self.device_lost: DeviceLost | None = None
        self.calls = 0
        self.rows = 0

    def serve(self) -> str:
        """Until the client leaves or dies, or the worker drains; why it ended."""
        try:
            why = self._take_calls()
        except RingClosed:
            return "the client closed it"
        except PeerDied as error:
            return str(error)
        except RingFull:
            why = "its replies lay unread for too long"
        except (ProtocolError, Corrupt) as error:
            why = f"the client broke the protocol: {error}"
        except Exception as error:  # whatever it is, the client must hear of it
            _log.exception("a session failed")
            why = f"{type(error).__name__}: {error}"
        try:
            self._session.control.send(Goodbye(why), [], _IDLE_SLICE_S)
        except MoeshmError:
            _log.debug("the client was gone before the worker's goodbye")
        return why

    def _take_calls(self) -> str:
        slice_s = _IDLE_SLICE_S
        while True:
            if self._views.device_lost is not None and not self._orders:
                self.device_lost = self._views.device_lost
            if self.device_lost is not None:
                return str(self.device_lost)
            # Looked at first, so that what was sent before is answered.
            is_draining = self._draining.is_set()
            if self._is_drained():
                return "the worker shuts down"
            try:
                record = self._transport.acquire(0.0 if is_draining else slice_s)
            except RingEmpty:
                if is_draining:
                    return "the worker shuts down"
                slice_s = self._answer_orders()
                self._check_slab()
                continue
            self._answer(record)
            if self._orders:
                slice_s = self._answer_orders()
            if self._compute_ns > _LONG_CALL_NS and self._session.peer_is_gone():
                return "the client is gone; what it had sent is not computed"

    def _answer(self, record: Message) -> None:
        if record.type == DESCRIPTOR:
            self._answer_descriptor(record)
            return
        try:
            # Not kept here: its arrays are views of the record.
            call_id, error = self._try(record)
            if error is not None:
                self._refuse(call_id, error)
        finally:
            try:
                record.release()
            except BufferError:
                # A backend still refers to the inputs: the record goes with its last view.
                _log.debug("a record is in use after its call", exc_info=True)

    def _try(self, record: Message) -> tuple[int, CallError | None]:
        """Compute and send; the call's id, and what went wrong, without the frames that hold
        views of the record, which cannot be released before they are gone."""
        call = protocol.read_plain(record, self._shapes, self._max_tokens)
        if call is not None:
            call_id = call.call_id
        elif record.type == protocol.ORDER:
            return self._obey(record)
        else:
            call_id, fields = protocol.read_call_header(record)
        try:
            if call is None:
                view = self._views.of(protocol.view_of(fields))
                call = protocol.parse_call(
                    record, fields, view.layers, self._max_tokens, view.tables
                )
            self._compute(call)
        except CallError as error:
            return call_id, type(error)(str(error))
        except _ClientLeft:
            # Nobody is left to be told, and whoever takes the next call finds that out.
            _log.debug("call %d was not finished", call_id, exc_info=True)
        return call_id, None

    def _answer_descriptor(self, record: Message) -> None:
        try:
            call = self._slab.read_plain(record, self._max_tokens)
            descriptor = descriptors.read(record) if call is None else None
        finally:
            record.release()
        if descriptor is not None:
            call = self._judge(descriptor)
        if call is None:
            return
        error = self._begin(call)
        if error is not None:
            self._refuse_slab_call(call.call_id, call.places.slot, call.sequence, error)

    def _judge(self, descriptor: Descriptor) -> SlabCall | None:
        """The call that it describes; None for what cannot be, which is refused."""
        self._slab.check_open()
        try:
            view = self._views.of(descriptor.view)
            return self._slab.call_of(descriptor, view, self._max_tokens)
        except CallError as error:
            slot, sequence = descriptor.places.slot, descriptor.sequence
            self._refuse_slab_call(descriptor.call_id, slot, sequence, type(error)(str(error)))
            return None

    def _refuse_slab_call(self, call_id: int, slot: int, sequence: int, error: CallError) -> None:
        self._refuse(call_id, error)
        # After its error, for whoever sees the flags to find that.
        self._slab.tell_failed(slot, sequence)

    def _begin(self, call: SlabCall) -> CallError | None:
        """Begin a call whose arrays are in the slab, once they are; what went wrong."""
        try:
            # While the client's GPU is at it, and without the turn: the client may take its time.
            self._guard(call.layer, self._slab.prepare, call)
            self._wait_for_arrays(call)
            self._in_turn(
                call.deadline_ns, call.n_tokens, call.layer, self._slab.compute, call,
                self._between_steps,
            )  # fmt: skip
        except CallError as error:
            return type(error)(str(error))
        self.calls += 1
        self.rows += call.n_tokens
        return None

    def _wait_for_arrays(self, call: SlabCall) -> None:
        while not self._slab.wait_for_arrays(call, _ARRAYS_SLICE_S):
            _check_deadline(call.deadline_ns, time.monotonic_ns(), is_begun=False)
            if self._is_drained():
                raise WorkerFailed("the worker shuts down, and the call's arrays did not come")
            if self._session.peer_is_gone():
                raise PeerDied("the client is gone; the arrays of its call will not come")

    def _obey(self, record: Message) -> tuple[int, CallError | None]:
        """Begin what is ordered; the order's call id, and why it cannot be."""
        order = orders.parse_order(record)
        if isinstance(order, Offer):
            self._views.offer(order)
            return 0, None
        if isinstance(order, Release):
            self._slab.forget_view(order.view)
            self._views.release(order)
            return 0, None
        try:
            self._views.hold(order)
        except CallError as error:
            return order.call_id, type(error)(str(error))
        return order.call_id, None

    def _is_drained(self) -> bool:
        """What the client sends on, or does not give, is not waited for any more."""
        if self._draining.is_set():
            self._drain_until = min(self._drain_until, time.monotonic() + DRAIN_LIMIT_S)
        return time.monotonic() > self._drain_until

    def _check_slab(self) -> None:
        try:
            self._slab.check()
        except DeviceLost as error:
            self.device_lost = DeviceLost(str(error))

    def _answer_orders(self) -> float:
        """Answer the orders that are carried out; how long to wait until the next look."""
        for call_id, outcome in self._views.answers(self._session.check_layers):
            if isinstance(outcome, CallError):
                self._refuse(call_id, outcome)
            else:
                layers = {n: without_experts(info) for n, info in outcome.items()}
                self._say(protocol.pack_held(call_id, layers))
        return _LOADING_SLICE_S if self._orders else _IDLE_SLICE_S

    def _refuse(self, call_id: int, error: CallError) -> None:
        if isinstance(error, InvalidCall):
            self._peers.log(self._session.control.peer, logging.WARNING, f"refused: {error}")
        self._say(protocol.pack_error(call_id, error))

    def _say(self, parts: tuple[bytes, bytes]) -> None:
        self._transport.write(parts, protocol.REPLY, 0, REPLY_TIMEOUT_S)

    def _compute(self, call: Call) -> None:
        """Compute the call into a reply in place, and send it."""
        n_tokens, hidden_size = call.hidden_states.shape
        left_s = (call.deadline_ns - time.monotonic_ns()) / 1e9 if call.deadline_ns > 0 else 0.0
        reply = self._transport.reserve(
            protocol.reply_bytes(n_tokens, hidden_size, call.dtype),
            protocol.REPLY,
            0,
            max(REPLY_TIMEOUT_S, left_s),
        )
        try:
            rows = reply.array(call.dtype.numpy, (n_tokens, hidden_size), protocol.HEADER_BYTES)
            self._in_turn(
                call.deadline_ns, n_tokens, call.layer, self._ffn,
                call.layer, call.hidden_states, call.topk_ids, call.topk_weights, rows,
                self._between_steps,
            )  # fmt: skip
            del rows
            protocol.pack_reply(
                reply, call.call_id, n_tokens, hidden_size, call.dtype, self._compute_ns
            )
            _commit(reply)
        except BaseException:
            reply.abort()
            raise
        self.calls += 1
        self.rows += n_tokens

    def _in_turn(
        self,
        deadline_ns: int,
        n_tokens: int,
        layer: int,
        compute: Callable[..., None],
        *arguments: Any,
    ) -> None:
        """Compute a call when its turn comes; DeadlineExceeded: before that, or between steps."""
        steps = self._between_steps
        steps.begin(deadline_ns)
        self._place.take(deadline_ns, n_tokens)
        start_ns = time.monotonic_ns()
        try:
            _check_deadline(deadline_ns, start_ns, is_begun=False)
            self._guard(layer, compute, *arguments)
            self._place.finished()
        finally:
            self._place.leave()
            self._compute_ns = time.monotonic_ns() - start_ns - steps.paused_ns
            # Its frames hold views of the call.
            steps.error = None

    def _guard(self, layer: int, compute: Callable[..., None], *arguments: Any) -> None:
        """Errors of the backend become WorkerFailed, and a lost device is noted."""
        try:
            compute(*arguments)
        except InvalidCall:
            raise
        except Exception as error:
            if error is self._between_steps.error:
                raise
            if isinstance(error, DeviceLost):
                # Another, without the frames.
                self.device_lost = DeviceLost(str(error))
            _log.exception("layer %d: the backend failed", layer)
            raise WorkerFailed(f"{type(error).__name__}: {error}") from None


def _check_deadline(deadline_ns: int, now_ns: int, is_begun: bool) -> None:
    if 0 < deadline_ns < now_ns:
        raise deadline_passed(is_begun)


def _commit(reply: Outgoing) -> None:
    try:
        reply.commit()
    except BufferError as error:
        raise WorkerFailed(f"the backend keeps the array for its result: {error}") from None
