"""The shared transport: two rings in shared memory, one each way."""

from __future__ import annotations

import functools

from .._ring import RingConsumer, RingProducer
from .._wire import write_call


class SharedTransport:
    """A `Transport` over a producer and a consumer; their methods are its own, called directly.

    `watch_socket` and `watch_pidfd`, or -1, tell of the other side's death; they stay the
    caller's.
    """

    name = "shared"
    #: As `Transport.has_unread`.
    has_unread = False
    #: As `Transport.finish_by`, of no effect: records leave at once.
    finish_by: float | None = None

    def __init__(
        self, tx: RingProducer, rx: RingConsumer, watch_socket: int, watch_pidfd: int
    ) -> None:
        tx.watch(watch_socket, watch_pidfd)
        rx.watch(watch_socket, watch_pidfd)
        self._tx, self._rx = tx, rx
        self.send_capacity = self.buffer_bytes = tx.capacity
        self.receive_capacity = rx.capacity
        self.write = tx.write
        self.reserve = tx.reserve
        self.acquire = rx.acquire
        self.write_call = functools.partial(write_call, tx)

    @classmethod
    def create(
        cls,
        receive_capacity: int,
        send_capacity: int,
        epoch: int,
        watch_socket: int,
        watch_pidfd: int,
    ) -> tuple[SharedTransport, list[int]]:
        """Make both rings; also the fds for the other side, which are this one's to close.

        SegmentError: memory is short, with sizes.
        """
        rx = RingConsumer.create(None, receive_capacity, epoch=epoch)
        try:
            tx = RingProducer.create(None, send_capacity, epoch=epoch)
        except BaseException:
            rx.close()
            raise
        return cls(tx, rx, watch_socket, watch_pidfd), [rx.fileno(), tx.fileno()]

    @classmethod
    def attach(
        cls, fds: list[int], epoch: int, watch_socket: int, watch_pidfd: int
    ) -> SharedTransport:
        """Attach to the rings whose fds `create` gave; SegmentError when they are none."""
        tx = RingProducer.attach(fds[0], epoch=epoch)
        try:
            rx = RingConsumer.attach(fds[1], epoch=epoch)
        except BaseException:
            tx.close()
            raise
        return cls(tx, rx, watch_socket, watch_pidfd)

    @property
    def is_closed(self) -> bool:
        """As `Transport.is_closed`."""
        return self._tx.closed

    def memory(self) -> list[memoryview]:
        """As `Transport.memory`."""
        return [self._rx.memory(), self._tx.memory()]

    def close(self) -> None:
        """As `Transport.close`."""
        self._tx.close()
        self._rx.close()
