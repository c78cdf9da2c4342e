"""Calls of every kind by a client that lies, and by one that does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from moeshm.dtypes import DType, narrow, widen
from moeshm.errors import InvalidCall, WorkerDied
from moeshm.held import HeldView
from moeshm.soak.books import Books, Line
from moeshm.soak.calls import OpenLine, Talk, open_whole
from moeshm.soak.ledger import Ledger
from moeshm.soak.messages import Counts, Failed, Message, Unanswered, Wrong

from .cases import BACKEND, CASES, LAYERS, found


class Future:
    def __init__(self, result: Any) -> None:
        self._result = result

    def result(self, timeout_s: float | None = None) -> Any:  # noqa: ARG002
        return self._result


class Client:
    """Computes here, as `ExpertClient` of a worker that holds everything would."""

    def __init__(self, lie: Callable[[Any], Any] = lambda result: result) -> None:
        self.layers = BACKEND.layers
        self.view = HeldView(BACKEND.layers)
        self.n_closed = self.n_held = 0
        self._lie = lie

    def compute(
        self,
        layer: int,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        *,
        view: HeldView | None = None,
        global_ids: bool = False,
        out: Any = None,
        **_options: Any,
    ) -> Any:
        experts = (view or self.view).layers[layer].experts
        if topk_ids.max(initial=-1) >= len(experts) and not global_ids:
            raise InvalidCall("no such expert")
        ids = topk_ids if global_ids else np.array([*experts, -1], np.int32)[topk_ids]
        if out is None:
            out = np.empty_like(hidden_states)
        BACKEND.ffn(layer, hidden_states, ids, topk_weights, out)
        return self._lie(out)

    def submit(self, *arguments: Any, **options: Any) -> Future:
        return Future(self.compute(*arguments, **options))

    def hold(self, experts: Any, timeout_s: float | None = None) -> HeldView:  # noqa: ARG002
        self.n_held += 1
        infos = {
            number: msgspec.structs.replace(BACKEND.layers[number], experts=tuple(ids))
            for number, ids in experts.items()
        }
        return HeldView(infos)

    def release(self, view: HeldView) -> None:
        pass

    def close(self) -> None:
        self.n_closed += 1


def open_line(books: Books, client: Any) -> OpenLine:
    opened = open_whole(books, Line("w, client 1", ("w",)), lambda: client, 10)
    assert opened is not None
    return opened


def talk_of(books: Books, client: Any, reopen_share: float = 1.0) -> Talk:
    short = [case for case in CASES if len(case.topk_ids) < 100]
    opened = open_line(books, client)
    return Talk(books, short, opened, lambda: open_line(books, Client()), reopen_share)


def test_honest_calls_of_every_kind_leave_no_word(books: Books, told: list[Message]) -> None:
    client = Client()
    talk, rng = talk_of(books, client), random.Random(1)
    for _ in range(150):
        talk.step(rng)
    talk.recover()
    talk.close()
    books.tick()
    assert found(told) == []
    (counts,) = told
    assert isinstance(counts, Counts)
    for name in ("calls", "checked", "views held", "clients opened anew", "forgotten futures"):
        assert counts.counts[name] > 0, name
    assert counts.counts["meant: InvalidCall"] > 0
    assert client.n_held > 0
    assert client.n_closed == 1


def test_a_wrong_result_is_told_with_the_call_and_the_difference(
    books: Books, told: list[Message]
) -> None:
    def lie(result: Any) -> Any:
        result[-1] = narrow(widen(result[-1:]) + 1, DType.F32)[0] if result.dtype.kind == "f" else 0
        return result

    talk, rng = talk_of(books, Client(lie), 0.0), random.Random(2)
    for _ in range(30):
        talk.step(rng)
    wrong = [message for message in told if isinstance(message, Wrong)]
    assert len(wrong) > 10
    assert {type(message) for message in found(told)} == {Wrong}
    assert "layer" in wrong[0].difference
    assert "rows are wrong" in wrong[0].difference
    ledger = Ledger()
    ledger.fault("worker killed", "w")
    ledger.told("caller 0", wrong[0])
    assert ledger.wrong_results == 1
    assert wrong[0].difference in ledger.failures[0]
    assert "worker killed: w" in ledger.failures[0]


def words_of(books: Books, told: list[Message], client: Client) -> set[str]:
    talk, rng = talk_of(books, client, 0.0), random.Random(4)
    for _ in range(40):
        talk.step(rng)
    assert {type(message) for message in found(told)} == {Wrong}
    return {message.difference for message in told if isinstance(message, Wrong)}


def test_no_result_at_all_is_wrong(books: Books, told: list[Message]) -> None:
    assert words_of(books, told, Client(lambda _result: None)) == {"None instead of a result"}


def test_a_result_elsewhere_than_in_out_is_wrong(books: Books, told: list[Message]) -> None:
    words = words_of(books, told, Client(lambda result: result.copy()))
    assert words == {"the result is not the `out` that was given"}


def test_a_result_that_changes_later_is_wrong(books: Books, told: list[Message]) -> None:
    last: list[Any] = []

    def write_into_the_last(result: Any) -> Any:
        for earlier in last:
            earlier[...] = 0
        last[:] = [result]
        return result

    words = words_of(books, told, Client(write_into_the_last))
    assert "its result changed with a later call" in words


def test_a_result_of_ids_that_no_layer_has_is_wrong(books: Books, told: list[Message]) -> None:
    class Generous(Client):
        def compute(self, *arguments: Any, **_options: Any) -> Any:
            return np.zeros_like(arguments[1])

    talk_of(books, Generous())._refused(random.Random(1))
    assert [type(message) for message in told] == [Wrong]


def test_a_worker_that_began_with_other_experts_is_asked_for_all(
    books: Books, told: list[Message]
) -> None:
    client = Client()
    client.view = client.hold({0: [3, 1]})
    opened = open_line(books, client)
    assert opened.whole.experts == {n: tuple(range(16)) for n in LAYERS}
    assert found(told) == []


def test_who_does_not_find_the_worker_again_is_found(
    books: Books, told: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeshm.soak.calls._RECOVERY_S", 0.0)

    class Lonely(Client):
        def compute(self, *_arguments: Any, **_options: Any) -> Any:
            raise WorkerDied("gone")

    talk_of(books, Lonely()).recover()
    assert [type(message) for message in told] == [Failed, Unanswered]
