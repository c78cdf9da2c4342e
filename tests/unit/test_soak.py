"""What a calling process notes: each kind of damage, done on purpose, and nothing without any."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from moeshm import errors
from moeshm.backends.cpu import CpuBackend
from moeshm.checkpoint import load
from moeshm.demo import tiny_moe_path
from moeshm.dtypes import DType, narrow, widen
from moeshm.errors import (
    ClientClosed,
    DeadlineExceeded,
    InvalidCall,
    MoeshmError,
    ProtocolError,
    WorkerDied,
)
from moeshm.held import HeldView
from moeshm.soak import pool
from moeshm.soak.books import HANG_S, LONG_S, PAUSE_S, Books, Line, OwnWork
from moeshm.soak.calls import OpenLine, Talk, open_whole
from moeshm.soak.ledger import Ledger
from moeshm.soak.messages import (
    Counts,
    Failed,
    Late,
    Lost,
    Message,
    Overdue,
    Paused,
    Unanswered,
    Unexpected,
    Wrong,
)
from moeshm.soak.pool import Case

LAYERS = load(tiny_moe_path()).layers
CASES = pool.draw(LAYERS, seed=7)
BACKEND = CpuBackend(LAYERS, threads=1)


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told() -> list[Message]:
    return []


@pytest.fixture
def books(told: list[Message], clock: Clock) -> Books:
    return Books(told.append, clock=clock)


def found(told: list[Message]) -> list[Message]:
    """All but the signs of life."""
    return [message for message in told if not isinstance(message, Counts)]


# --- results ----------------------------------------------------------------------------


def compute(case: Case, wire: DType | None = None) -> Any:
    out = np.empty_like(case.hidden_states)
    BACKEND.ffn(case.layer, case.hidden_states, case.topk_ids, case.topk_weights, out)
    return narrow(widen(narrow(widen(out), wire or case.wire)), case.dtype)


def test_the_cases_mix_layers_formats_and_sizes() -> None:
    assert {case.layer for case in CASES} == set(LAYERS)
    assert {case.dtype for case in CASES} == {case.wire for case in CASES} == set(DType)
    sizes = [len(case.topk_ids) for case in pool.draw(LAYERS, seed=1)]
    assert min(sizes) == 1
    assert max(sizes) == 512
    assert any((case.topk_ids == -1).any() for case in CASES)


def test_a_right_result_is_right_whatever_it_travelled_in() -> None:
    for case in CASES:
        assert case.difference(compute(case)) == "", case


def test_cases_that_may_be_rounded_on_the_way_allow_for_it() -> None:
    for case in pool.draw(LAYERS, seed=8, coarsest=DType.BF16):
        assert case.difference(compute(case, DType.BF16)) == "", case


def test_a_seed_draws_the_same_cases_and_files_keep_them(tmp_path: Path) -> None:
    pool.save(CASES, tmp_path / "cases.npz")
    again = pool.draw(LAYERS, seed=7)
    for case, other, kept in zip(CASES, again, pool.load(tmp_path / "cases.npz"), strict=True):
        for each in (other, kept):
            assert str(each) == str(case)
            assert each.tolerance == case.tolerance
            for name in ("hidden_states", "topk_ids", "topk_weights", "expected"):
                np.testing.assert_array_equal(getattr(each, name), getattr(case, name))
    other_seed = pool.draw(LAYERS, seed=9)
    assert [str(case) for case in other_seed] != [str(case) for case in CASES]


def large_case() -> Case:
    return max(CASES, key=lambda case: len(case.topk_ids))


def changed(case: Case, row: int, change: Callable[[Any], Any]) -> Any:
    values = widen(compute(case)).copy()
    values[row] = change(values[row])
    return narrow(values, case.dtype)


@pytest.mark.parametrize(
    "change",
    [lambda row: row * 0, lambda row: row * 1.1, lambda row: row * np.nan, lambda row: row[::-1]],
    ids=["zeros", "a tenth more", "nan", "another order"],
)
def test_one_wrong_row_of_many_is_found(change: Callable[[Any], Any]) -> None:
    case = large_case()
    row = int(np.flatnonzero((case.topk_ids >= 0).any(axis=1))[-1])
    difference = case.difference(changed(case, row, change))
    assert difference.startswith(f"1 of {len(case.topk_ids)} rows are wrong, rows [{row}]")


def test_a_row_without_an_expert_must_be_zero() -> None:
    case = next(c for c in CASES if (c.topk_ids < 0).all(axis=1).any() and not c.is_empty)
    row = int(np.flatnonzero((case.topk_ids < 0).all(axis=1))[0])
    assert f"rows [{row}]" in case.difference(changed(case, row, lambda values: values + 1e-3))


def test_a_result_of_another_shape_or_format_is_wrong() -> None:
    case = large_case()
    assert case.difference(compute(case)[1:])
    other = DType.F32 if case.dtype is not DType.F32 else DType.F16
    assert case.difference(narrow(widen(compute(case)), other))


# --- a client that lies, and one that does not --------------------------------------------


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


# --- errors and deadlines -----------------------------------------------------------------

LINE = Line("w, client 1", ("w",), answered=990.0)


def fail(books: Books, error: BaseException, timeout_s: float = 10, line: Line = LINE) -> None:
    def run() -> None:
        raise error

    assert books.attempt(books.begin(line, "a call", timeout_s), run) is None


def test_a_lost_worker_is_told_with_the_time_in_which_its_cause_must_lie(
    books: Books, told: list[Message], clock: Clock
) -> None:
    fail(books, WorkerDied("gone"))
    assert told == [Failed("WorkerDied", "a call: gone", LINE.name, LINE.targets, 990.0, clock.now)]


@pytest.mark.parametrize(
    "error",
    [
        DeadlineExceeded("but it has time left"),
        ClientClosed("but nobody closed it"),
        InvalidCall("but it is valid"),
        ProtocolError("but both are moeshm"),
        errors.WorkerFailed("but it may not"),
        errors.Corrupt("but nobody wrote"),
        OSError("untyped"),
        AssertionError("untyped"),
    ],
)
def test_an_error_that_may_not_be_is_told(
    books: Books, told: list[Message], error: Exception
) -> None:
    fail(books, error)
    (message,) = told
    assert isinstance(message, Unexpected)
    assert message.error == type(error).__name__
    assert str(error) in message.detail


def test_errors_that_must_be(books: Books, told: list[Message], clock: Clock) -> None:
    fail(books, DeadlineExceeded("late"), timeout_s=0)
    assert told == [Lost(LINE.name, clock.now, clock.now)]
    fail(books, ClientClosed("by us"), line=Line("w", ("w",), is_closed=True))
    call = books.begin(LINE, "a bad call", 1)
    assert books.attempt(call, lambda: raise_it(InvalidCall("meant")), (InvalidCall,)) is None
    assert len(told) == 1


def test_what_has_no_result_may_give_none(books: Books, told: list[Message]) -> None:
    books.do(books.begin(LINE, "a close", 1), lambda: None)
    assert told == []
    books.do(books.begin(LINE, "a close", 1), lambda: raise_it(InvalidCall("but it is valid")))
    assert [type(message) for message in told] == [Unexpected]


def raise_it(error: MoeshmError) -> None:
    raise error


def test_no_answer_in_a_minute_is_a_hang(books: Books, told: list[Message], clock: Clock) -> None:
    def run() -> None:
        clock.now += LONG_S
        raise DeadlineExceeded("nobody told")

    books.attempt(books.begin(LINE, "a call", LONG_S), run)
    assert [type(message) for message in told] == [Lost, Unanswered]


def pass_time(clock: Clock, seconds: float) -> Callable[[], bool]:
    def run() -> bool:
        clock.now += seconds
        return True

    return run


@pytest.mark.parametrize(("seconds", "n_late"), [(1.0, 0), (1.015, 0), (1.030, 1), (1.2, 1)])
def test_a_call_that_ends_late_is_told(
    books: Books, told: list[Message], clock: Clock, seconds: float, n_late: int
) -> None:
    books.attempt(books.begin(LINE, "a call", 1.0), pass_time(clock, seconds))
    books._ticked = clock.now  # no pause: this process ran
    books.tick()
    late = found(told)
    assert [type(message) for message in late] == [Late] * n_late
    for message in late:
        assert isinstance(message, Late)
        assert message.late_s == pytest.approx(seconds - 1.0)


def test_what_the_caller_did_before_it_asked_is_not_late(
    books: Books, told: list[Message], clock: Clock
) -> None:
    call = books.begin(LINE, "a call", 1.0)
    books.attempt(call, pass_time(clock, 0.1))
    clock.now += 30
    books.attempt(call, pass_time(clock, 0.01))
    books._ticked = clock.now
    books.tick()
    assert found(told) == []


def test_own_work_is_nobodys_delay(told: list[Message], clock: Clock) -> None:
    case = CASES[0]

    class Slow:
        name, layers = "slow", BACKEND.layers

        def ffn(self, *_arguments: Any) -> None:
            clock.now += 3

    own = OwnWork(Slow(), clock)
    books = Books(told.append, own, clock)
    hidden = case.hidden_states
    arguments = case.layer, hidden, case.topk_ids, case.topk_weights, hidden.copy()

    def fall_back() -> bool:
        clock.now += 1.001
        own.ffn(*arguments)
        return True

    call = books.begin(LINE, "a call", 1.0)
    books.attempt(call, fall_back)
    assert call.is_own_work
    books._ticked = clock.now
    books.tick()
    # Other calls of the client may have heard of the session's end.
    assert found(told) == [Lost(LINE.name, call.deadline, clock.now)]
    # And nothing says that its worker lives.
    before = LINE.answered
    books.check(call, case, compute(case))
    assert LINE.answered == before
    books.check(call, case, compute(case) + 1)
    (wrong,) = (each for each in told if isinstance(each, Wrong))
    assert "computed by its caller" in wrong.difference


def test_a_submit_that_ends_after_its_deadline_may_have_lost_the_session(
    books: Books, told: list[Message], clock: Clock
) -> None:
    """Though it gives a future: of one with a fallback, whose result may never be asked for."""
    call = books.begin(LINE, "a submit", 1.0)
    clock.now += 0.5
    books.sent(call)
    assert not told
    clock.now += 0.501
    books.sent(call)
    assert told == [Lost(LINE.name, call.deadline, clock.now)]


def test_a_call_that_does_not_end_is_told_once(
    books: Books, told: list[Message], clock: Clock
) -> None:
    begun, over = threading.Event(), threading.Event()

    def hang() -> bool:
        begun.set()
        return over.wait(30)

    call = books.begin(LINE, "a call", 1.0)
    thread = threading.Thread(target=books.attempt, args=(call, hang))
    thread.start()
    try:
        assert begun.wait(30)
        for _ in range(int((HANG_S + 3) / PAUSE_S)):
            clock.now += PAUSE_S * 0.99
            books.tick()
    finally:
        over.set()
        thread.join()
    overdue = found(told)
    assert [type(message) for message in overdue] == [Overdue]
    ledger = Ledger(clock)
    ledger.told("caller 1", overdue[0])
    assert ledger.hangs == 1


@pytest.mark.parametrize("computes", [True, False])
def test_who_computes_by_himself_does_not_hang(
    told: list[Message], clock: Clock, computes: bool
) -> None:
    """As long as it does: a fallback may take long for many tokens."""
    case, begun, over = CASES[0], threading.Event(), threading.Event()

    class Slow:
        name, layers = "slow", BACKEND.layers

        def ffn(self, *_arguments: Any) -> None:
            wait()

    def wait() -> bool:
        begun.set()
        return over.wait(30)

    def fall_back() -> bool:
        own.ffn(case.layer, case.hidden_states, case.topk_ids, case.topk_weights, None)  # type: ignore[arg-type]
        return True

    own = OwnWork(Slow(), clock)
    books = Books(told.append, own, clock)
    call = books.begin(LINE, "a call", 0.0)
    thread = threading.Thread(target=books.attempt, args=(call, fall_back if computes else wait))
    thread.start()
    try:
        assert begun.wait(30)
        for _ in range(int((HANG_S + 3) / PAUSE_S)):
            clock.now += PAUSE_S * 0.99
            books.tick()
    finally:
        over.set()
        thread.join()
    overdue = [message for message in told if isinstance(message, Overdue)]
    assert len(overdue) == (not computes)


def test_who_stands_still_is_not_late(books: Books, told: list[Message], clock: Clock) -> None:
    books.attempt(books.begin(LINE, "a call", 1.0), pass_time(clock, 20))
    books.tick()
    assert [type(message) for message in found(told)] == [Paused]
