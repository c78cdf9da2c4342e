"""A call of arrays on the engine's GPU: as its caller has it, and its parts on their way."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from . import settings
from ._claims import Claim
from .device_arrays import DeviceInputs
from .dtypes import Array
from .errors import CallError, DeadlineExceeded, NotReady, ProtocolError, WorkerDied
from .link import Link
from .protocol import Message, Reply
from .receivers import another
from .transport.slab import DONE, GIVEN, TAKEN

if TYPE_CHECKING:
    from .device_watch import Watch

#: How often a waiting thread looks for signals, and whether the call has ended otherwise.
_SLICE_S = 0.01
#: How long it leaves a part alone that another thread is told of.
_SETTLED_PAUSE_S = 0.0002

#: `(layer, hidden_states, topk_ids, topk_weights, cause)`: the output, computed elsewhere.
HostFallback = Callable[[int, Array, Array, Array, WorkerDied | DeadlineExceeded], Array]


class Given(NamedTuple):
    """A call's arrays, checked, and the stream's handle."""

    layer: int
    inputs: DeviceInputs
    #: What the caller gets, and where that is.
    output: Any
    out_address: int
    stream: int


class DeviceCall(msgspec.Struct, frozen=True, gc=False):
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


class DeviceFuture(msgspec.Struct, eq=False, weakref=True):
    """The result of a `submit` of arrays on a GPU. Made by ExpertClient.

    The inputs and the output belong to the call until the stream has passed it.
    """

    layer: int
    deadline: float
    timeout_s: float
    on_taken: Callable[[int], None]
    _output: Any
    #: Descriptors that the call was cut into, and bytes that were given.
    n_parts: int = 0
    bytes_out: int = 0
    #: That are not settled: they refer to the session, which must end with its client.
    _parts: list[Part] = []
    _error: CallError | None = None

    # An array is fetched from its GPU to be shown.
    __repr__ = object.__repr__

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
        InvalidCall: an id is out of range. WorkerFailed: the worker said so. ForkedProcess.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for part in tuple(self._parts):
            part.link.check_process()
            while not part.is_settled:
                if part.is_over or part.wait(TAKEN, _SLICE_S):
                    part.watch.settle()
                    if not part.is_settled:
                        # Another thread is about to.
                        time.sleep(_SETTLED_PAUSE_S)
                if until is not None and time.monotonic() > until and not part.is_settled:
                    raise NotReady(f"no result within {timeout_s} s; the call is still on its way")
        return self.result()

    def add(self, part: Part) -> None:
        """It is on its way."""
        self._parts.append(part)
        self.n_parts += 1
        self.bytes_out += part.claim.given_bytes

    def fail(self, error: CallError) -> None:
        """The first error of several stays."""
        self._error = self._error or error

    def settled(self, part: Part) -> None:
        """Nothing of it is on its way; again does nothing."""
        if part in self._parts:
            self._parts.remove(part)
            if self._error is None:
                self.on_taken(part.claim.out_bytes)


class Part(msgspec.Struct, eq=False):
    """One descriptor's part of a call; a `Receiver` of what is wrong with it."""

    future: DeviceFuture
    link: Link
    watch: Watch
    claim: Claim
    inputs: DeviceInputs
    fallback: HostFallback | None
    call_id: int
    #: Of time.monotonic.
    deadline: float
    #: What the worker said, and why there will be no more words of its.
    told: CallError | None = None
    loss: CallError | None = None
    #: Whoever submits it has enqueued what there will be of it.
    is_begun: bool = False
    #: `give`, and `take`, are on the stream: their flags will be set.
    has_give: bool = False
    has_take: bool = False
    #: The stream need not wait for the worker any more.
    is_released: bool = False
    #: So it is, and the worker, which lives, will still come to it.
    is_abandoned: bool = False
    #: When the worker will have had time enough, of time.monotonic; 0.0 for not known yet.
    late_at: float = 0.0
    #: The same, and it has done nothing else meanwhile: when the session is given up for it.
    given_up_at: float = 0.0
    #: The thread that tells its future why it was refused, as of threading.get_ident; 0 for none.
    teller: int = 0
    #: Its future knows of the end.
    is_settled: bool = False

    @property
    def is_over(self) -> bool:
        """Nothing of it is on its way."""
        if self.has_take:
            return self.claim.has_reached(TAKEN)
        is_given = not self.has_give or self.claim.has_reached(GIVEN)
        return self.is_begun and self.is_released and is_given

    @property
    def whole(self) -> object:
        """As `Receiver.whole`."""
        return self.future

    @property
    def is_in_turn(self) -> bool:
        """As `Receiver.is_in_turn`: no more when the worker has passed it."""
        return not self.is_passed

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

    @property
    def is_passed(self) -> bool:
        """The worker uses nothing of it any more."""
        return self.claim.is_passed if self.is_abandoned else self.claim.has_reached(DONE)

    def release(self) -> None:
        """Let the stream go on, in the place of a worker that never comes to it."""
        self.is_released = True
        self.claim.set(DONE, self.claim.sequence)
        if not self.has_take:
            # Else a worker that ends waits for it to come.
            self.claim.set(TAKEN, self.claim.sequence)

    def abandon(self) -> None:
        """Let the stream go on before the worker, which may still write to the output."""
        self.is_released = self.is_abandoned = True
        self.claim.abandon()

    def settle(self) -> None:
        """Its future knows."""
        if self.is_abandoned:
            self.claim.abandon_taken()
        self.future.settled(self)
        self.is_settled = True

    def has_reached(self, flag: int) -> bool:
        """That flag was set for it."""
        return self.claim.has_reached(flag)

    def wait(self, flag: int, timeout_s: float) -> bool:
        """Until that flag is set for it; False at the timeout."""
        spin_ns = int(settings.current().spin_us * 1e3)
        return self.claim.wait(flag, int(timeout_s * 1e9), spin_ns)
