"""The calls of one session that are on their way, and who receives for all of them.

There is no receiving thread: of the threads that wait for a result, one receives, gives the others
theirs, and hands over when it has its own.
"""

from __future__ import annotations

import collections
import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from . import process, protocol
from ._role import Monitor, Role
from .dtypes import Array, DType
from .errors import (
    CallError,
    DeadlineExceeded,
    ForkedProcess,
    MoeshmError,
    ProtocolError,
    RingEmpty,
    RingFull,
    SessionError,
    WorkerDied,
)
from .held import SessionNumbers
from .outbox import Drain, Outbox, Packable, Rows
from .protocol import Message, Reply
from .receivers import GRACE_S, Answer, Awaited, Nobody, Receiver, another, too_late
from .session import Session

if TYPE_CHECKING:
    from .device_calls import DeviceCalls

#: How late it may be heard that an order is carried out. Whoever waits for that looks so often.
_ORDER_PAUSE_S = 0.005
#: How late a thread may learn that the one that received was interrupted, which only the main
#: thread is; and how often it looks while another receives.
_UNTOLD_S, _LOOK_S = 0.01, 0.1
#: A signal's handler hardly raises so often while one record is taken in: then it is a bug.
_MOST_FAILURES = 100
#: Longer than copying the largest reply takes; a thread that the interpreter ended never stops.
_COPY_LIMIT_S = 5.0


_Record = TypeVar("_Record")


