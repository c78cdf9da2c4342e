"""The contender iceoryx2: publish-subscribe with loaned samples."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .contender import Cell, Contender, Endpoint, window
from .harness import remove_shared

#: What a service may hold in one direction.
_SERVICE_BYTES = 4 << 20
_SERVICE_MESSAGES = 64
#: iceoryx2 waits this long for an event at a time.
_PATIENCE_S = 1


class Iceoryx2(Contender):
    """One service each way; the consumer polls, or waits for an event sent with each sample."""

    module = "iceoryx2"

    def __init__(self, polls: bool) -> None:
        self.polls = polls

    def open(self, link: str, cell: Cell, payload: bytes, is_client: bool) -> Endpoint:
        import iceoryx2 as iox

        node = _make_node(link)
        ways = ("there", "back") if is_client else ("back", "there")
        outward, inward = (iox.ServiceName.new(f"{link}/{way}") for way in ways)
        publisher = (
            _service(node, outward, cell.size)
            .publisher_builder()
            .initial_max_slice_len(cell.size)
            .backpressure_strategy(iox.BackpressureStrategy.RetryUntilDelivered)
            .create()
        )
        subscriber = _service(node, inward, cell.size).subscriber_builder().create()
        ports = [publisher, subscriber]

        def close() -> None:
            for port in ports:
                port.delete()
            if is_client:
                remove_shared(f"{link}-")

        send = _sender(publisher, payload)
        if self.polls:
            return Endpoint(send, _receiver(subscriber, cell.size, lambda: None), close)
        events = [node.service_builder(name).event().open_or_create() for name in (outward, inward)]
        notifier = events[0].notifier_builder().create()
        listener = events[1].listener_builder().create()
        ports += [notifier, listener]
        patience = iox.Duration.from_secs(_PATIENCE_S)

        def send_and_notify() -> None:
            send()
            notifier.notify()

        wait = _receiver(subscriber, cell.size, lambda: listener.timed_wait(patience))
        return Endpoint(send_and_notify, wait, close)


def _make_node(link: str) -> Any:
    """A node whose files have names and a folder of their own.

    With iceoryx2's defaults, its management segment would stay behind in /dev/shm.
    """
    import iceoryx2 as iox

    iox.set_log_level(iox.LogLevel.Error)
    config = iox.config.default()
    config.global_cfg.prefix = iox.FileName.new(f"{link}-")
    config.global_cfg.root_path = iox.Path.new(str(Path("/dev/shm", f"{link}-iceoryx2")))
    return iox.NodeBuilder.new().config(config).create(iox.ServiceType.Ipc)


def _service(node: Any, name: Any, size: int) -> Any:
    """A service that blocks its publisher when full, as every other contender does."""
    import iceoryx2 as iox

    return (
        node.service_builder(name)
        .publish_subscribe(iox.Slice[ctypes.c_uint8])
        .enable_safe_overflow(False)
        .subscriber_max_buffer_size(window(size, _SERVICE_BYTES, _SERVICE_MESSAGES))
        .max_publishers(1)
        .max_subscribers(1)
        .open_or_create()
    )


def _sender(publisher: Any, payload: bytes) -> Callable[[], None]:
    size, memmove = len(payload), ctypes.memmove
    source = (ctypes.c_char * size).from_buffer_copy(payload)

    def send() -> None:
        sample = publisher.loan_slice_uninit(size)
        memmove(sample.payload_ptr, source, size)
        sample.assume_init().send()

    return send


def _receiver(subscriber: Any, size: int, wait: Callable[[], object]) -> Callable[[], Any]:
    memmove = ctypes.memmove
    received = (ctypes.c_char * size)()

    def receive() -> Any:
        while (sample := subscriber.receive()) is None:
            wait()
        memmove(received, sample.payload_ptr, size)
        return received

    return receive
