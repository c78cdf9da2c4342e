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
    DeadlineExceeded,
    InvalidCall,
    ProtocolError,
    RingFull,
    SessionError,
    WorkerDied,
)
from .layers import LayerInfo
from .orders import Hold, Release
from .protocol import Message, Reply

if TYPE_CHECKING:
    from .link import Link

#: Experts of a large checkpoint may come from a slow disk.
HOLD_TIMEOUT_S = 600.0
#: A worker that takes no record for so long hangs.
_RELEASE_TIMEOUT_S = 10.0


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
    """The numbers of a session's views, and the orders to hold and release them.

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
            self._release(0)
        else:
            self.put(same, 0)

    def differ(self, views: Collection[HeldView]) -> tuple[list[HeldView], list[HeldView]]:
        """Those of these that have no number, and others that have one."""
        numbered = list(self._numbers)
        missing = [view for view in views if view not in numbered]
        return missing, [view for view in numbered if view not in views]

    def hold(
        self, experts: Mapping[int, Sequence[int]], timeout_s: float, is_default: bool = True
    ) -> tuple[int, dict[int, LayerInfo]]:
        """Let the worker hold them, by layer in local order; the number of that view, and its
        layers, once it does. `is_default`: new sessions begin with it.

        DeadlineExceeded: they are not loaded in time; the session lives. InvalidCall, WorkerFailed:
        the worker said so. WorkerDied: the session is over.
        """
        wanted = {layer: tuple(ids) for layer, ids in experts.items()}
        order = Hold(self._link.new_id(), next(self._unused), wanted, is_default)
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
        except RingFull:
            raise late from None
        if not self._link.wait(held, held.deadline):
            self._link.forget(order.call_id)
            self._release(order.view)
            raise late
        if held.error is not None:
            raise held.error
        if held.layers.keys() != wanted.keys():
            wrong = ProtocolError(f"asked for layers {[*wanted]}, the worker has {[*held.layers]}")
            raise self._link.lose(wrong)
        replace = msgspec.structs.replace
        return order.view, {n: replace(held.layers[n], experts=ids) for n, ids in wanted.items()}

    def release(self, view: HeldView) -> None:
        """Let the worker forget the view, which no later call can name. A session that is over
        has forgotten it."""
        number = self._numbers.pop(view, None)
        if number is not None:
            self._release(number)

    def _release(self, number: int) -> None:
        nobody = _Held(time.monotonic() + _RELEASE_TIMEOUT_S)
        try:
            self._link.order(None, nobody, orders.pack_order(Release(number)))
        except RingFull as error:
            self._link.lose(error)
        except CallError:
            return


class ClientViews:
    """The views that a client's calls may name, over all its sessions.

    Every method may be called by several threads.
    """

    def __init__(self, first: HeldView, link: Link) -> None:
        #: The newest last.
        self._views = [first]
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

    def discard(self, view: HeldView) -> None:
        """Sessions to come need not hold it; InvalidCall when they would not."""
        with self._lock:
            if view not in self._views:
                raise not_held()
            self._views.remove(view)

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
                    break
            for view in missing:
                link.views.put(view, _hold_again(link, view, view is views[-1]))
        for view in extra:
            link.views.release(view)


def _hold_again(link: Link, view: HeldView, is_default: bool) -> int:
    """The view's number; SessionError when the worker cannot hold it."""
    why = "it is another model"
    try:
        number, layers = link.views.hold(view.experts, HOLD_TIMEOUT_S, is_default)
        if layers == view.layers:
            return number
    except WorkerDied:
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

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.is_done = False
        self.layers: Mapping[int, LayerInfo] = {}
        self.error: CallError | None = None

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
