"""The views of one session: held at the client's order, loaded meanwhile, released."""

from __future__ import annotations

import collections
import logging
import threading
from collections.abc import Callable, Iterator, Mapping

from . import protocol, settings
from .backends import Backend
from .errors import CallError, CheckpointError, DeviceLost, InvalidCall, WorkerFailed
from .holdings import Holdings, View
from .layers import LayerInfo
from .orders import MAX_VIEWS, Hold, Offer, Release
from .protocol import PlainShape

_log = logging.getLogger(__name__)


#: Raises InvalidCall for layers that the session cannot carry.
Check = Callable[[Mapping[int, LayerInfo]], None]


class _Load:
    """One order to hold, and what came of it."""

    def __init__(self, order: Hold) -> None:
        self.order = order
        self.view: View | None = None
        self.error: CallError | None = None
        self.is_done = False
        #: The client released it before it was there.
        self.is_unwanted = False

    def take_back(self) -> None:
        """It need not be begun."""
        number = self.order.view
        self.error = InvalidCall(f"view {number} was released before it was loaded")
        self.is_done = True


class SessionViews:
    """What the view numbers of one session mean; 0 is the view that it began with.

    The session's thread calls it; experts are loaded in another, one order after the other. Use
    it as a context, whose end releases every view.
    """

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self.backend: Backend = holdings.backend
        first = holdings.lease()
        #: As of the beginning, for the welcome.
        self.layers: Mapping[int, LayerInfo] = first.layers
        self._views = {0: first}
        #: For `protocol.read_plain`; of all the views.
        self.shapes: dict[int, PlainShape] = protocol.plain_shapes(first.layers, first.tables)
        #: Orders that are not answered; the first one is being carried out.
        self.queue: collections.deque[_Load] = collections.deque()
        #: Why the worker's device will keep no experts any more.
        self.device_lost: DeviceLost | None = None
        self._lock = threading.Lock()
        self._is_over = False
        self._max_experts = settings.current().max_experts_per_session

    def of(self, number: int) -> View:
        """The view of that number; InvalidCall names the ones there are."""
        view = self._views.get(number)
        if view is None:
            raise InvalidCall(
                f"view {number} is not held in this session; it holds {sorted(self._views)}: call "
                "once the order to hold it is answered"
            )
        return view

    def hold(self, order: Hold) -> None:
        """Begin, or queue it; `answers` tells of the end. InvalidCall: it cannot be."""
        taken = {*self._views, *(load.order.view for load in self.queue)}
        if order.view in taken:
            raise InvalidCall(f"view {order.view} is in use; number the new one otherwise")
        if len(taken) >= MAX_VIEWS:
            raise InvalidCall(f"{len(taken)} views; release one first, {MAX_VIEWS} is the most")
        n_listed = sum(map(len, order.experts.values())) + self._n_listed()
        if n_listed > self._max_experts:
            raise InvalidCall(
                f"{n_listed} experts listed by this session's views; "
                f"MOESHM_MAX_EXPERTS_PER_SESSION={self._max_experts} of the worker allows no more: "
                "release a view first, or hold fewer"
            )
        self.queue.append(_Load(order))
        if len(self.queue) == 1:
            self._begin(self.queue[0])

    def _n_listed(self) -> int:
        """Experts in the views that were ordered; those of the welcome are nobody's wish."""
        held = [view.layers for number, view in self._views.items() if number]
        listed = [info.experts for layers in held for info in layers.values()]
        listed += [ids for load in self.queue for ids in load.order.experts.values()]
        return sum(map(len, listed))

    def offer(self, order: Offer) -> None:
        """New sessions begin with the view; one that is not held means nothing."""
        view = self._views.get(order.view)
        if view is not None:
            self._holdings.offer(view)

    def release(self, order: Release) -> None:
        """Let go of a view, or of one that is still being loaded; of any other, nothing."""
        for load in self.queue:
            # A client may lose patience.
            load.is_unwanted |= load.order.view == order.view
        view = self._views.pop(order.view, None)
        if view is not None:
            for layer in view.layers:
                del self.shapes[order.view << 32 | layer]
            self._holdings.release(view)

    def answers(self, check: Check) -> Iterator[tuple[int, Mapping[int, LayerInfo] | CallError]]:
        """The call ids of the orders that are carried out by now, each with the layers that are
        held, or why they are not."""
        while self.queue and self.queue[0].is_done:
            load = self.queue.popleft()
            outcome = self._finish(load, check)
            if self.queue:
                self._begin(self.queue[0])
            yield load.order.call_id, outcome

    def _begin(self, load: _Load) -> None:
        if load.is_unwanted:
            load.take_back()
            return
        thread = threading.Thread(
            target=self._run, args=(load,), name="moeshm-loading", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # no more threads, or no memory for one's stack
            load.error = WorkerFailed(f"no thread to load experts with: {error}")
            load.is_done = True

    def _run(self, load: _Load) -> None:
        try:
            view = self._holdings.hold(
                load.order.experts, lambda: not (load.is_unwanted or self._is_over)
            )
        except CallError as error:
            load.error = type(error)(str(error))
        except CheckpointError as error:
            load.error = InvalidCall(str(error))
        except MemoryError as error:
            load.error = WorkerFailed(f"no memory for more experts ({error}); hold fewer")
        except Exception as error:  # whatever it is, the client must hear of it
            if isinstance(error, DeviceLost):
                # Another, without the frames.
                self.device_lost = DeviceLost(str(error))
            _log.exception("experts could not be loaded")
            load.error = WorkerFailed(f"{type(error).__name__}: {error}")
        else:
            with self._lock:
                if not self._is_over:
                    load.view = view
            if load.view is None:
                self._holdings.release(view)
        load.is_done = True

    def _finish(self, load: _Load, check: Check) -> Mapping[int, LayerInfo] | CallError:
        """Let calls use the view; why they may not."""
        number, view = load.order.view, load.view
        if load.is_unwanted:
            load.take_back()
        elif view is not None:
            try:
                check(view.layers)
            except CallError as error:
                # Another, without the frames: they hold the session's last record.
                load.error = type(error)(str(error))
        if load.error is not None:
            if view is not None:
                self._holdings.release(view)
            return load.error
        assert view is not None
        self._views[number] = view
        self.shapes.update(protocol.plain_shapes(view.layers, view.tables, number))
        return view.layers

    def __enter__(self) -> SessionViews:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_over = True
        loaded = [load.view for load in self.queue if load.view is not None]
        for view in (*loaded, *self._views.values()):
            self._holdings.release(view)
