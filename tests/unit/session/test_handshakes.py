"""Opening a session: what both sides get, and the last word when it ends."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeshm
from moeshm import protocol, session, sizes
from moeshm.dtypes import DType
from moeshm.handshake import Goodbye
from moeshm.session import ControlSocket
from tests.wire import (
    LAST,
    PATIENCE_S,
    WHOLE,
    dense_info,
    meanwhile,
    n_fds,
    packets,
    take,
    with_fds,
)

from .sides import LAYERS, address, opened


@pytest.mark.parametrize(
    ("wish", "given"), [("auto", "shared"), ("shared", "shared"), ("stream", "stream")]
)
def test_a_session_opens_with_the_transport_wished_for(
    listener: socket.socket, wish: str, given: str
) -> None:
    with opened(listener, wish) as (client, worker):
        assert client.welcome == worker.welcome
        assert client.transport.name == worker.transport.name == client.welcome.transport == given
        assert client.welcome.stepped_down == ""
        assert client.welcome.layers == LAYERS
        assert client.welcome.takes_orders
        client.transport.write((b"hello",), 1)
        assert take(worker.transport) == (1, b"hello")
        worker.transport.write((b"you",), 2)
        assert take(client.transport) == (2, b"you")


@pytest.mark.parametrize("transport", ["shared", "stream"])
@pytest.mark.parametrize(("wanted", "allowed"), [(64, 4096), (4096, 64), (1, 1)])
def test_max_tokens_is_what_both_allow_and_fits(
    listener: socket.socket, transport: str, wanted: int, allowed: int
) -> None:
    with opened(listener, transport, wanted, allowed) as (client, worker):
        n_tokens = client.welcome.max_tokens
        assert n_tokens == min(wanted, allowed)
        for info in LAYERS.values():
            calls = protocol.call_bytes(n_tokens, info.top_k, info.hidden_size, DType.F32)
            assert calls <= client.transport.send_capacity
            assert calls <= worker.transport.receive_capacity
            replies = protocol.reply_bytes(n_tokens, info.hidden_size, DType.F32)
            assert replies <= worker.transport.send_capacity
            assert replies <= client.transport.receive_capacity


@given(
    st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 64), st.integers(1, 64),
    st.integers(1, 4096),
)  # fmt: skip
def test_the_rings_hold_the_largest_call_of_every_layer(
    hidden: int, other_hidden: int, top_k: int, other_top_k: int, max_tokens: int
) -> None:
    layers = {0: dense_info(hidden, 64, top_k), 1: dense_info(other_hidden, 64, other_top_k)}
    calls, replies = sizes.ring_sizes(layers, max_tokens)
    assert max(calls, replies) <= sizes.MAX_RING_BYTES
    n_tokens = min(max_tokens, sizes.fitting_tokens(layers, calls, replies))
    assert n_tokens >= 1
    for info in layers.values():
        for dtype in DType:
            call = protocol.call_bytes(n_tokens, info.top_k, info.hidden_size, dtype)
            assert call <= calls
            assert protocol.reply_bytes(n_tokens, info.hidden_size, dtype) <= replies
    if max(calls, replies) < sizes.MAX_RING_BYTES:
        assert n_tokens == max_tokens


@pytest.mark.usefixtures("no_segments")
def test_auto_steps_down_and_says_why(
    listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(listener, "auto") as (client, worker):
        assert client.transport.name == worker.transport.name == "stream"
        assert "4096 bytes cannot be had" in client.welcome.stepped_down

    def accept() -> None:
        control = ControlSocket(listener.accept()[0])
        with session.accept(control, LAYERS, "null", 64, PATIENCE_S):
            pass

    with meanwhile(accept), moeshm.connect(address(listener), transport="auto") as expert_client:
        assert expert_client.transport == "stream"
        ((why, count),) = expert_client.stats().stepped_down.items()
    assert "4096 bytes cannot be had" in why
    assert count == 1
    assert any("4096 bytes cannot be had" in each.getMessage() for each in caplog.records)


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_a_goodbye_is_heard_after_the_end(listener: socket.socket, transport: str) -> None:
    with opened(listener, transport) as (client, worker):
        assert client.farewell() is None
        worker.control.send(Goodbye("the worker shuts down"), [], PATIENCE_S)
        worker.close()
        assert client.farewell() == "the worker shuts down"
        assert client.farewell() is None
        client.close()
        assert client.farewell() is None


@pytest.mark.parametrize(
    "attack",
    [packets(LAST + b"junk"), packets(b"x"), packets(WHOLE), with_fds((WHOLE, 3), (LAST, 5))],
)
def test_a_last_word_that_is_none(
    listener: socket.socket, attack: Callable[[socket.socket], None]
) -> None:
    with opened(listener) as (client, worker):
        attack(worker.control._socket)
        before = n_fds()
        assert client.farewell() is None
        assert n_fds() == before
