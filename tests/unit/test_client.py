"""The client's own promises, with a worker in a thread: choices, links, futures, interrupts."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import moeshm
from moeshm import handshake, orders, protocol, session, settings
from moeshm.call import CallFuture
from moeshm.choice import choose
from moeshm.dtypes import DType
from moeshm.errors import (
    ClientClosed,
    ConnectError,
    InvalidCall,
    SessionError,
    SettingError,
    WorkerDied,
)
from moeshm.handshake import SlabWish
from moeshm.session import ControlSocket, Session
from tests.crash.arithmetic import FREE, WIDE, ArithmeticBackend, assert_exact, make_inputs
from tests.wire import meanwhile

PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of the environment are not ours."""
    for name in ("MOESHM_TRANSPORT", "MOESHM_WIRE_DTYPE", "MOESHM_BATCH_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    settings.current.cache_clear()
    yield
    settings.current.cache_clear()


class ScriptedWorker:
    """Accepts sessions in this process; the test answers calls as it likes."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix:{path}"
        self.backend = ArithmeticBackend()
        self.sessions: list[Session] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()

    @contextlib.contextmanager
    def accepting(self) -> Iterator[None]:
        """One client, who connects inside."""
        thread = threading.Thread(target=self._accept)
        thread.start()
        try:
            yield
        finally:
            thread.join(PATIENCE_S)

    def _accept(self) -> None:
        control = ControlSocket(self._listener.accept()[0])
        opened = session.accept(control, self.backend.layers, "scripted", 4096, PATIENCE_S)
        self.sessions.append(opened)

    def connect(self, transport: str, **options: Any) -> moeshm.ExpertClient:
        """A client of it."""
        with self.accepting():
            return moeshm.connect(self.address, transport=transport, **options)

    def take_call(self) -> protocol.Call:
        """The next call of the last session, copied."""
        opened = self.sessions[-1]
        record = opened.transport.acquire(PATIENCE_S)
        _, fields = protocol.read_call_header(record)
        call = protocol.parse_call(record, fields, self.backend.layers, 4096)
        copied = msgspec.structs.replace(
            call,
            hidden_states=call.hidden_states.copy(),
            topk_weights=call.topk_weights.copy(),
        )
        del call
        record.release()
        return copied

    def reply(
        self, call: protocol.Call, rows: Any, *, call_id: int = 0, dtype: DType | None = None
    ) -> None:
        """Answer it, or another call, with these rows."""
        reply = self.sessions[-1].transport.reserve(
            protocol.HEADER_BYTES + rows.nbytes, protocol.REPLY, 0, PATIENCE_S
        )
        n_tokens, hidden_size = rows.shape
        protocol.pack_reply(
            reply, call_id or call.call_id, n_tokens, hidden_size, dtype or call.dtype, 1234
        )
        view = memoryview(reply)
        view[protocol.HEADER_BYTES :] = rows.tobytes()
        view.release()
        reply.commit()

    def accept_and_answer(self, answer: Callable[[orders.Hold], tuple[bytes, bytes]]) -> None:
        """Accept a client, and answer its first order to hold."""
        self._accept()
        transport = self.sessions[-1].transport
        while True:
            record = transport.acquire(PATIENCE_S)
            order = orders.parse_order(record)
            record.release()
            if isinstance(order, orders.Hold):
                break
        transport.write(answer(order), protocol.REPLY, 0, PATIENCE_S)

    def close(self) -> None:
        """End every session."""
        self._listener.close()
        for opened in self.sessions:
            opened.close()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[ScriptedWorker]:
    """A worker that does as it is told."""
    scripted = ScriptedWorker(tmp_path / "w.sock")
    yield scripted
    scripted.close()


@pytest.fixture(params=["shared", "stream"])
def transport(request: pytest.FixtureRequest) -> str:
    """How activations travel."""
    return str(request.param)


# --- answers that are none ----------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["fewer rows", "wider rows", "dtype", "unknown call"])
def test_an_answer_to_another_question_is_no_result(
    worker: ScriptedWorker, transport: str, wrong: str
) -> None:
    """Never an array that nobody has filled."""
    inputs = make_inputs(FREE, 1)
    with worker.connect(transport) as client:
        futures = [client.submit(*inputs) for _ in range(2)]
        call = worker.take_call()
        rows = call.hidden_states
        if wrong == "fewer rows":
            worker.reply(call, rows[:-1])
        elif wrong == "wider rows":
            worker.reply(call, np.zeros((3, 17), np.float32))
        elif wrong == "dtype":
            worker.reply(call, rows.astype(np.float16), dtype=DType.F16)
        else:
            worker.reply(call, rows, call_id=4711)
        for future in futures:
            with pytest.raises(WorkerDied, match=r"instead of f32 \[3, 16\]|4711.* not open"):
                future.result()


def test_with_a_fallback_a_wrong_answer_is_computed_here(
    worker: ScriptedWorker, transport: str
) -> None:
    inputs = make_inputs(FREE, 1)
    with worker.connect(transport, fallback=ArithmeticBackend()) as client:
        future = client.submit(*inputs)
        call = worker.take_call()
        worker.reply(call, call.hidden_states[:-1])
        assert_exact(future.result(), inputs)


def test_a_session_lost_with_another_calls_error_names_its_cause(
    worker: ScriptedWorker, transport: str
) -> None:
    with worker.connect(transport) as client:
        future = client.submit(*make_inputs(FREE, 1))
        worker.sessions[-1].control.send(handshake.Goodbye("lunch break"), [], PATIENCE_S)
        worker.sessions[-1].close()
        with pytest.raises(WorkerDied, match="lunch break"):
            future.result()


# --- parts, rows and formats --------------------------------------------------------------


def test_results_of_a_call_in_parts_come_in_any_order(
    worker: ScriptedWorker, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(FREE, 5, n_tokens=10)
    with worker.connect(transport) as client:
        monkeypatch.setattr(client._link, "max_tokens", 3)
        future = client.submit(*inputs)
        calls = [worker.take_call() for _ in range(4)]
        assert [len(call.topk_ids) for call in calls] == [3, 3, 3, 1]
        for call in (calls[2], calls[0], calls[3]):
            worker.reply(call, _answer(call))
        assert not future.done()
        with pytest.raises(moeshm.errors.NotReady):
            future.result(timeout_s=0.0)
        worker.reply(calls[1], _answer(calls[1]))
        assert_exact(future.result(), inputs)
        stats = client.stats()
        assert (stats.calls, stats.messages, stats.rows) == (1, 4, 10)
        assert stats.compute_s == pytest.approx(4 * 1234e-9)


def test_rows_without_an_expert_stay_here(worker: ScriptedWorker, transport: str) -> None:
    inputs = make_inputs(FREE, 5, n_tokens=6)
    ids = inputs.topk_ids.copy()
    ids[[1, 4]] = -1
    inputs = inputs._replace(topk_ids=ids)
    with worker.connect(transport) as client:
        future = client.submit(*inputs)
        call = worker.take_call()
        np.testing.assert_array_equal(call.hidden_states, inputs.hidden_states[[0, 2, 3, 5]])
        worker.reply(call, _answer(call))
        assert_exact(future.result(), inputs)


@pytest.mark.parametrize("n_tokens", [0, 3])
def test_a_call_without_experts_needs_no_worker(
    worker: ScriptedWorker, transport: str, n_tokens: int
) -> None:
    hidden_states = np.ones((n_tokens, 16), np.float32)
    ids = np.full((n_tokens, 2), -1, np.int32)
    weights = np.ones((n_tokens, 2), np.float32)
    with worker.connect(transport) as client:
        worker.sessions[-1].close()
        result = client.compute(FREE, hidden_states, ids, weights)
        np.testing.assert_array_equal(result, np.zeros((n_tokens, 16)))
        assert client.stats().messages == 0


def _answer(call: protocol.Call) -> Any:
    rows = np.empty_like(call.hidden_states)
    ArithmeticBackend().ffn(call.layer, call.hidden_states, call.topk_ids, call.topk_weights, rows)
    return rows


# --- interrupted --------------------------------------------------------------------------


class Interrupts:
    """A fallback that Ctrl-C stops at its first call."""

    name = "interrupts"

    def __init__(self) -> None:
        self._backend = ArithmeticBackend()
        self.layers = self._backend.layers
        self.calls = 0

    def ffn(self, layer: int, hidden_states: Any, ids: Any, weights: Any, out: Any) -> None:
        """As `Backend.ffn`."""
        self.calls += 1
        if self.calls == 1:
            raise KeyboardInterrupt
        self._backend.ffn(layer, hidden_states, ids, weights, out)


def test_an_interrupted_fallback_is_not_taken_for_a_result(
    worker: ScriptedWorker, transport: str
) -> None:
    inputs = make_inputs(FREE, 1)
    with worker.connect(transport, fallback=Interrupts()) as client:
        future = client.submit(*inputs)
        worker.sessions[-1].close()
        with pytest.raises(KeyboardInterrupt):
            future.result()
        assert_exact(future.result(), inputs)


def test_an_interrupt_while_a_reply_is_copied_is_not_taken_for_a_result(
    worker: ScriptedWorker, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    inputs = make_inputs(FREE, 1)
    with worker.connect(transport) as client:
        future = client.submit(*inputs)
        call = worker.take_call()
        worker.reply(call, _answer(call))
        with monkeypatch.context() as patched:
            patched.setattr(CallFuture, "take", interrupt)
            with pytest.raises(KeyboardInterrupt):
                future.result()
        assert not future.done()
        assert_exact(future.result(), inputs)


def test_an_interrupt_in_the_middle_of_sending_does_not_garble_the_stream(
    worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows would be taken for the rest of the record, which comes first."""
    inputs = make_inputs(WIDE, 1, 1024)
    with worker.connect("stream") as client:
        patched: Any = client._link.session.transport
        real = patched._wait_for_room

        def interrupt(deadline: float) -> bool:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return bool(real(deadline))

        monkeypatch.setattr(patched, "_wait_for_room", interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.submit(*inputs)
        monkeypatch.undo()
        after = make_inputs(FREE, 2)

        def serve() -> None:
            for sent in (inputs, after):
                call = worker.take_call()
                assert np.array_equal(call.hidden_states, sent.hidden_states)
                worker.reply(call, _answer(call))

        with meanwhile(serve):
            assert_exact(client.compute(*after), after)
        assert client.stats().reconnects == 0


# --- opening and closing ------------------------------------------------------------------


def _refuse(order: orders.Hold) -> tuple[bytes, bytes]:
    return protocol.pack_error(order.call_id, InvalidCall("not here"))


def _hold_another_model(order: orders.Hold) -> tuple[bytes, bytes]:
    layers = ArithmeticBackend().layers
    other = {n: msgspec.structs.replace(layers[n], intermediate_size=5) for n in order.experts}
    return protocol.pack_held(order.call_id, other)


@pytest.mark.parametrize(
    ("answer", "says"), [(_refuse, "not here"), (_hold_another_model, "it is another model")]
)
def test_a_worker_that_comes_back_with_other_layers_is_refused(
    worker: ScriptedWorker,
    transport: str,
    answer: Callable[[orders.Hold], tuple[bytes, bytes]],
    says: str,
) -> None:
    with worker.connect(transport) as client:
        worker.sessions[-1].close()
        with pytest.raises(WorkerDied):
            client.compute(*make_inputs(FREE, 1))
        layers = dict(worker.backend.layers)
        del layers[WIDE]
        worker.backend.layers = layers
        says = rf"holds other layers than before, and not those again \({says}\)"
        with (
            meanwhile(lambda: worker.accept_and_answer(answer)),
            pytest.raises(WorkerDied, match=says),
        ):
            client.compute(*make_inputs(FREE, 1))


def test_after_a_failed_attempt_calls_do_not_try_at_once(
    worker: ScriptedWorker, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker.connect(transport) as client:
        attempts: list[int] = []

        def refuse(_wish: SlabWish) -> Any:
            attempts.append(1)
            raise ConnectError("not at home")

        monkeypatch.setattr(client._sessions, "_open_session", refuse)
        monkeypatch.setattr("moeshm.reconnect.FIRST_PAUSE_S", 1000.0)
        worker.sessions[-1].close()
        for _ in range(5):
            with pytest.raises(WorkerDied):
                client.compute(*make_inputs(FREE, 1))
        assert attempts == [1]


def test_closing_is_final_and_may_be_done_twice(worker: ScriptedWorker, transport: str) -> None:
    client = worker.connect(transport)
    future = client.submit(*make_inputs(FREE, 1))
    client.close()
    client.close()
    with pytest.raises(ClientClosed):
        future.result()
    with pytest.raises(ClientClosed, match="connect anew"):
        client.submit(*make_inputs(FREE, 1))
    assert client.stats().calls == 1
    assert client.transport == transport


def test_a_close_that_was_interrupted_is_made_good_by_the_next(
    worker: ScriptedWorker, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = worker.connect(transport)
    future = client.submit(*make_inputs(FREE, 1))
    n_ends: list[int] = []

    def end() -> None:
        n_ends.append(1)
        if len(n_ends) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(client._sessions, "_on_close", end)
    with pytest.raises(KeyboardInterrupt):
        client.close()
    with pytest.raises(ClientClosed):
        future.result()
    for _ in range(2):
        client.close()
    assert n_ends == [1, 1]


def test_a_close_while_another_thread_connects_anew(
    worker: ScriptedWorker, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it opens is closed, too, and a worker that it started is ended."""
    client = worker.connect(transport)
    n_ends: list[int] = []
    monkeypatch.setattr(client._sessions, "_on_close", lambda: n_ends.append(1))
    worker.sessions[-1].close()
    with pytest.raises(WorkerDied):
        client.compute(*make_inputs(FREE, 1))
    open_session = client._sessions._open_session

    def close_and_open(wish: SlabWish) -> Any:
        closer = threading.Thread(target=client.close)
        closer.start()
        closer.join(PATIENCE_S)
        return open_session(wish)

    monkeypatch.setattr(client._sessions, "_open_session", close_and_open)
    with worker.accepting(), pytest.raises(ClientClosed):
        client.compute(*make_inputs(FREE, 1), timeout_s=2)
    # The worker's side sees the end.
    with pytest.raises(moeshm.errors.MoeshmError, match=r"closed|gone"):
        worker.sessions[-1].transport.acquire(PATIENCE_S)
    assert n_ends == [1, 1]


def test_a_thread_that_waits_is_told_of_the_close(worker: ScriptedWorker, transport: str) -> None:
    client = worker.connect(transport)
    future = client.submit(*make_inputs(FREE, 1))
    answers: list[BaseException] = []

    def wait() -> None:
        try:
            future.result()
        except ClientClosed as error:
            answers.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    worker.take_call()
    client.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert len(answers) == 1


# --- choices ------------------------------------------------------------------------------


def test_arguments_win_over_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESHM_TRANSPORT", "stream")
    monkeypatch.setenv("MOESHM_WIRE_DTYPE", "f16")
    settings.current.cache_clear()
    assert choose(None, None, None)[:3] == ("stream", "f16", 10.0)
    assert choose("shared", "bf16", 2.5)[:3] == ("shared", "bf16", 2.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pigeon", None, None), "transport='pigeon'; choose auto, stream, shared"),
        ((None, "f64", None), "wire_dtype='f64'; choose auto, f32, f16, bf16"),
        ((None, None, 0.0), "timeout_s=0.0; it must lie in"),
        ((None, None, float("nan")), "timeout_s=nan; it must lie in"),
        ((None, None, float("inf")), "timeout_s=inf; it must lie in"),
    ],
)
def test_choices_that_are_none(arguments: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        choose(*arguments)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match=f"no worker answers at {tmp_path}/none .*moeshm worker"):
        moeshm.connect(f"unix:{tmp_path}/none")


def test_a_worker_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(tmp_path / "w.sock"))
        silent.listen()
        with pytest.raises(SessionError, match="did not come in time"):
            moeshm.connect(f"unix:{tmp_path}/w.sock", timeout_s=0.1)


def test_an_unknown_layer_names_those_that_are_there(
    worker: ScriptedWorker, transport: str
) -> None:
    with (
        worker.connect(transport) as client,
        pytest.raises(InvalidCall, match=r"layer 9 is not .*; it holds \[0, 1, 2, 3, 4\]"),
    ):
        client.submit(*make_inputs(FREE)._replace(layer=9))
