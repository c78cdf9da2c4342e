"""Replies that a signal's handler keeps from being taken in are taken in again, once."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import moeshm
from moeshm import protocol
from moeshm.call import CallFuture
from moeshm.errors import DeadlineExceeded, WorkerDied
from moeshm.link import Link
from moeshm.outbox import Outbox
from tests.crash.arithmetic import FREE, GATED, assert_exact, make_inputs
from tests.crash.processes import PATIENCE_S, GatedWorker, within

SOON_S = 15.0


def interrupt(*_: Any) -> None:
    """As the handler of Ctrl-C."""
    raise KeyboardInterrupt


def interrupting(is_copied: bool) -> Callable[..., None]:
    """Instead of `copy_rows`: an interrupt before the rows are copied, or right after that."""
    real = protocol.Reply.copy_rows

    def copy_and_interrupt(*arguments: Any) -> None:
        if is_copied:
            real(*arguments)
        raise KeyboardInterrupt

    return copy_and_interrupt


@pytest.mark.parametrize("n_parts", [1, 2])
@pytest.mark.parametrize("is_copied", [False, True])
def test_a_reply_that_was_interrupted_as_it_was_taken_in_is_taken_in_again(
    client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch, n_parts: int, is_copied: bool
) -> None:
    """By who receives next; calls of others, and the session, go on."""
    inputs, others = make_inputs(FREE, 1, 4), make_inputs(FREE, 2)
    future = client.submit(*inputs, slice_tokens=4 // n_parts)
    other = client.submit(*others)
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(protocol.Reply, "copy_rows", interrupting(is_copied))
            with pytest.raises(KeyboardInterrupt):
                future.result()
    assert_exact(other.result(), others)
    assert_exact(future.result(), inputs)
    assert client.stats().reconnects == 0


def test_a_reply_that_was_interrupted_by_who_gives_its_call_up_is_nobodys(
    client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(protocol, "take_plain", interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.compute(*make_inputs(FREE, 1))
    inputs = make_inputs(FREE, 2)
    assert_exact(client.compute(*inputs), inputs)
    assert client.stats().reconnects == 0
    assert client._link._pending == {}


def test_a_session_that_ends_with_such_a_reply_lets_go_of_it(
    client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its memory would stay mapped."""
    with monkeypatch.context() as patched:
        patched.setattr(protocol, "take_plain", interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.compute(*make_inputs(FREE, 1))
    link = client._link
    assert link._received
    client.close()
    assert not link._received


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_sum_has_such_a_reply_once(
    client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch, is_copied: bool
) -> None:
    """What was copied for `result` is not added, too."""
    inputs = make_inputs(FREE, 1, 4)
    future, other = client.submit(*inputs), client.submit(*make_inputs(FREE, 2))
    with monkeypatch.context() as patched:
        patched.setattr(protocol.Reply, "copy_rows", interrupting(is_copied))
        with pytest.raises(KeyboardInterrupt):
            other.result()
    total = np.zeros_like(inputs.hidden_states)
    future.add_to(total)
    assert_exact(total, inputs)


def test_an_interrupt_of_what_is_done_about_one_loses_no_reply(
    client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(FREE, 1, 4)
    future = client.submit(*inputs)
    with monkeypatch.context() as patched:
        patched.setattr(protocol.Reply, "copy_rows", interrupt)
        patched.setattr(Link, "_is_given_up", interrupt)
        with pytest.raises(KeyboardInterrupt):
            future.result()
    assert_exact(future.result(), inputs)


def test_whatever_a_handler_raises(
    client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most often it is for a time that is over."""

    def give_up(*_: Any) -> None:
        raise TimeoutError("as the test says")

    inputs = make_inputs(FREE, 1, 4)
    future = client.submit(*inputs)
    with monkeypatch.context() as patched:
        patched.setattr(protocol.Reply, "copy_rows", give_up)
        with pytest.raises(TimeoutError, match="as the test says"):
            future.result()
    assert_exact(future.result(), inputs)
    assert client.stats().reconnects == 0


def test_an_interrupt_after_a_reply_was_given_does_not_give_it_again(
    client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, others = make_inputs(FREE, 1, 4), make_inputs(FREE, 2)
    future, other = client.submit(*inputs), client.submit(*others)
    real = Link._close

    def close_and_interrupt(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Link, "_close", close_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            other.result()
    assert_exact(other.result(), others)
    assert_exact(future.result(), inputs)
    assert client.stats().reconnects == 0


def test_an_interrupted_compute_gets_no_rows_any_more(
    worker: GatedWorker, client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `out` is the caller's again, also where another thread receives."""
    first = client.submit(*make_inputs(GATED, 1))
    worker.next_turn()
    inputs = make_inputs(FREE, 2)
    out = np.zeros_like(inputs.hidden_states)
    with monkeypatch.context() as patched:
        patched.setattr(Link, "call", lambda *_: None)
        patched.setattr(Link, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.compute(*inputs, out=out)
    out[...] = 99
    worker.let_go()
    first.result()
    after = make_inputs(FREE, 3)
    assert_exact(client.compute(*after), after)
    assert (out == 99).all()


@pytest.mark.parametrize("slice_tokens", [None, 2])
def test_a_call_that_is_over_refers_to_itself_no_more(
    client: moeshm.ExpertClient, slice_tokens: int | None
) -> None:
    """Its arrays go with the future, and not with a collection that engines put off."""
    inputs = make_inputs(FREE, 1, 4)
    client.submit(*inputs, slice_tokens=slice_tokens).result()
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            client.submit(*inputs, slice_tokens=slice_tokens).result()
        assert sum(type(each) is CallFuture for each in gc.get_objects()) < 5
    finally:
        gc.enable()


def test_a_call_that_never_left_holds_up_none(
    worker: GatedWorker, client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing will ever come for it; what was sent after it and answered says so."""
    with monkeypatch.context() as patched:
        patched.setattr(Outbox, "write_at_once", interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.compute(*make_inputs(FREE, 1), timeout_s=600.0)
    inputs = make_inputs(FREE, 5)
    assert_exact(client.submit(*inputs).result(), inputs)
    assert client._link._pending == {}
    client.submit(*make_inputs(GATED, 1), timeout_s=0.1)
    worker.next_turn()
    with within(SOON_S), pytest.raises(DeadlineExceeded, match="the session is given up"):
        client.submit(*make_inputs(FREE, 2), timeout_s=0.3).result()
    worker.let_go()


def test_clients_closed_by_many_threads_at_once(worker: GatedWorker, transport: str) -> None:
    client = moeshm.connect(worker.address, transport=transport)
    threads = [threading.Thread(target=client.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_an_interrupted_submit_of_several_parts_gets_no_rows_any_more(
    client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One had left."""
    inputs = make_inputs(FREE, 1, 4)
    out = np.zeros_like(inputs.hidden_states)
    real, n_sent = Link.send, 0

    def send(*arguments: Any) -> int:
        nonlocal n_sent
        n_sent += 1
        if n_sent > 1:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Link, "send", send)
        with pytest.raises(KeyboardInterrupt):
            client.submit(*inputs, out=out, slice_tokens=2)
    out[...] = 99
    after = make_inputs(FREE, 3)
    assert_exact(client.submit(*after).result(), after)
    assert (out == 99).all()


def test_what_is_no_handlers_ends_the_session(
    client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there is no memory for a result: no other call is to find it again and again."""
    future = client.submit(*make_inputs(FREE, 1, 4))
    found: list[BaseException] = []

    def wait() -> None:
        try:
            future.result()
        except MemoryError as error:
            found.append(error)

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(protocol.Reply, "copy_rows", fail)
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(PATIENCE_S)
    assert found
    with pytest.raises(WorkerDied, match="a reply could not be taken in"):
        future.result()
    inputs = make_inputs(FREE, 2)
    assert_exact(client.compute(*inputs), inputs)


def test_one_interrupt_does_not_make_every_later_call_look_for_what_was_given_up(
    client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Outbox, "write_at_once", interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.compute(*make_inputs(FREE, 1))
    assert client._link._has_given_up
    for tag in range(2):
        inputs = make_inputs(FREE, tag)
        assert_exact(client.compute(*inputs), inputs)
    assert not client._link._has_given_up
