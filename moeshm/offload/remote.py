"""One worker as an offload sees it: a client for each way to it, what was learnt of their costs,
and whether it is worth asking."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import msgspec

from ..client import ExpertClient
from ..connecting import connect
from ..engine_device import EngineDevice
from ..errors import CallError, DeviceError, HandshakeRefused, SegmentError, SettingError
from ..held import HeldView
from ..layers import LayerInfo
from ..placement import Placement, PlacementError
from ..policy import SLABS, Choice, Chooser, Path, Policy, Shape, Times, Work, may_take
from ..stats import CallTimes
from .explanation import Explanation

_log = logging.getLogger(__name__)

#: A lost worker is left alone for so long, then twice as long after each further failure.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
#: What `connect` calls a slab of each kind.
_SLAB_TRANSPORTS = {"pinned": "shared", "device": "device"}


class Remote:
    """A worker. SettingError: the policy allows none of the ways to it.

    `clients`: by way, one of which may serve several. `left_out`: by way, why there is none though
    the policy allows it.
    """

    def __init__(
        self,
        name: str,
        clients: Mapping[str, ExpertClient],
        policy: Policy,
        is_ours: bool,
        left_out: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.name = name
        self.left_out = left_out
        #: True when the offload opened the clients.
        self.is_ours = is_ours
        self.clients = clients
        for client in self.sessions:
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
        #: By shape, number of tokens, and where they are, the last work of the kind.
        self._seen: dict[tuple[Shape, int, bool], Work] = {}

    @property
    def sessions(self) -> list[ExpertClient]:
        """Its clients, each once."""
        return list({id(client): client for client in self.clients.values()}.values())

    @property
    def stepped_down(self) -> str:
        """Why the policy has less to choose from than it allows; empty when it has not."""
        return "; ".join(f"{way}: {why}" for way, why in self.left_out.items())

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
        self._seen[shape, work.n_tokens.bit_length(), work.on_gpu] = work

    def explain(self, shape: Shape) -> list[Explanation]:
        """For every size of work that was seen, smallest first."""
        # A copy, since forwards of other threads go on.
        items = list(self._seen.items())
        seen = sorted((on_gpu, size, work) for (kind, size, on_gpu), work in items if kind == shape)
        return [
            Explanation(self.name, work, self.chooser.explain(shape, work), self._left_out(work))
            for *_, work in seen
        ]

    def _left_out(self, work: Work) -> dict[str, str]:
        """Of the ways that such work could take."""
        return {n: why for n, why in self.left_out.items() if work.on_gpu or n not in SLABS}


def times_of(taken: CallTimes, choice: Choice) -> Times:
    """What a call took whose result was taken, as the policy learns it."""
    return Times(
        taken.messages,
        taken.pack_ns,
        taken.wait_ns,
        taken.unpack_ns,
        # Outputs in slabs come without a reply.
        None if choice.transport in SLABS else taken.compute_ns,
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
    workers: Mapping[str, WorkerLike],
    placement: Placement,
    policy: Policy,
    engine: EngineDevice | None = None,
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
                ours, left_out = _open(given, name, placement, policy, engine)
                opened += ours.values()
                remotes[name] = Remote(name, ours, policy, True, left_out)
            else:
                lent = given if isinstance(given, list | tuple) else [given]
                remotes[name] = Remote(name, _ways_of(lent, engine), policy, False)
    return remotes, opened


def _ways_of(
    clients: Sequence[ExpertClient], engine: EngineDevice | None
) -> dict[str, ExpertClient]:
    """What they offer, the first of several that offer the same."""
    ways = {client.transport: client for client in reversed(clients)}
    if engine is not None:
        for client in reversed(clients):
            if client.slab is not None and client.engine_device == engine.name:
                ways[client.slab] = client
    return ways


def _open(
    address: str, name: str, placement: Placement, policy: Policy, engine: EngineDevice | None
) -> tuple[dict[str, ExpertClient], dict[str, str]]:
    """A client for each way that the policy may choose, and by way why one is missing.

    What the policy insists on is not left out, but raised.
    """
    fingerprint = placement.fingerprint(name) if placement.experts_of(name) else ""
    clients: dict[str, ExpertClient] = {}
    left_out: dict[str, str] = {}

    def open_one(way: str) -> None:
        is_slab = way in SLABS
        clients[way] = connect(
            address,
            transport=_SLAB_TRANSPORTS[way] if is_slab else way,
            wire_dtype="auto",
            placement=fingerprint,
            batch_capacity=policy.batch_capacity,
            engine_device=engine.name if is_slab and engine else None,
        )

    slabs = [] if engine is None else SLABS
    wanted = [way for way in ("shared", *slabs, "stream") if may_take(policy.transport, way)]
    with _closed_on_error(clients.values()):
        for way in wanted:
            # The stream is what is left in any case; of the other settings, what each is named for.
            if way in ("stream", policy.transport):
                open_one(way)
                continue
            try:
                open_one(way)
            except (DeviceError, SegmentError, HandshakeRefused) as error:
                # What is no matter of memory, the stream is refused for as well. Its words alone:
                # the error's frames hold on to a slab.
                left_out[way] = str(error)
                _log.warning("worker %r is not reached by way of %s: %s", name, way, left_out[way])
    return clients, left_out


@contextlib.contextmanager
def _closed_on_error(clients: Iterable[ExpertClient]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for client in clients:
            client.close()
        raise
