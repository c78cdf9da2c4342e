"""What a worker holds for a client: views, and what one session names them by."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec

from . import orders
from .errors import (
    CallError,
    ClientClosed,
    DeadlineExceeded,
    InvalidCall,
    ProtocolError,
    RingFull,
    SessionError,
    WorkerDied,
)
from .layers import LayerInfo
from .orders import Hold, Offer, Release
from .protocol import Message, Reply

if TYPE_CHECKING:
    from .link import Link

#: Experts of a large checkpoint may come from a slow disk.
HOLD_TIMEOUT_S = 600.0


class HeldView:
    """A set of experts by layer that a worker holds for a client: what the local ids of a call
    mean. Made by `ExpertClient.hold`."""

    def __init__(self, layers: Mapping[int, LayerInfo]) -> None:
        #: Local id `i` of a layer is its expert `layers[layer].experts[i]`.
        self.layers = MappingProxyType(dict(layers))

    @property
    def experts(self) -> dict[int, tuple[int, ...]]:
        """By layer, the model's experts in local order."""
        return {layer: info.experts for layer, info in self.layers.items()}


class SessionNumbers:
    """The numbers of a session's views, and the orders to hold, offer and release them.

    Every method may be called by several threads.
    """

    def __init__(self, link: Link) -> None:
        # Weak, as the link owns this: a client that is forgotten must end at once.
        self._link: Link = weakref.proxy(link)
        self._numbers: dict[HeldView, int] = {}
        # None is used again, so that a call is never of another view than it meant.
        self._unused = itertools.count(1)

    def of(self, view: HeldView) -> int:
        """What calls name the view by; InvalidCall when it is not held."""
        number = self._numbers.get(view)
        if number is None:
            raise not_held()
        return number

    def put(self, view: HeldView, number: int) -> None:
        """Calls may name the view by this number, which `hold` gave, or 0."""
        self._numbers[view] = number

    def adopt(self, views: Sequence[HeldView]) -> None:
        """Number 0, the welcome's layers, is the last of these that has the same; without one, the
        worker need not hold them for this session."""
        layers = self._link.session.welcome.layers
        same = next((view for view in reversed(views) if view.layers == layers), None)
        if same is None:
            self.release_number(0)
        else:
            self.put(same, 0)

    def differ(self, views: Collection[HeldView]) -> tuple[list[HeldView], list[HeldView]]:
        """Those of these that have no number, and others that have one."""
        numbered = list(self._numbers)
        missing = [view for view in views if view not in numbered]
        return missing, [view for view in numbered if view not in views]

    def hold(
        self, experts: Mapping[int, Sequence[int]], timeout_s: float
    ) -> tuple[int, dict[int, LayerInfo]]:
        """Let the worker hold them, by layer in local order; the number of that view, and its
        layers, once it does: `put` it, or `release_number`.

        DeadlineExceeded: they are not loaded in time; the session lives. InvalidCall: they cannot
        be, or the worker is too old. WorkerFailed: it said so. WorkerDied: the session is over.
        """
        welcome = self._link.session.welcome
        if not welcome.takes_orders:
            raise InvalidCall(
                f"the worker (moeshm {welcome.version!r}) holds what it was started with and takes "
                "no orders; update the worker"
            )
        wanted = orders.check_experts(experts)
        order = Hold(self._link.new_id(), next(self._unused), wanted)
        packed = orders.pack_order(order)
        if len(packed) > orders.MAX_ORDER_BYTES:
            raise InvalidCall(
                f"{sum(map(len, wanted.values()))} experts take {len(packed)} bytes to ask for, "
                f"and {orders.MAX_ORDER_BYTES} is the most; hold fewer"
            )
        held = _Held(time.monotonic() + timeout_s)
        late = DeadlineExceeded(
            f"the experts were not loaded within {timeout_s:.3g} s; allow more time (timeout_s)"
        )
        try:
            self._link.order(order.call_id, held, packed)
            if not self._link.await_order(held, held.deadline):
                raise late
        except RingFull:  # nothing was sent
            raise late from None
        except BaseException:
            # Nobody will know of the view. Where it never got to the worker, this means nothing.
            self._link.forget(order.call_id)
            self.release_number(order.view)
            raise
        if held.error is not None:
            raise held.error
        try:
            return order.view, _listing(held.layers, wanted)
        except ProtocolError as error:
            raise self._link.lose(error) from None

    def offer(self, view: HeldView) -> None:
        """New sessions are offered this view's experts, unless this session does not hold it."""
        number = self._numbers.get(view)
        if number is not None:
            self._tell(Offer(number))

    def release(self, view: HeldView) -> None:
        """Let the worker forget the view, which no later call can name. A session that is over
        has forgotten it."""
        number = self._numbers.pop(view, None)
        if number is not None:
            self.release_number(number)

    def release_number(self, number: int) -> None:
        """As `release`, of a view that no call may name."""
        self._tell(Release(number))

    def _tell(self, order: Offer | Release) -> None:
        if self._link.session.welcome.takes_orders:
            self._link.tell(orders.pack_order(order))


