"""The calls of one session that are on their way, and who receives for all of them.

There is no receiving thread: of the threads that wait for a result, one receives, gives the others
theirs, and hands over when it has its own.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

from . import protocol
from .dtypes import Array, DType
from .errors import (
    CallError,
    MoeshmError,
    ProtocolError,
    RingEmpty,
    RingFull,
    WorkerDied,
)
from .protocol import Message, Reply
from .session import Session

#: How long a sender leaves a full transport alone before it looks for replies again.
_FULL_PAUSE_S = 0.001


class Receiver(Protocol):
    """Who a reply is for."""

    #: Of time.monotonic.
    deadline: float

    def take(self, reply: Reply, record: Message) -> None:
        """Copy the rows out of the record; ProtocolError when they are not what was asked for."""
        ...

    def fail(self, error: CallError) -> None:
        """There will be no rows."""
        ...


class Awaited(Protocol):
    """What a thread waits for."""

    is_done: bool


class Link:
    """One session and its pending calls. Every method may be called by several threads."""

    def __init__(self, session: Session) -> None:
        self.session = session
        #: Most tokens in one call.
        self.max_tokens = session.welcome.max_tokens
        self._transport = session.transport
        self._pending: dict[int, Receiver] = {}
        self._ids = itertools.count(1)
        self._sending = threading.Lock()
        self._state = threading.Lock()
        self._changed = threading.Condition(self._state)
        self._is_receiving = False
        self._n_waiting = 0
        #: Why the session is over; None while it lives.
        self.loss: WorkerDied | None = None

    def send(
        self,
        receiver: Receiver,
        layer: int,
        hidden_states: Array,
        topk_ids: Array,
        topk_weights: Array,
        dtype: DType,
    ) -> int:
        """Send a call of local ids, whose reply will go to `receiver`; how many bytes it took.

        RingFull: no room before the receiver's deadline; nothing was sent. WorkerDied: the session
        is over; the receiver was told, too.
        """
        call_id = next(self._ids)
        parts = protocol.pack_call(
            call_id, layer, hidden_states, topk_ids, topk_weights, dtype, receiver.deadline
        )
        with self._sending:
            if self.loss is not None:
                raise self.loss
            self._pending[call_id] = receiver
            try:
                self._write(parts, receiver.deadline)
            except RingFull:
                self._pending.pop(call_id, None)
                raise
            except MoeshmError as error:
                raise self.lose(error) from error
        n_tokens, top_k = topk_ids.shape
        return protocol.call_bytes(n_tokens, top_k, hidden_states.shape[1], dtype)

    def wait(self, call: Awaited, deadline: float) -> bool:
        """Receive, or let another thread receive, until the call is done; False at the deadline."""
        while True:
            with self._state:
                if self._is_receiving and not self._leave_it_to_others(call, deadline):
                    return call.is_done
                if call.is_done:
                    return True
                self._is_receiving = True
            try:
                return self._receive_until(call, deadline)
            finally:
                self._stop_receiving()

    def lose(self, cause: Exception) -> WorkerDied:
        """End the session and every pending call; what the calls get."""
        with self._state:
            if self.loss is None:
                said = self.session.farewell()
                why = f"{said} ({cause})" if said else str(cause)
                self.loss = WorkerDied(f"the session with the worker is over: {why}")
            self.session.close()
            while self._pending:
                self._pending.popitem()[1].fail(self.loss)
            self._changed.notify_all()
            return self.loss

    def close(self, error: CallError) -> None:
        """End the session; pending calls get `error`."""
        with self._state:
            if self.loss is None:
                self.loss = WorkerDied(str(error))
            self.session.close()
            while self._pending:
                self._pending.popitem()[1].fail(error)
            self._changed.notify_all()

    def _write(self, parts: Sequence[Any], deadline: float) -> None:
        try:
            self._transport.write(parts, protocol.CALL, 0, 0.0)
            return
        except RingFull:
            pass
        # The worker may wait for room for a reply: without taking replies in, both would wait.
        while True:
            self._drain()
            try:
                self._transport.write(parts, protocol.CALL, 0, _FULL_PAUSE_S)
                return
            except RingFull:
                if time.monotonic() > deadline:
                    raise

    def _drain(self) -> None:
        """Take in the replies that are there, unless another thread does."""
        with self._state:
            if self._is_receiving:
                return
            self._is_receiving = True
        try:
            while True:
                self._receive(0.0)
        except RingEmpty:
            pass
        finally:
            self._stop_receiving()

    def _stop_receiving(self) -> None:
        with self._state:
            self._is_receiving = False
            if self._n_waiting:
                self._changed.notify_all()

    def _leave_it_to_others(self, call: Awaited, deadline: float) -> bool:
        """Until the call is done or nobody receives; False at the deadline. Holds the lock."""
        self._n_waiting += 1
        try:
            while self._is_receiving and not call.is_done:
                if not self._changed.wait(deadline - time.monotonic()):
                    return False
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
                    self._changed.notify_all()
        return True

    def _receive(self, timeout_s: float) -> None:
        record = self._transport.acquire(timeout_s)
        try:
            reply = protocol.parse_reply(record)
            receiver = self._pending.pop(reply.call_id, None)
            if receiver is None:
                raise ProtocolError(f"a reply to call {reply.call_id}, which is not open")
            receiver.take(reply, record)
        finally:
            record.release()
