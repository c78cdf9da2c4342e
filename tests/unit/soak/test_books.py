"""What a calling process notes of errors and deadlines: each one on purpose, and none without."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from moeshm import errors
from moeshm.errors import (
    ClientClosed,
    DeadlineExceeded,
    InvalidCall,
    MoeshmError,
    ProtocolError,
    WorkerDied,
)
from moeshm.soak.books import HANG_S, LONG_S, PAUSE_S, Books, Call, Line, OwnWork
from moeshm.soak.ledger import Ledger
from moeshm.soak.messages import (
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

from .cases import BACKEND, CASES, compute, found
from .clock import Clock

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


class Waits:
    """Once it is called, until it is told to end."""

    def __init__(self) -> None:
        self.begun, self.over = threading.Event(), threading.Event()

    def __call__(self) -> bool:
        self.begun.set()
        return self.over.wait(30)


def outlast(books: Books, clock: Clock, call: Call, run: Callable[[], bool], waits: Waits) -> None:
    """Attempt a call that ends only after the time in which every call must end."""
    thread = threading.Thread(target=books.attempt, args=(call, run))
    thread.start()
    try:
        assert waits.begun.wait(30)
        for _ in range(int((HANG_S + 3) / PAUSE_S)):
            clock.now += PAUSE_S * 0.99
            books.tick()
    finally:
        waits.over.set()
        thread.join()


def test_a_call_that_does_not_end_is_told_once(
    books: Books, told: list[Message], clock: Clock
) -> None:
    waits = Waits()
    outlast(books, clock, books.begin(LINE, "a call", 1.0), waits, waits)
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
    case, waits = CASES[0], Waits()

    class Slow:
        name, layers = "slow", BACKEND.layers

        def ffn(self, *_arguments: Any) -> None:
            waits()

    def fall_back() -> bool:
        own.ffn(case.layer, case.hidden_states, case.topk_ids, case.topk_weights, None)  # type: ignore[arg-type]
        return True

    own = OwnWork(Slow(), clock)
    books = Books(told.append, own, clock)
    call = books.begin(LINE, "a call", 0.0)
    outlast(books, clock, call, fall_back if computes else waits, waits)
    overdue = [message for message in told if isinstance(message, Overdue)]
    assert len(overdue) == (not computes)


def test_who_stands_still_is_not_late(books: Books, told: list[Message], clock: Clock) -> None:
    books.attempt(books.begin(LINE, "a call", 1.0), pass_time(clock, 20))
    books.tick()
    assert [type(message) for message in found(told)] == [Paused]
