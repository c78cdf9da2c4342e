"""The session that a client has, and the one that takes its place once it is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from .engine_device import Engine
from .errors import ClientClosed, WorkerDied
from .handshake import SlabWish
from .held import ClientViews, HeldView
from .link import Link
from .reconnect import Reconnector
from .session import Session
from .stats import StatsCounter

_log = logging.getLogger(__name__)

#: How long `close` waits for what streams still do with a slab.
_SLAB_CLOSE_S = 5.0


class Opened(NamedTuple):
    """A session, and whether it took a new worker process."""

    session: Session
    is_new_process: bool


class Sessions:
    """One client's, of which it has one at a time. Any thread may call it."""

    def __init__(
        self,
        open_session: Callable[[SlabWish], Opened],
        on_close: Callable[[], None],
        batch_capacity: int,
        engine: Engine,
        counter: StatsCounter,
    ) -> None:
        self._open_session = open_session
        self._on_close = on_close
        self._capacity = batch_capacity
        self._engine = engine
        self._counter = counter
        self._reconnector = Reconnector(on_close)
        #: `close` has begun, and has come to its end.
        self._is_closed = self._is_ended = False
        #: The session that takes the last one's place, until it holds the views.
        self._coming: Link | None = None
        #: The newest: that of calls.
        self.link = self._connect(is_first=True)
        #: What the worker held when the first was opened, and all that is to be held.
        self.first_view = HeldView(self.link.session.welcome.layers)
        self.views = ClientViews(self.first_view, self.link)

    def live(self, deadline: float, can_fall_back: bool) -> Link:
        """The session, a new one if the last was lost; until `deadline`, of time.monotonic, or not
        so long for what can be computed elsewhere.

        WorkerDied: there is none to be had. ClientClosed.
        """
        self.check_open()
        link = self.link
        if link.loss is None:
            return link
        try:
            found = self._reconnector.link(
                self._reconnect, lambda: self.link, deadline, can_fall_back
            )
        except WorkerDied:
            if not self._is_closed:
                raise
        else:
            if not self._is_closed:
                return found
            # By another thread in the meantime, who knew nothing of what was opened.
            found.close(ClientClosed("the client was closed while it connected anew"))
        self._on_close()
        raise ClientClosed("the client was closed while it reached for a new worker")

    def check_open(self) -> None:
        """ClientClosed: there are none any more."""
        if self._is_closed:
            raise ClientClosed("the client is closed; connect anew")

    def close(self) -> None:
        """End the session, and let calls on their way know; again it does nothing, unless it was
        interrupted."""
        if self._is_ended:
            return
        self._is_closed = True
        link = self.link
        link.close(ClientClosed("the client was closed with this call on its way"))
        coming = self._coming
        if coming is not None:
            coming.close(ClientClosed("the client was closed while it connected anew"))
        self._reconnector.close()
        if link.device_calls is not None:
            # The calls' streams are let go on, and the worker's memory is closed before it ends.
            link.device_calls.join(_SLAB_CLOSE_S)
        self._on_close()
        self._is_ended = True

    def _reconnect(self) -> Link:
        link = self._coming = self._connect(is_first=False)
        try:
            # Whenever `close` comes, it knows of the session or is seen here.
            self.check_open()
            self.views.restore(link, self._use)
            self.check_open()
        except BaseException as error:
            link.close(WorkerDied(f"the new session is of no use: {error}"))
            raise
        finally:
            self._coming = None
        return link

    def _use(self, link: Link) -> None:
        self.link = link

    def _connect(self, is_first: bool) -> Link:
        while True:
            opened = self._open_session(self._engine.wish)
            welcome = opened.session.welcome
            if welcome.stepped_down:
                _log.warning(
                    "activations travel over %s: %s", welcome.transport, welcome.stepped_down
                )
            link = Link(opened.session, self._capacity)
            if self._engine.open_slab(link):
                self._counter.connected(is_first, opened.is_new_process, welcome.stepped_down)
                return link
            link.close(ClientClosed("a session with another kind of slab takes its place"))
