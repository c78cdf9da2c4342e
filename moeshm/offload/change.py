"""Another placement while forwards go on: workers load first, then one assignment switches over.

Calls name the view that their local ids belong to, so that those on their way stay right; the old
view is released once no forward uses it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from ..errors import MoeshmError, NotReady
from ..held import HeldView
from ..placement import Placement, PlacementError
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
        """Return once it is applied.

        NotReady: it is not within `timeout_s`. WorkerDied, WorkerFailed, InvalidCall,
        DeadlineExceeded: a worker could not follow; everything is as it was before.
        """
        if not self._is_over.wait(timeout_s):
            raise NotReady(f"workers are still loading after {timeout_s:g} s; they go on")
        if self._error is not None:
            raise self._error

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
        self._lock = threading.Lock()
        self._change: PlacementChange | None = None
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Plan]:
        """The current plan, whose experts stay with the workers meanwhile."""
        with self._lock:
            plan = self.current
            plan.n_users += 1
        try:
            yield plan
        finally:
            with self._lock:
                plan.n_users -= 1
                is_unused = plan.n_users == 0 and plan is not self.current
            if is_unused:
                self._release(plan.views)

    def change_to(self, placement: Placement) -> PlacementChange:
        """Begin to; PlacementError: it cannot follow the current one, or one is on its way."""
        with self._lock:
            if self._change is not None and not self._change.done():
                raise PlacementError("another placement is being applied; wait for its result()")
            self.current.check(placement, self._remotes)
            change = self._change = PlacementChange()
        self._thread = threading.Thread(
            target=self._run, args=(placement, change), name="moeshm-apply", daemon=True
        )
        self._thread.start()
        return change

    def close(self) -> None:
        """Wait for a change that is under way: with its clients closed, it fails at once."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, placement: Placement, change: PlacementChange) -> None:
        start = time.monotonic()
        try:
            self._switch(placement)
        except MoeshmError as error:
            _log.warning("a placement could not be applied, the last one stays: %s", error)
            self._on_change(False)
            change.finish(error)
        else:
            _log.info("a placement was applied after %.1f s", time.monotonic() - start)
            self._on_change(True)
            change.finish(None)

    def _switch(self, placement: Placement) -> None:
        views: dict[str, dict[str, HeldView]] = {}
        try:
            self._hold(placement, views)
            following = self.current.following(placement, views)
        except BaseException:
            self._release(views)
            raise
        with self._lock:
            last, self.current = self.current, following
            is_unused = last.n_users == 0
        if is_unused:
            self._release(last.views)

    def _hold(self, placement: Placement, views: dict[str, dict[str, HeldView]]) -> None:
        """Let every worker load, all at a time, and fill in what calls will name."""
        wanted = {name: placement.experts_of(name) for name in placement.workers}
        wanted = {name: experts for name, experts in wanted.items() if experts}

        def hold(name: str) -> None:
            held = views[name] = {}
            for transport, client in self._remotes[name].clients.items():
                held[transport] = client.hold(wanted[name])

        if wanted:
            with ThreadPoolExecutor(len(wanted), thread_name_prefix="moeshm-apply") as pool:
                list(pool.map(hold, wanted))

    def _release(self, views: Views) -> None:
        for name, by_transport in views.items():
            remote = self._remotes[name]
            for transport, view in by_transport.items():
                remote.release(transport, view)
