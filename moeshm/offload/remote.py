"""One worker as an offload sees it: a client for each way to it, what was learnt of their costs,
and whether it is worth asking."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from ..call import CallFuture
from ..client import ExpertClient
from ..connecting import connect
from ..errors import CallError, HandshakeRefused, SegmentError, SettingError
from ..held import HeldView
from ..layers import LayerInfo
from ..placement import Placement, PlacementError
from ..policy import Chooser, Path, Policy, Shape, Times, Work
from .explanation import Explanation

_log = logging.getLogger(__name__)

#: A lost worker is left alone for so long, then twice as long after each further failure.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class Remote:
    """A worker. SettingError: the policy allows none of its clients' transports."""

    def __init__(
        self,
        name: str,
        clients: Sequence[ExpertClient],
        policy: Policy,
        is_ours: bool,
        stepped_down: str = "",
    ) -> None:
        self.name = name
        #: Why the policy has less to choose from than it allows; empty when it has not.
        self.stepped_down = stepped_down
        #: True when the offload opened the clients.
        self.is_ours = is_ours
        #: By transport.
        self.clients = {client.transport: client for client in reversed(clients)}
        for client in clients:
            if client.has_fallback:
                raise SettingError(
                    f"the client of worker {name!r} has a fallback of its own, which the offload "
                    "would take for the worker; give the fallback to the offload"
                )
            # What a lent client was told holds, unless the policy says otherwise.
            if policy.wire_dtype == "auto" and client.wire_dtype is not None:
                policy = msgspec.structs.replace(policy, wire_dtype=str(client.wire_dtype))
        paths = {
            transport: Path(transport, client.max_tokens, client.buffer_bytes)
            for transport, client in self.clients.items()
        }
        self.chooser = Chooser(policy, paths)
        self.health = Health()
        #: By shape and number of tokens, the last work of the kind.
        self._seen: dict[tuple[Shape, int], Work] = {}

    @property
    def layers(self) -> Mapping[int, LayerInfo]:
        """What the worker held when it was connected."""
        return next(iter(self.clients.values())).layers

    def release(self, transport: str, view: HeldView) -> None:
        """Let the worker drop a view's experts; what a lent client was opened with stays, as others
        may go on using it."""
        client = self.clients[transport]
        if self.is_ours or view is not client.view:
            with contextlib.suppress(CallError):  # closed, or released by its owner
                client.release(view)

    def offer(self, views: Mapping[str, HeldView]) -> None:
        """Let new sessions of the worker begin with these experts, which all these views list."""
        transport, view = next(iter(views.items()))
        with contextlib.suppress(CallError):
            # Who is lost meanwhile is offered it when it is found again.
            self.clients[transport].offer(view)

    def saw(self, shape: Shape, work: Work) -> None:
        """Remember work that can be explained."""
        self._seen[shape, work.n_tokens.bit_length()] = work

    def explain(self, shape: Shape) -> list[Explanation]:
        """For every size of work that was seen, smallest first."""
        # A copy, since forwards of other threads go on.
        items = list(self._seen.items())
        seen = sorted((size, work) for (kind, size), work in items if kind == shape)
        return [Explanation(self.name, work, self.chooser.explain(shape, work)) for _, work in seen]


def times_of(future: CallFuture) -> Times:
    """What a call took whose result was taken, as the policy learns it."""
    taken = future.times
    assert taken is not None
    return Times(
        taken.messages,
        taken.pack_ns,
        taken.wait_ns,
        taken.unpack_ns,
        taken.compute_ns,
        taken.elapsed_ns,
    )


class Health:
    """Whether a worker is worth asking."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pause_s = 0.0
        self._until = 0.0

    def is_down(self) -> bool:
        """True while it is left alone."""
        return time.monotonic() < self._until

    def recover(self) -> None:
        """It answered."""
        self._pause_s = self._until = 0.0

    def fail(self) -> float:
        """It was lost; for how long it is left alone."""
        with self._lock:
            if not self.is_down():  # or another thread counted this outage
                self._pause_s = min(LONGEST_PAUSE_S, 2 * self._pause_s or FIRST_PAUSE_S)
                self._until = time.monotonic() + self._pause_s
            return self._pause_s


#: An address, a client, or several clients of one worker, one for each transport.
WorkerLike = str | ExpertClient | list[ExpertClient] | tuple[ExpertClient, ...]


def reach(
    workers: Mapping[str, WorkerLike], placement: Placement, policy: Policy
) -> tuple[dict[str, Remote], list[ExpertClient]]:
    """The workers of a placement by name, and the clients that were opened for it.

    PlacementError: one that holds experts is not among `workers`. As `connect`.
    """
    opened: list[ExpertClient] = []
    remotes = {}
    with _closed_on_error(opened):
        for name in placement.workers:
            if name not in workers:
                if placement.experts_of(name):
                    raise PlacementError(
                        f"no client for the worker {name!r} of the placement; pass one"
                    )
                continue
            given = workers[name]
            if isinstance(given, str):
                ours, stepped_down = _open(given, name, placement, policy)
                opened += ours
                remotes[name] = Remote(name, ours, policy, True, stepped_down)
            else:
                lent = given if isinstance(given, list | tuple) else [given]
                remotes[name] = Remote(name, lent, policy, False)
    return remotes, opened


def _open(
    address: str, name: str, placement: Placement, policy: Policy
) -> tuple[list[ExpertClient], str]:
    """A client for each transport that the policy may choose, and why one is missing."""
    fingerprint = placement.fingerprint(name) if placement.experts_of(name) else ""

    def open_one(transport: str) -> ExpertClient:
        return connect(
            address,
            transport=transport,
            wire_dtype="auto",
            placement=fingerprint,
            batch_capacity=policy.batch_capacity,
        )

    if policy.transport != "auto":
        return [open_one(policy.transport)], ""
    clients: list[ExpertClient] = []
    with _closed_on_error(clients):
        try:
            clients.append(open_one("shared"))
        except (SegmentError, HandshakeRefused) as error:
            # What is no matter of memory, the other transport is refused for as well.
            clients.append(open_one("stream"))
            _log.warning("worker %r is reached by the stream transport only: %s", name, error)
            return clients, str(error)
        clients.append(open_one("stream"))
    return clients, ""


@contextlib.contextmanager
def _closed_on_error(clients: list[ExpertClient]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for client in clients:
            client.close()
        raise