class Link:
    """One session and its pending calls. Every method may be called by several threads."""

    def __init__(self, session: Session, batch_capacity: int) -> None:
        self.session = session
        #: Most tokens in one message.
        self.max_tokens = min(batch_capacity, session.welcome.max_tokens)
        self._transport = session.transport
        self._pending: dict[int, Receiver] = {}
        #: For the next call or order.
        self.new_id: Callable[[], int] = itertools.count(1).__next__
        #: The views that calls may name.
        self.views = SessionNumbers(self)
        self._outbox = Outbox(session.transport)
        #: The record that is being taken in, and how often that failed.
        self._received: collections.deque[Message] = collections.deque()
        self._n_failures = 0
        #: The call whose reply was taken in, until that is released.
        self._last_given = -1
        #: Some are received by nobody, and of these some may never have been sent.
        self._has_given_up = False
        #: Held to change what is below, and to end the session.
        self._state = Monitor()
        self._pid = os.getpid()
        self._receiving = Role()
        self._n_waiting = 0
        #: For arrays on the engine's GPU; None where there is no slab.
        self.device_calls: DeviceCalls | None = None
        #: Why the session is over; None while it lives, ClientClosed after `close`.
        self.loss: CallError | None = None

    def send(
        self,
        receiver: Receiver,
        layer: int,
        hidden_states: Array,
        topk_ids: Array,
        topk_weights: Array,
        dtype: DType,
        view: int,
        rows: Rows | None,
    ) -> int:
        """Send these rows of a call of a view's local ids, or all, in this format; their reply
        will go to `receiver`. How many bytes it took.

        RingFull: no room before the receiver's deadline; nothing was sent. WorkerDied: the session
        is over; the receiver was told, too.
        """
        call_id = self.new_id()
        call = (
            call_id,
            layer,
            hidden_states,
            topk_ids,
            topk_weights,
            dtype,
            int(receiver.deadline * 1e9),
            view,
            rows,
        )
        return self._post(call_id, receiver, self._outbox.write, call)

    def _post(
        self,
        call_id: int,
        receiver: Receiver,
        write: Callable[[_Record, float, Drain], int],
        record: _Record,
    ) -> int:
        if self._transport.has_unread:
            self._take_in()
        try:
            with self._outbox.sending.taken(receiver.deadline):
                if self.loss is not None:
                    raise another(self.loss)
                try:
                    self._pending[call_id] = receiver
                    return write(record, receiver.deadline, self._drain)
                except RingFull as error:
                    self._pending.pop(call_id, None)
                    if self._transport.is_closed:  # a part of it had left
                        self.lose(error)
                    raise
                except MoeshmError as error:
                    raise self.lose(error) from error
                except BaseException:
                    # Interrupted: whoever sent it will not ask for it, should its reply come.
                    receiver.fail(WorkerDied("the call was interrupted as it was sent"))
                    self.forget(call_id)
                    raise
        finally:
            if self._outbox.unsent:
                self._flush()

    def call(
        self,
        layer: int,
        hidden_states: Array,
        topk_ids: Array,
        topk_weights: Array,
        dtype: DType,
        view: int,
        into: Array,
        timeout_s: float,
    ) -> Answer | None:
        """Send a call of a view's local ids and receive its reply at once, its rows into `into`.

        None when another thread sends or receives, or there is no room: then nothing was sent.
        Spares a thread that would wait at once the future and the bookkeeping, half of a small
        call's time. DeadlineExceeded: as `is_held_up` of it. WorkerDied: the session is over.
        """
        deadline = time.monotonic() + timeout_s
        #: Until its reply is taken here, and should it come later.
        receiver = Nobody(deadline)
        try:
            with self._receiving.tried() as may_receive:
                # Only tried: who has it may be waiting until replies are taken in, which is ours.
                if not may_receive:
                    return None
                call_id = self.new_id()
                call = call_id, layer, hidden_states, topk_ids, topk_weights, dtype
                call_ns = int(deadline * 1e9)
                try:
                    bytes_out = self._send_now((*call, call_ns, view, None), receiver)
                    if bytes_out is None:
                        return None
                    sent_ns = time.perf_counter_ns()
                    last = deadline + GRACE_S
                    answer = self._receive_answer(call_id, dtype, into, last, sent_ns, bytes_out)
                    self._close(call_id)
                except BaseException:
                    self._has_given_up = True
                    raise
                return answer
        except (RingEmpty, RingFull) as error:
            is_held_up = self.is_held_up(receiver)
            late = too_late(timeout_s, is_held_up)
            if not is_held_up:
                self.lose(late)
            raise late from (error if isinstance(error, RingFull) else None)
        except CallError:
            raise
        except MoeshmError as error:
            raise self.lose(error) from error
        finally:
            self._stopped_receiving()

    def _send_now(self, call: Packable, receiver: Receiver) -> int | None:
        """Send a call, by who may receive; None when another thread sends, or there is no room now.
        RingFull: nor was there any before the deadline."""
        deadline = receiver.deadline
        try:
            with self._outbox.sending.tried() as may_send:
                if not may_send:
                    return None
                if self.loss is not None:
                    raise another(self.loss)
                try:
                    self._pending[call[0]] = receiver
                    return self._outbox.write_at_once(call, deadline)
                except RingFull:
                    self._pending.pop(call[0], None)
                    if time.monotonic() < deadline:
                        return None
                    raise
        finally:
            if self._outbox.unsent:
                self._flush()

    def order(self, call_id: int, receiver: Receiver, packed: bytes) -> None:
        """Send an order, whose reply will go to `receiver`. Errors as `send`."""
        self._post(call_id, receiver, self._outbox.write_order, packed)

    def describe(self, receiver: Receiver, call_id: int, packed: bytes) -> None:
        """Send a descriptor, of whose errors `receiver` will hear. Errors as `send`."""
        self._post(call_id, receiver, self._outbox.write_descriptor, packed)

    def tell(self, packed: bytes) -> None:
        """Send an order that is not answered: now, or, where there is no room, before a later
        record. Waits for nothing; to a session that is over it means nothing."""
        self._outbox.unsent.append(packed)
        self._flush()

    def forget_now(self, call_id: int) -> None:
        """No reply will come to it."""
        self._pending.pop(call_id, None)

    def forget(self, call_id: int) -> None:
        """Its reply may still come, and is then nobody's."""
        with self._state:
            receiver = self._pending.get(call_id)
            if receiver is not None:
                self._pending[call_id] = Nobody(receiver.deadline, receiver.is_in_turn)
                self._has_given_up = True

    def is_held_up(self, call: object) -> bool:
        """Whether the worker may be at a call that was sent before this one, and has time left.

        Else the session is given up at this one's deadline. `call`: the `whole` of its receivers.
        A worker that is stopped is at none; one that hangs otherwise is found out at the first's
        deadline.
        """
        now = time.monotonic()
        # In the order in which they were sent. A copy is one step, a list of its values is not.
        for receiver in self._pending.copy().values():
            if receiver.whole is call:
                return False
            if receiver.is_in_turn and receiver.deadline + GRACE_S > now:
                return not process.is_stopped(self.session.control.peer_pid)
        return False

    # --- receiving --------------------------------------------------------------------------

    def wait(self, call: Awaited, deadline: float) -> bool:
        """Receive, or let another thread receive, until the call is done; False at the deadline.

        ForkedProcess: the reply is the parent's.
        """
        self.check_process()
        while True:
            with self._state:
                if self._receiving.is_taken and not self._leave_it_to_others(call, deadline):
                    return call.is_done
                if self.loss is not None and not call.is_done:
                    # Whoever ended the session was interrupted before all were told.
                    self._end(self.loss)
                if call.is_done:
                    return True
            try:
                with self._receiving.tried() as may_receive:
                    if may_receive:
                        return self._receive_until(call, deadline)
            finally:
                self._stopped_receiving()

    def await_order(self, order: Awaited, deadline: float) -> bool:
        """As `wait`, for what may take minutes: it only looks in from time to time, so that
        meanwhile whoever makes a call can receive its reply at once."""
        self.check_process()
        while not order.is_done:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            try:
                self._drain()
            except MoeshmError as error:
                self.lose(error)
            with self._state:
                if self.loss is not None and not order.is_done:
                    self._end(self.loss)
                if not order.is_done:
                    self._state.wait(min(_ORDER_PAUSE_S, left_s))
        return True

    def lose(self, cause: Exception) -> CallError:
        """End the session and every pending call; what the calls get."""
        with self._state:
            if self.loss is None:
                # At a deadline there is no time to look, and a worker that ended it is not late.
                is_late = isinstance(cause, DeadlineExceeded)
                said = None if is_late else self.session.farewell()
                why = f"{said} ({cause})" if said else str(cause)
                self.loss = WorkerDied(f"the session with the worker is over: {why}")
            return self._end(self.loss)

    def close(self, error: CallError) -> None:
        """End the session; pending calls get `error`."""
        with self._state:
            if self.loss is None:
                self.loss = error
            self._end(error)

    def _end(self, error: CallError) -> CallError:
        """Close the session and tell everyone; holds the lock."""
        self.session.close()
        while self._pending:
            # A copy is one step, a list of its items is not.
            for call_id, receiver in self._pending.copy().items():
                # Told first: an interrupt in between must not leave it with nobody who knows of it.
                receiver.fail(another(error))
                self._pending.pop(call_id, None)
        if self.device_calls is not None:
            self.device_calls.end()
        self._state.notify_all()
        # Whoever receives may be copying rows into an array that is its caller's again once this
        # returns; with the session closed it cannot take longer than that.
        nobody_else = (0, threading.get_ident())
        patience_until = time.monotonic() + _COPY_LIMIT_S
        self._n_waiting += 1
        try:
            while self._receiving.owner not in nobody_else:
                left_s = patience_until - time.monotonic()
                if left_s <= 0:
                    break
                self._state.wait(min(left_s, _UNTOLD_S))
        finally:
            self._n_waiting -= 1
        with self._receiving.tried() as may_receive:
            # One that a signal's handler kept from being taken in refers to the session's memory.
            while may_receive and self._received:
                self._received.pop().release()
        return another(error)

    def check_process(self) -> None:
        """ForkedProcess: the session is the parent's."""
        if process.own_pid != self._pid:
            raise ForkedProcess(
                f"this call belongs to process {self._pid}; connect anew in {process.own_pid}"
            )

    # --- sending ----------------------------------------------------------------------------

    def _flush(self) -> None:
        """Send what is to be sent, unless another thread sends: it looks when it stops."""
        while self._outbox.unsent:
            with self._outbox.sending.tried() as may_send:
                if not may_send:
                    return
                try:
                    if self.loss is not None:
                        self._outbox.unsent.clear()
                    elif not self._outbox.send_unsent(None):
                        return
                except MoeshmError as error:
                    self.lose(error)

    def _take_in(self) -> None:
        """As `_drain`, before anything is sent. WorkerDied."""
        try:
            self._drain()
        except MoeshmError as error:
            raise self.lose(error) from error

    def _drain(self) -> None:
        """Take in the replies that are there, unless another thread does."""
        try:
            with self._receiving.tried() as may_receive:
                while may_receive:
                    self._receive(0.0)
        except RingEmpty:
            pass
        finally:
            self._stopped_receiving()

    def _stopped_receiving(self) -> None:
        if self._n_waiting:
            with self._state:
                self._state.notify_all()

    def _leave_it_to_others(self, call: Awaited, deadline: float) -> bool:
        """Until the call is done or nobody receives; False at the deadline. Holds the lock."""
        self._n_waiting += 1
        try:
            while self._receiving.is_taken and not call.is_done:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                # Whoever is interrupted may not have told.
                is_main = self._receiving.owner == threading.main_thread().ident
                self._state.wait(min(left_s, _UNTOLD_S if is_main else _LOOK_S))
        finally:
            self._n_waiting -= 1
        return True

    def _receive_until(self, call: Awaited, deadline: float) -> bool:
        while not call.is_done:
            try:
                self._receive(max(0.0, deadline - time.monotonic()))
            except RingEmpty:
                return call.is_done
            except MoeshmError as error:
                self.lose(error)
                return True
            if self._n_waiting:
                with self._state:
                    self._state.notify_all()
        return True

    def _receive(self, timeout_s: float) -> None:
        record = self._acquire(timeout_s)
        is_over = False
        try:
            self._give(protocol.parse_reply(record), record)
            is_over = True
        except BaseException as error:
            is_over = self._is_given_up(error)
            raise
        finally:
            if is_over:
                self._release()

    def _acquire(self, timeout_s: float) -> Message:
        """The next record, which is in `_received` until it is released. It gets there in one step:
        handlers of signals run as soon as `acquire` returns to Python, and what they raise would
        lose it."""
        if not self._received:
            self._received.extend(map(self._transport.acquire, (timeout_s,)))
        return self._received[0]

    def _is_given_up(self, error: BaseException) -> bool:
        """Whether to release a record that was not taken in. One that a signal's handler kept from
        that, by whatever it raised, stays for who receives next."""
        if isinstance(error, MoeshmError):
            return True
        self._n_failures += 1
        # Handlers run in the main thread.
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and self._n_failures <= _MOST_FAILURES:
            return False
        self.lose(SessionError(f"a reply could not be taken in: {error!r}"))
        return True

    def _release(self) -> None:
        self._n_failures = 0
        self._received.pop().release()
        # Not before: an interrupt of this leaves the record for who finds that it was taken in.
        self._last_given = -1

    def _receive_answer(
        self,
        call_id: int,
        dtype: DType,
        into: Array,
        deadline: float,
        sent_ns: int,
        bytes_out: int,
    ) -> Answer:
        while True:
            record = self._acquire(max(0.0, deadline - time.monotonic()))
            arrived_ns = time.perf_counter_ns()
            is_over = False
            try:
                n_bytes = len(record)
                compute_ns = protocol.take_plain(record, call_id, into, dtype)
                if compute_ns >= 0:
                    is_over = True
                    return Answer(None, sent_ns, arrived_ns, compute_ns, bytes_out, n_bytes)
                reply = protocol.parse_reply(record)
                if reply.call_id == call_id:
                    reply.copy_rows(record, into, dtype)
                    is_over = True
                    return Answer(
                        reply.error, sent_ns, arrived_ns, reply.compute_ns, bytes_out, n_bytes
                    )
                self._give(reply, record)
                is_over = True
            except BaseException as error:
                is_over = self._is_given_up(error)
                raise
            finally:
                if is_over:
                    self._release()
            if self._n_waiting:
                with self._state:
                    self._state.notify_all()

    def _give(self, reply: Reply, record: Message) -> None:
        """To who waits for it; a second time does nothing."""
        call_id = reply.call_id
        receiver = self._pending.get(call_id)
        if receiver is None:
            if call_id == self._last_given:
                return
            raise ProtocolError(f"a reply to call {call_id}, which is not open")
        # Unanswered until it has all: else it is told with the others when the session ends.
        receiver.take(reply, record)
        self._last_given = call_id
        self._close(call_id)

    def _close(self, call_id: int) -> None:
        """It was answered, and so was all that was sent before it in its turn: what was given up
        and still waits never left."""
        if self._has_given_up:
            self._forget_unsent(call_id)
        self._pending.pop(call_id, None)

    def _forget_unsent(self, answered: int) -> None:
        # First: who gives one up meanwhile says so again.
        self._has_given_up = False
        is_before = answered in self._pending and self._pending[answered].is_in_turn
        for call_id, receiver in self._pending.copy().items():
            if call_id == answered:
                is_before = False
            elif type(receiver) is Nobody and receiver.is_in_turn:
                if is_before:
                    self._pending.pop(call_id, None)
                else:
                    self._has_given_up = True
