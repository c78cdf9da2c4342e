"""The crash points of the Python layers: functions that are wrapped from outside, in the process
that is to crash. What lies within a function is named by the nearest call in it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.crash.matrix import plan

BOTH = ("shared", "stream")


class Step(NamedTuple):
    """A function, whose beginning and end are points; not its end by an exception."""

    name: str
    #: `module:attribute` or `module:Class.attribute`.
    target: str
    transports: tuple[str, ...] = BOTH
    ends: tuple[str, ...] = ("before", "after")


_STREAM = "moeshm.transport.stream:"
#: Of either side. Who waits for room may have sent a part of a record, and what was `read` may be
#: one.
_STREAMS = [
    Step("stream.write", f"{_STREAM}StreamTransport.write", ("stream",)),
    Step("stream.wait_for_room", f"{_STREAM}StreamTransport._wait_for_room", ("stream",)),
    Step("stream.acquire", f"{_STREAM}StreamTransport.acquire", ("stream",)),
    Step("stream.poll", f"{_STREAM}StreamTransport._poll", ("stream",)),
    Step("stream.read", f"{_STREAM}StreamTransport._read", ("stream",)),
    Step("stream.close", f"{_STREAM}StreamTransport.close", ("stream",)),
]

CLIENT = [
    Step("handshake.connect", "moeshm.session:_connect"),
    Step("handshake.hello", "moeshm.session:ControlSocket.send"),
    Step("handshake.welcome", "moeshm.session:ControlSocket.receive"),
    Step("handshake.map", "moeshm.session:_join"),
    Step("handshake.link", "moeshm.sessions:Sessions._connect"),
    Step("hold.order", "moeshm.link:Link.order"),
    Step("hold.await", "moeshm.link:Link.await_order"),
    Step("hold.answered", "moeshm.held:_listing"),
    Step("hold.add", "moeshm.held:ClientViews.add"),
    Step("hold.release", "moeshm.held:SessionNumbers.release"),
    Step("call.submit", "moeshm.client:ExpertClient._submit"),
    Step("call.send", "moeshm.link:Link.send"),
    Step("call.at_once", "moeshm.link:Link.call"),
    Step("call.post", "moeshm.link:Link._post"),
    Step("result.wait", "moeshm.link:Link.wait"),
    Step("result.others", "moeshm.link:Link._leave_it_to_others"),
    Step("result.receive", "moeshm.link:Link._receive"),
    Step("result.give", "moeshm.link:Link._give"),
    Step("result.take", "moeshm.call:CallFuture.take"),
    Step("result.finish", "moeshm.call:CallFuture._finish"),
    Step("close.client", "moeshm.client:ExpertClient.close"),
    Step("close.link", "moeshm.link:Link.close"),
    Step("close.session", "moeshm.session:Session.close"),
    Step("close.control", "moeshm.session:ControlSocket.close"),
    *_STREAMS,
]

WORKER = [
    Step("handshake.serve", "moeshm.daemon:Daemon._serve"),
    Step("handshake.hello", "moeshm.session:ControlSocket.receive"),
    Step("handshake.open", "moeshm.session:_open"),
    Step("handshake.segments", "moeshm.transport.shared:SharedTransport.create", ("shared",)),
    Step("handshake.segments", f"{_STREAM}StreamTransport.create", ("stream",)),
    Step("handshake.welcome", "moeshm.session:ControlSocket.send"),
    Step("session.serve", "moeshm.worker:SessionServer.serve"),
    Step("session.close", "moeshm.session:Session.close"),
    Step("session.close_control", "moeshm.session:ControlSocket.close"),
    Step("load.order", "moeshm.views:SessionViews.hold"),
    Step("load.hold", "moeshm.holdings:Holdings.hold"),
    Step("load.read", "tests.crash.matrix.backend:load_experts"),
    Step("load.add", "tests.crash.matrix.backend:MatrixBackend.add"),
    Step("load.finish", "moeshm.views:SessionViews._finish"),
    Step("load.say", "moeshm.worker:SessionServer._say"),
    Step("load.release", "moeshm.holdings:Holdings.release"),
    Step("load.remove", "tests.crash.matrix.backend:MatrixBackend.remove"),
    Step("call.answer", "moeshm.worker:SessionServer._answer"),
    Step("call.compute", "tests.crash.matrix.backend:MatrixBackend.ffn"),
    Step("reply.reserve", f"{_STREAM}StreamTransport.reserve", ("stream",)),
    Step("reply.pack", "moeshm.protocol:pack_reply"),
    Step("reply.commit", "moeshm.worker:_commit"),
    Step("shutdown.listener", "moeshm.listening:Listener.close"),
    Step("shutdown.drain", "moeshm.daemon:Daemon._drain"),
    # Within the last: `install_draining`.
    Step("shutdown.draining", ""),
    *_STREAMS,
]

#: Points of a ring's end that a side has no reason to reach.
_NOT_OF = {
    # Calls are written without a reservation, and not taken back.
    "client": {"producer.abort", "producer.aborted"},
    "worker": set[str](),
}
_PRODUCERS = ("reserve", "room_made", "header_written", "reserved", "abort", "aborted")
_CONSUMERS = ("acquire", "record_found", "header_checked", "acquired")


def points(side: str, transport: str) -> dict[str, int]:
    """The names and numbers of every point that a side has with a transport."""
    native = plan.native_steps()
    found: dict[str, int] = {}
    for number, name in enumerate(native):
        role, _, step = name.partition(".")
        others = _CONSUMERS if role == "producer" else _PRODUCERS
        if transport == "shared" and step not in others and name not in _NOT_OF[side]:
            found[name] = number
    for first, layer_step in _numbered(side).items():
        found |= {
            f"{layer_step.name}.{end}": first + after
            for after, end in enumerate(("before", "after"))
            if end in layer_step.ends and transport in layer_step.transports
        }
    return found


def install(side: str, transport: str) -> None:
    """Wrap what this side has with the transport, in this process."""
    for number, step in _numbered(side).items():
        if step.target and transport in step.transports:
            module, _, path = step.target.partition(":")
            owner = importlib.import_module(module)
            *outer, attribute = path.split(".")
            for each in outer:
                owner = getattr(owner, each)
            _wrap(owner, attribute, number)


def install_draining(daemon: Any) -> None:
    """The moment when the sessions are told that a worker drains."""
    number = next(n for n, step in _numbered("worker").items() if step.name == "shutdown.draining")
    _wrap(daemon._draining, "set", number)


def _numbered(side: str) -> dict[int, Step]:
    first = len(plan.native_steps())
    table = CLIENT if side == "client" else WORKER
    assert first + 2 * len(table) <= plan.MAX_POINTS
    return {first + 2 * index: step for index, step in enumerate(table)}


def _wrap(owner: Any, attribute: str, number: int) -> None:
    found = vars(owner).get(attribute) or getattr(owner, attribute)
    is_of_class = isinstance(found, classmethod)
    function: Callable[..., Any] = found.__func__ if is_of_class else found

    @functools.wraps(function)
    def reaching(*arguments: Any, **named: Any) -> Any:
        plan.reach(number)
        result = function(*arguments, **named)
        plan.reach(number + 1)
        return result

    setattr(owner, attribute, classmethod(reaching) if is_of_class else reaching)
