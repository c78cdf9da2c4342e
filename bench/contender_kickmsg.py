"""The contender kickmsg: publish-subscribe over one shared region each way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .contender import VIEW_BYTES, Cell, Contender, Endpoint, window

#: What a region's ring may hold.
_RING_BYTES = 4 << 20
_RING_MESSAGES = 256
_CREDIT = bytes(8)
#: kickmsg waits this long at a time.
_PATIENCE_S = 1.0


class Kickmsg(Contender):
    """One region each way; the consumer polls, or waits in kickmsg's futex.

    Its ring drops the oldest message when full, so a stream needs credits: the consumer returns
    one, through a region of its own, for each half of the ring that it has read.
    """

    module = "kickmsg"

    def __init__(self, polls: bool) -> None:
        self.polls = polls

    def open(self, link: str, cell: Cell, payload: bytes, is_client: bool) -> Endpoint:
        import kickmsg

        is_stream = cell.mode == "throughput"
        most = window(cell.size, _RING_BYTES, _RING_MESSAGES) if is_stream else 2
        half = 1 << (most.bit_length() - 2)  # kickmsg wants a power of two
        sizes = {"there": cell.size, "back": cell.size, "credits": len(_CREDIT)}
        regions = {
            way: _create(f"/{link}-{way}", size, 2 * half)
            if is_client
            else kickmsg.SharedRegion.open(f"/{link}-{way}")
            for way, size in sizes.items()
        }

        def close() -> None:
            if is_client:
                for region in regions.values():
                    region.unlink()

        out, into = ("there", "back") if is_client else ("back", "there")
        send: Callable[[], object] = functools.partial(
            kickmsg.Publisher(regions[out]).send, payload
        )
        receive = self._receiver(regions[into], cell.size)
        if is_stream and is_client:
            wait_for_credit = self._receiver(regions["credits"], len(_CREDIT))
            send = _spending(send, wait_for_credit, half)
        elif is_stream:
            give_credit = functools.partial(kickmsg.Publisher(regions["credits"]).send, _CREDIT)
            receive = _earning(receive, give_credit, half)
        return Endpoint(send, receive, close)

    def _receiver(self, region: Any, size: int) -> Callable[[], Any]:
        import kickmsg

        subscriber = kickmsg.Subscriber(region)
        is_viewed = size > VIEW_BYTES
        if self.polls:
            take = subscriber.try_receive_view if is_viewed else subscriber.try_receive
        else:
            blocking = subscriber.receive_view if is_viewed else subscriber.receive
            take = functools.partial(blocking, _PATIENCE_S)
        received = memoryview(bytearray(size))

        def receive() -> Any:
            while (message := take()) is None:
                pass
            return message

        def receive_view() -> memoryview:
            view = receive()
            # memoryview() first: assigned directly, the view of kickmsg 0.9.2 crashes CPython.
            received[:] = memoryview(view)
            view.release()
            return received

        return receive_view if is_viewed else receive


def _create(name: str, size: int, capacity: int) -> Any:
    import kickmsg

    config = kickmsg.Config()
    config.max_subscribers = 1
    config.sub_ring_capacity = capacity
    # An entry keeps its slot until it is overwritten, read or not: more slots than entries.
    config.pool_size = 2 * capacity + 4
    config.max_payload_size = size
    return kickmsg.SharedRegion.create(name, kickmsg.ChannelType.PubSub, config, "moeshm bench")


def _spending(
    send: Callable[[], object], wait_for_credit: Callable[[], object], half: int
) -> Callable[[], object]:
    """`send` that first waits for a credit whenever two halves are on their way."""
    sent = 0

    def spending_send() -> None:
        nonlocal sent
        if sent >= 2 * half and sent % half == 0:
            wait_for_credit()
        send()
        sent += 1

    return spending_send


def _earning(
    receive: Callable[[], Any], give_credit: Callable[[], object], half: int
) -> Callable[[], Any]:
    """`receive` that returns a credit for each half received."""
    received = 0

    def earning_receive() -> Any:
        nonlocal received
        message = receive()
        received += 1
        if received % half == 0:
            give_credit()
        return message

    return earning_receive
