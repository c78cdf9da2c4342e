"""One worker as an offload sees it: a client for each way to it, what was learnt of their costs,
and whether it is worth asking."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType

import msgspec

from ..client import ExpertClient
from ..connecting import connect
from ..dtypes import DType
from ..engine_device import EngineDevice
from ..errors import (
    CallError,
    ConnectError,
    DeadlineExceeded,
    DeviceError,
    HandshakeRefused,
    SegmentError,
    SettingError,
    WorkerDied,
)
from ..held import HeldView
from ..layers import LayerInfo
from ..placement import Placement, PlacementError
from ..policy import SLABS, Choice, Chooser, Path, Policy, Shape, Times, Work, may_take
from ..stats import CallTimes
from .activations import WayLost
from .explanation import Explanation

_log = logging.getLogger(__name__)

#: A way that was lost is left alone for so long, then twice as long after each further failure.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
#: What keeps one way from being opened, and no other.
_REFUSALS = DeviceError, SegmentError, HandshakeRefused
#: What `connect` calls a slab of each kind.
_SLAB_TRANSPORTS = {"pinned": "shared", "device": "device"}


class Remote:
    """A worker. SettingError: the policy allows none of the ways to it.

    `clients`: by way, one of which may serve several. `left_out`: by way, why there is none though
    the policy allows it. A way that is lost is left alone for a while; the others are not.
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
        #: With those that were there, and could not be opened again.
        self.left_out = dict(left_out)
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
        self._health = {way: Health() for way in clients}
        #: The ways that failed last, and of these, those that did as the worker was gone or late.
        self._failing: frozenset[str] = frozenset()
        self._with_worker: frozenset[str] = frozenset()
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

    def down_ways(self) -> frozenset[str]:
        """Those that are left alone."""
        if not self._failing:
            return self._failing
        return frozenset(way for way in self._failing if self._health[way].is_down())

    def has_way(self, dtype: DType, on_gpu: bool, left_out: Set[str]) -> bool:
        """Whether rows can take another than these; True where the settings leave none at all."""
        if not left_out:
            return True
        ways = self.chooser.ways(dtype, on_gpu)
        return not ways or not ways <= left_out

    def answered(self, way: str) -> None:
        """By that way; the worker is there, for others that failed with it."""
        if way in self._failing:
            recovered = self._with_worker | {way}
            for each in recovered:
                self._health[each].recover()
            self._failing -= recovered
            self._with_worker = frozenset()
            self.left_out = {name: why for name, why in self.left_out.items() if name != way}

    def failed(self, way: str, error: WorkerDied | DeadlineExceeded) -> tuple[Set[str], float]:
        """It was lost with slots on their way: the ways that are left alone now, and how long."""
        cause = error.__cause__
        # In a slab, calls also wait for other streams of the engine.
        is_late = isinstance(error, DeadlineExceeded) and way not in SLABS
        # Not sets that change: forwards of other threads have them.
        ways = frozenset({way})
        self._with_worker -= ways
        if isinstance(error, WayLost) or isinstance(cause, _REFUSALS):
            if way not in self.left_out:
                # Its words alone: its cause's frames hold on to a slab.
                why = str(error)
                _log.warning("worker %r is not reached by way of %s: %s", self.name, way, why)
            self.left_out = {**self.left_out, way: str(error)}
        elif is_late or isinstance(cause, ConnectError):
            # Whichever way.
            ways = frozenset(self.clients)
            self._with_worker |= ways
        self._failing |= ways
        pauses = {each: self._health[each].fail() for each in ways}
        return ways, pauses[way]

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
    """Whether a way to a worker is worth taking."""

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
                lent_ways, left_out = _ways_of(lent, engine, policy)
                remotes[name] = Remote(name, lent_ways, policy, False, left_out)
    return remotes, opened


def _ways_of(
    clients: Sequence[ExpertClient], engine: EngineDevice | None, policy: Policy
) -> tuple[dict[str, ExpertClient], dict[str, str]]:
    """What they offer, the first of several that offer the same; and by way why a slab that one
    of them asked for is not there."""
    ways = {client.transport: client for client in reversed(clients)}
    if engine is None:
        return ways, {}
    for client in reversed(clients):
        if client.slab is not None and client.engine_device == engine.name:
            ways[client.slab] = client
    allowed = [way for way in SLABS if may_take(policy.transport, way) and way not in ways]
    left_out: dict[str, str] = {}
    for client in clients:
        if client.slab is None or client.engine_device == engine.name:
            # Who has a slab in the host's memory lacks the other kind alone.
            lacking = [way for way in allowed if client.slab is None or way == "device"]
            why = "; ".join(client.stats().stepped_down)
        else:
            lacking = [way for way in allowed if way == client.slab]
            why = f"the client that was lent is for arrays on {client.engine_device}"
        if why:
            left_out.update(dict.fromkeys(lacking, why))
    return ways, left_out


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
            except _REFUSALS as error:
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
