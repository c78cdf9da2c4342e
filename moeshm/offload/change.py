"""Another placement while forwards go on: workers load first, then one assignment switches over.

Calls name the view that their local ids belong to, so that those on their way stay right; the old
view is released once no forward uses it, by the thread that loaded the new one.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from ..backends import Backend
from ..errors import ClientClosed, MoeshmError, NotReady, WorkerFailed
from ..held import HeldView
from ..placement import Placement, PlacementError
from .layer import LocalExperts
from .plan import Plan, Views
from .remote import Remote

_log = logging.getLogger(__name__)


class PlacementChange:
    """A placement on its way; made by `ExpertOffload.apply`."""

    def __init__(self) -> None:
        self._is_over = threading.Event()
        self._error: MoeshmError | None = None

    def done(self) -> bool:
        """True when it is applied, or has failed."""
        return self._is_over.is_set()

    def result(self, timeout_s: float | None = None) -> None:
        """Return once it is applied, and what it takes from workers was released.

        NotReady: it is not within `timeout_s`. WorkerDied, WorkerFailed, InvalidCall,
        DeadlineExceeded: a worker could not follow; everything is as it was before.
        """
        if not self._is_over.wait(timeout_s):
            raise NotReady(f"workers are still loading after {timeout_s:g} s; they go on")
        if self._error is not None:
            # Not itself: an exception that is raised again keeps the frames of every time.
            raise type(self._error)(str(self._error))

    def finish(self, error: MoeshmError | None) -> None:
        """It is over."""
        self._error = error
        self._is_over.set()


class Plans:
    """The plan that forwards use, and how it gives way to another. Any thread may call it."""

    def __init__(
        self, first: Plan, remotes: Mapping[str, Remote], on_change: Callable[[bool], None]
    ) -> None:
        self.current = first
        self._remotes = remotes
        self._on_change = on_change
        self._unused = threading.Condition()
        self._change: PlacementChange | None = None
        self._is_closed = False

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Plan]:
        """The current plan, whose experts stay with the workers meanwhile."""
        with self._unused:
            plan = self.current
            plan.n_users += 1
        try:
            yield plan
        finally:
            with self._unused:
                plan.n_users -= 1
                if plan is not self.current:
                    self._unused.notify_all()

    def change_to(
        self, placement: Placement, local: LocalExperts | Backend | None, fallback: Backend | None
    ) -> PlacementChange:
        """Begin to; PlacementError: it cannot follow the current one, or one is on its way."""
        current = self.current
        local = current.local if local is None else local
        fallback = current.fallback if fallback is None else fallback
        current.check(placement, self._remotes, local, fallback)
        change = PlacementChange()
        thread = threading.Thread(
            target=self._run,
            args=(placement, local, fallback, change),
            name="moeshm-apply",
            daemon=True,
        )
        with self._unused:
            if self._is_closed:
                raise ClientClosed("the offload is closed; open another")
            if self._change is not None and not self._change.done():
                raise PlacementError("another placement is being applied; wait for its result()")
            before, self._change = self._change, change
        try:
            thread.start()
        except RuntimeError:
            self._change = before
            raise
        return change

    def close(self) -> None:
        """Let workers drop what was held for the current plan; a change under way will not come
        into force."""
        with self._unused:
            if self._is_closed:
                return
            self._is_closed = True
        self._release(self.current.views)

    def _run(
        self,
        placement: Placement,
        local: LocalExperts | Backend | None,
        fallback: Backend | None,
        change: PlacementChange,
    ) -> None:
        start = time.monotonic()
        try:
            last = self._switch(placement, local, fallback)
        except BaseException as error:  # whatever it is, whoever waits must hear of it
            _log.warning("a placement could not be applied, the last one stays: %s", error)
            self._on_change(False)
            if not isinstance(error, MoeshmError):
                error = WorkerFailed(f"{type(error).__name__}: {error}")
            change.finish(error)
            return
        _log.info("a placement was applied after %.1f s", time.monotonic() - start)
        self._on_change(True)
        with self._unused:
            self._unused.wait_for(lambda: not last.n_users)
        self._release(last.views)
        change.finish(None)

    def _switch(
        self,
        placement: Placement,
        local: LocalExperts | Backend | None,
        fallback: Backend | None,
    ) -> Plan:
        """The plan that forwards used until now."""
        views: dict[str, dict[str, HeldView]] = {}
        try:
            self._hold(placement, views)
            following = Plan.with_views(placement, views, local, fallback)
            with self._unused:
                if self._is_closed:
                    raise ClientClosed("the offload was closed while workers loaded")
                last, self.current = self.current, following
        except BaseException:
            self._release(views)
            raise
        for name, by_transport in views.items():
            self._remotes[name].offer(by_transport)
        return last

    def _hold(self, placement: Placement, views: dict[str, dict[str, HeldView]]) -> None:
        """Let every worker load, all at a time, and fill in what calls will name."""
        errors: list[BaseException] = []

        def hold(name: str) -> None:
            held = views[name]
            try:
                for transport, client in self._remotes[name].clients.items():
                    held[transport] = client.hold(placement.experts_of(name))
            except BaseException as error:  # raised below
                errors.append(error)

        threads = []
        for name in placement.workers:
            if placement.experts_of(name):
                views[name] = {}
                thread = threading.Thread(
                    target=hold, args=(name,), name="moeshm-apply", daemon=True
                )
                thread.start()
                threads.append(thread)
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _release(self, views: Views) -> None:
        for name, by_transport in views.items():
            for transport, view in by_transport.items():
                self._remotes[name].release(transport, view)
