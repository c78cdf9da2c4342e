"""The soak's own books: causes of errors, the verdict, its JSON; the schedule, and pipes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from moeshm.soak import schedule
from moeshm.soak.ledger import _FORGET_EVERY, _MEMORY_S, PATIENCE_S, Ledger
from moeshm.soak.messages import (
    MOST_BYTES,
    Counts,
    Failed,
    Late,
    Lines,
    Lost,
    Message,
    Overdue,
    Paused,
    Unanswered,
    Unexpected,
    Wrong,
    send,
    shortened,
)
from moeshm.soak.report import Report, lines_of, live_line, report_of
from moeshm.worker import REPLY_TIMEOUT_S
from tests.unit.soak.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


def failed(since: float, until: float, line: str = "w, client 1") -> Failed:
    return Failed("WorkerDied", "a call: gone", line, ("w",), since, until)


@pytest.fixture
def ledger(clock: Clock) -> Ledger:
    return Ledger(clock)


def settle(ledger: Ledger, clock: Clock) -> int:
    """How many errors have no cause."""
    ledger.settle()
    before = ledger.unexpected
    clock.now += PATIENCE_S + 0.1
    assert before == 0, "it had no time to hear of a cause"
    ledger.settle()
    return ledger.unexpected


def test_an_error_without_a_cause_is_unexpected(ledger: Ledger, clock: Clock) -> None:
    ledger.fault("worker killed", "another").end = clock.now
    clock.now += 1
    ledger.told("caller 1", failed(clock.now - 0.5, clock.now))
    assert settle(ledger, clock) == 1
    assert "WorkerDied without a cause" in ledger.failures[0]


@pytest.mark.parametrize("target", ["w", "w, client 1"])
def test_an_error_with_a_cause(ledger: Ledger, clock: Clock, target: str) -> None:
    ledger.cause(target, "", clock.now, clock.now + 0.1)
    clock.now += 1
    ledger.told("caller 1", failed(clock.now - 0.95, clock.now))
    assert settle(ledger, clock) == 0


@pytest.mark.parametrize(
    ("error", "paused_s", "n_unexpected"),
    [
        ("WorkerDied", REPLY_TIMEOUT_S - 1, 1),
        ("WorkerDied", REPLY_TIMEOUT_S + 1, 0),
        ("ConnectError", 0.3, 0),
    ],
)
def test_who_stands_still_loses_no_session_unless_replies_wait_for_too_long(
    ledger: Ledger, clock: Clock, error: str, paused_s: float, n_unexpected: int
) -> None:
    """But the worker need not wait for a handshake."""
    start = clock.now
    clock.now += paused_s
    ledger.told("caller 1", Paused(start, clock.now))
    lost = msgspec.structs.replace(failed(start - 1, clock.now), error=error)
    ledger.told("caller 1", lost)
    assert settle(ledger, clock) == n_unexpected


def test_a_cause_that_is_over_explains_nothing_that_came_after_an_answer(
    ledger: Ledger, clock: Clock
) -> None:
    ledger.fault("worker stopped", "w").end = clock.now
    clock.now += 1
    ledger.told("caller 1", failed(clock.now - 0.5, clock.now))
    assert settle(ledger, clock) == 1


def test_a_worker_that_is_down_explains_all_until_it_is_back(ledger: Ledger, clock: Clock) -> None:
    cause = ledger.fault("worker killed", "w")
    clock.now += 60
    ledger.told("caller 1", failed(clock.now - 0.5, clock.now))
    cause.end = clock.now
    assert settle(ledger, clock) == 0


def test_a_cause_may_be_heard_of_later(ledger: Ledger, clock: Clock) -> None:
    ledger.told("caller 1", failed(clock.now - 0.5, clock.now))
    ledger.told("caller 1", Lost("w, client 1", clock.now - 0.1, clock.now + 0.2))
    assert settle(ledger, clock) == 0


def test_causes_that_nobody_can_depend_on_any_more_are_forgotten(
    ledger: Ledger, clock: Clock
) -> None:
    lasting = ledger.cause("w", "", clock.now, None)
    for number in range(100):
        ledger.cause(f"w, client {number}", "", clock.now, clock.now)
    clock.now += 2 * _MEMORY_S
    for _ in range(_FORGET_EVERY):
        ledger.cause("caller 1", "", clock.now, clock.now)
    assert ledger._causes.keys() == {"w", "caller 1"}
    assert ledger._causes["w"] == [lasting]


def test_a_late_call_is_counted_and_no_failure(ledger: Ledger) -> None:
    ledger.told("caller 1", Late("a call", 0.03))
    ledger.told("caller 1", Late("a call", 0.5))
    ledger.told("caller 1", Counts({"calls": 5, "error: WorkerDied": 2}))
    report = report_of(ledger, 1, 10.0, 2, {}, {})
    assert (report.deadline_misses, report.latest_ms) == (2, 500.0)
    assert report.errors == {"WorkerDied": 2}
    assert report.is_clean


def clean(ledger: Ledger) -> Report:
    return report_of(ledger, 1, 10.0, 2, {"own worker": 1}, {"worker": 3 << 20})


@pytest.mark.parametrize(
    "damage",
    [
        lambda ledger: ledger.told("c", Wrong("a call", "all of it")),
        lambda ledger: ledger.told("c", Overdue("a call", 6.0)),
        lambda ledger: ledger.told("c", Unanswered("a call")),
        lambda ledger: ledger.told("c", Unexpected("OSError", "a call", "")),
        lambda ledger: ledger.leak("2 fds"),
        lambda ledger: ledger.failure("nothing is known of leaks"),
    ],
)
def test_what_was_found_decides_the_verdict(
    ledger: Ledger, damage: Callable[[Ledger], None]
) -> None:
    assert not clean(ledger).is_clean, "no call was made"
    ledger.told("c", Counts({"calls": 1}))
    assert clean(ledger).is_clean
    damage(ledger)
    report = clean(ledger)
    assert not report.is_clean
    assert len(report.failures) == 1


def test_a_flood_of_failures_is_counted_and_the_first_are_kept(ledger: Ledger) -> None:
    for _ in range(1000):
        ledger.told("c", Wrong("a call", "all of it"))
    assert ledger.wrong_results == 1000
    assert 10 < len(ledger.failures) < 100


def test_json_has_the_documented_keys(ledger: Ledger) -> None:
    ledger.fault("worker killed", "w")
    printed = msgspec.json.decode(msgspec.json.encode(clean(ledger)))
    assert {"calls", "faults", "wrong_results", "deadline_misses", "leaks"} <= printed.keys()
    assert printed["faults"] == 1
    assert printed["faults_by_kind"] == {"worker killed": 1}
    assert printed["growth_mib"] == {"worker": 3.0}
    documented = (Path(__file__).parents[2] / "docs" / "soak.md").read_text()
    missing = [key for key in printed if f"`{key}`" not in documented]
    assert not missing


def test_words_for_people(ledger: Ledger) -> None:
    ledger.told("c", Counts({"calls": 1234, "placements applied": 7}))
    lines = dict(lines_of(clean(ledger)))
    assert lines["calls"].startswith("1,234 (123/s)")
    assert "7 placements applied" in lines["besides"]
    assert "worker +3.0 MiB" in lines["memory"]
    line = live_line(clean(ledger), "waiting until all calls end")
    assert "1,234 calls" in line
    assert line.endswith("; waiting until all calls end")


# --- the schedule, and what goes through pipes ---------------------------------------------


def test_a_seed_repeats_the_faults() -> None:
    first, again, other = (list(itertools.islice(schedule.faults(seed), 500)) for seed in (3, 3, 4))
    assert first == again != other
    assert {fault.kind for fault in first} == set(schedule.WEIGHTS)
    times_s = [fault.at_s for fault in first]
    assert times_s == sorted(times_s)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_messages_come_as_they_were_told(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    messages: list[Message] = [
        Counts({"calls": 3}),
        failed(1.5, 2.5),
        Wrong("a call", "row 3\nand more"),
    ]
    for message in messages:
        send(writer, message)
    data = os.read(reader, 1 << 16)
    lines = Lines()
    whole = [*lines.feed(data[:70]), *lines.feed(data[70:])]
    assert whole == messages
    # What a killed process had begun to say is no message.
    assert list(lines.feed(data[:20])) == []


@pytest.mark.parametrize("letter", ["x", '"', "\n", "\x01", "é", "\ud800"])
def test_any_text_is_written_at_once(pipe: tuple[int, int], letter: str) -> None:
    text = shortened(letter * 100_000)
    message = Unexpected("AssertionError", text, text)
    send(pipe[1], message)
    assert list(Lines().feed(os.read(pipe[0], 1 << 16))) == [message]
    with pytest.raises(ValueError, match="shorten its texts"):
        send(pipe[1], Wrong("x" * MOST_BYTES, ""))