def _listing(
    layers: Mapping[int, LayerInfo], wanted: Mapping[int, tuple[int, ...]]
) -> dict[int, LayerInfo]:
    """The layers that a worker says it holds, with the experts that it was asked for."""
    if layers.keys() != wanted.keys():
        raise ProtocolError(f"asked for layers {[*wanted]}, the worker has {[*layers]}")
    try:
        return {n: msgspec.structs.replace(layers[n], experts=ids) for n, ids in wanted.items()}
    except ValueError as error:
        raise ProtocolError(f"what the worker says it holds cannot be: {error}") from None


class ClientViews:
    """The views that a client's calls may name, over all its sessions.

    Every method may be called by several threads.
    """

    def __init__(self, first: HeldView, link: Link) -> None:
        #: The newest last.
        self._views = [first]
        #: What new sessions of the worker are to begin with, as far as this client has a say.
        self._offered: HeldView | None = None
        self._lock = threading.Lock()
        link.views.put(first, 0)

    def add(self, view: HeldView, number: int, link: Link, current: Callable[[], Link]) -> bool:
        """Let calls name a view that the session holds; False when it is not the client's any
        more."""
        with self._lock:
            if link is not current():
                return False
            link.views.put(view, number)
            self._views.append(view)
            return True

    def offer(self, view: HeldView, current: Callable[[], Link]) -> None:
        """Let the worker offer it to new sessions, also after a loss; InvalidCall when it is not
        the client's."""
        with self._lock:
            if view not in self._views:
                raise not_held()
            self._offered = view
            # Within the lock, which waits for nothing, so that the newest offer is the last.
            current().views.offer(view)

    def discard(self, view: HeldView) -> None:
        """Sessions to come need not hold it; InvalidCall when they would not."""
        with self._lock:
            if view not in self._views:
                raise not_held()
            self._views.remove(view)
            if view is self._offered:
                self._offered = None

    def restore(self, link: Link, use: Callable[[Link], None]) -> None:
        """`use` a new session, once the worker holds there what it held before.

        SessionError: it cannot.
        """
        with self._lock:
            views = list(self._views)
        link.views.adopt(views)
        while True:
            with self._lock:
                # Other threads may have held and released some in the meantime.
                views = list(self._views)
                missing, extra = link.views.differ(views)
                if not missing:
                    use(link)
                    if self._offered is not None:
                        link.views.offer(self._offered)
                    break
            for view in missing:
                link.views.put(view, _hold_again(link, view))
        for view in extra:
            link.views.release(view)


def _hold_again(link: Link, view: HeldView) -> int:
    """The view's number; SessionError when the worker cannot hold it."""
    why = "it is another model"
    try:
        number, layers = link.views.hold(view.experts, HOLD_TIMEOUT_S)
        if layers == view.layers:
            return number
    except (WorkerDied, ClientClosed):
        raise
    except CallError as error:
        why = str(error)
    raise SessionError(
        f"the worker holds other layers than before, and not those again ({why}); open a new client"
    )


def not_held() -> InvalidCall:
    """A call, or a release, of a view that cannot be."""
    return InvalidCall("this view was released, or is another client's; hold it anew")


class _Held:
    """Receives the answer to an order."""

    is_in_turn = False

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.is_done = False
        self.layers: Mapping[int, LayerInfo] = {}
        self.error: CallError | None = None

    @property
    def whole(self) -> object:
        """As `Receiver.whole`."""
        return self

    def take(self, reply: Reply, record: Message) -> None:
        """As `Receiver.take`."""
        if reply.error is None:
            if reply.layers is None:
                raise ProtocolError(f"rows of {len(record)} bytes answer an order")
            self.layers = reply.layers
        self.error = reply.error
        self.is_done = True

    def fail(self, error: CallError) -> None:
        """As `Receiver.fail`."""
        if not self.is_done:
            self.error = error
            self.is_done = True
