"""The serve loop: one thread a session takes calls, waits its turn, and answers."""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Mapping
from types import TracebackType

from . import protocol
from .backends import Backend
from .dtypes import Array
from .errors import (
    CallError,
    Corrupt,
    DeadlineExceeded,
    InvalidCall,
    MoeshmError,
    PeerDied,
    ProtocolError,
    RingClosed,
    RingEmpty,
    RingFull,
    WorkerFailed,
)
from .layers import LayerInfo
from .protocol import Call, CallFields, Goodbye, Message
from .session import Session
from .transport import Outgoing

_log = logging.getLogger(__name__)

#: How often an idle session looks whether the worker shuts down.
_IDLE_SLICE_S = 0.1
#: A client that leaves its replies unread for so long loses its session.
REPLY_TIMEOUT_S = 10.0


class Turns:
    """A lock that is first come, first served: every session computes one call in its turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_taken = False
        self._queue: collections.deque[threading.Lock] = collections.deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._queue.append(gate)
        # Handed over by whoever leaves, so that nobody can push in.
        gate.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().release()
            else:
                self._is_taken = False


class SessionServer:
    """Answers the calls of one session until it ends; `serve` runs in a thread of its own."""

    def __init__(
        self, session: Session, backend: Backend, turns: Turns, draining: threading.Event
    ) -> None:
        self._session = session
        self._transport = session.transport
        self._max_tokens = session.welcome.max_tokens
        self._backend = backend
        self._layers: Mapping[int, LayerInfo] = backend.layers
        self._turns = turns
        self._draining = draining
        self.calls = 0
        self.rows = 0

    def serve(self) -> str:
        """Until the client leaves or dies, or the worker drains; why it ended."""
        try:
            while True:
                try:
                    record = self._transport.acquire(_IDLE_SLICE_S)
                except RingEmpty:
                    if self._draining.is_set():
                        return self._say_goodbye("the worker shuts down")
                    continue
                self._answer(record)
        except RingClosed:
            return "the client closed it"
        except PeerDied as error:
            return str(error)
        except RingFull:
            return self._say_goodbye(f"replies lay unread for {REPLY_TIMEOUT_S:g} s")
        except (ProtocolError, Corrupt) as error:
            return self._say_goodbye(f"the client broke the protocol: {error}")

    def _answer(self, record: Message) -> None:
        try:
            call_id, fields = protocol.read_call_header(record)
            error = self._try(record, fields)
            if error is not None:
                parts = protocol.pack_error(call_id, error)
                self._transport.write(parts, protocol.REPLY, 0, REPLY_TIMEOUT_S)
        finally:
            try:
                record.release()
            except BufferError:
                # A backend still refers to the inputs: the record goes with its last view.
                _log.debug("a record is in use after its call", exc_info=True)

    def _try(self, record: Message, fields: CallFields) -> CallError | None:
        """Compute and send; what went wrong, without the frames that hold views of the record,
        which cannot be released before they are gone."""
        try:
            self._compute(protocol.parse_call(record, fields, self._layers, self._max_tokens))
        except CallError as error:
            return type(error)(str(error))
        return None

    def _compute(self, call: Call) -> None:
        """Compute the call into a reply in place, and send it."""
        n_tokens, hidden_size = call.hidden_states.shape
        reply = self._transport.reserve(
            protocol.reply_bytes(n_tokens, hidden_size, call.dtype),
            protocol.REPLY,
            0,
            REPLY_TIMEOUT_S,
        )
        try:
            rows = reply.array(call.dtype.numpy, (n_tokens, hidden_size), protocol.HEADER_BYTES)
            with self._turns:
                start_ns = time.monotonic_ns()
                if 0 < call.deadline_ns < start_ns:
                    raise DeadlineExceeded(
                        "the deadline passed before the call's turn came; "
                        "send less at once, or allow more time"
                    )
                self._run_backend(call, rows)
                compute_ns = time.monotonic_ns() - start_ns
            del rows
            protocol.pack_reply(reply, call.call_id, n_tokens, hidden_size, call.dtype, compute_ns)
            _commit(reply)
        except BaseException:
            reply.abort()
            raise
        self.calls += 1
        self.rows += n_tokens

    def _run_backend(self, call: Call, rows: Array) -> None:
        try:
            self._backend.ffn(
                call.layer, call.hidden_states, call.topk_ids, call.topk_weights, rows
            )
        except InvalidCall:
            raise
        except Exception as error:
            _log.exception("layer %d: the backend failed", call.layer)
            raise WorkerFailed(f"{type(error).__name__}: {error}") from None

    def _say_goodbye(self, reason: str) -> str:
        try:
            self._session.control.send(Goodbye(reason), [], _IDLE_SLICE_S)
        except MoeshmError:
            _log.debug("the client was gone before the worker's goodbye")
        return reason


def _commit(reply: Outgoing) -> None:
    try:
        reply.commit()
    except BufferError as error:
        raise WorkerFailed(f"the backend keeps the array for its result: {error}") from None
