"""Turns: round the clients, then their sessions; steps of long calls; deadlines."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from moeshm import turns as turns_module
from moeshm.errors import DeadlineExceeded
from moeshm.turns import LONG_TURN_NS, MANY_TOKENS, Place, Turns

PATIENCE_S = 20.0
NO_DEADLINE = 0
FEW, MANY = 1, MANY_TOKENS + 1


class Session:
    """A session's thread, which asks for turns and tells what it got, one step at a time."""

    def __init__(self, house: House, name: str, client: str) -> None:
        self.name = name
        self.place = house.turns.place(client)
        self._house = house
        self._go = threading.Semaphore(0)
        self._thread = threading.Thread(target=lambda: None)

    def call(self, n_steps: int = 1, n_tokens: int = FEW, deadline_ns: int = NO_DEADLINE) -> None:
        """Ask for a call's turn, which is had until `Session.go` for each step."""
        self._thread = threading.Thread(target=self._run, args=(n_steps, n_tokens, deadline_ns))
        before = len(self._house.turns._queue)
        is_free = not self._house.turns._taken.locked()
        self._thread.start()
        if is_free:
            self._house.wait_for(lambda: self._house.seen[-1:] == [self.name])
        else:
            self._house.wait_for(lambda: len(self._house.turns._queue) > before)

    def go(self) -> None:
        """End the step, or the call."""
        self._go.release()

    def join(self) -> None:
        """Until its call is over."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    def _run(self, n_steps: int, n_tokens: int, deadline_ns: int) -> None:
        try:
            self.place.take(deadline_ns, n_tokens)
        except DeadlineExceeded:
            self._house.late.append(self.name)
            return
        try:
            for step in range(n_steps):
                if step:
                    self.place.offer(deadline_ns)
                self._house.seen.append(self.name)
                assert self._go.acquire(timeout=PATIENCE_S)
            self.place.finished()
        except DeadlineExceeded:
            self._house.late.append(self.name)
        finally:
            self.place.leave()


class Gate:
    """A place's, whose wait ends without success when the test says so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.is_late = threading.Event()

    def acquire(self, timeout: float = -1.0) -> bool:
        """As of a lock."""
        if timeout < 0:
            return self._lock.acquire(timeout=PATIENCE_S)
        assert self.is_late.wait(PATIENCE_S)
        return self._lock.acquire(blocking=False)

    def release(self) -> None:
        """As of a lock."""
        self._lock.release()


class House:
    """Turns, and who had them."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.seen: list[str] = []
        self.late: list[str] = []
        self.sessions: dict[str, Session] = {}

    def session(self, name: str, client: str = "") -> Session:
        """A new one; by default of a client of its own."""
        made = self.sessions[name] = Session(self, name, client or name)
        return made

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until it holds, which another thread sees to."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, self.seen
            time.sleep(1e-4)

    def run(self, n_turns: int) -> list[str]:
        """Let whoever has the turn go on, until so many had theirs from now on; their names."""
        start = len(self.seen)
        for n in range(start, start + n_turns):
            self.sessions[self.seen[n - 1]].go()
            self.wait_for(lambda n=n: len(self.seen) > n)  # type: ignore[misc]
        return self.seen[start:]

    def finish(self) -> None:
        """Let everybody end, and see that nothing is left."""
        for session in self.sessions.values():
            for _ in range(100):
                session.go()
        for session in self.sessions.values():
            session.join()
        assert self.turns._queue == []
        assert not self.turns._taken.locked()


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made.finish()


def test_sessions_of_one_client_are_first_come_first_served(house: House) -> None:
    names = [f"s{n}" for n in range(8)]
    for name in names:
        house.session(name, "one").call()
    assert house.run(7) == names[1:]


def test_a_client_with_five_sessions_and_one_with_one_alternate(house: House) -> None:
    """However many came before."""
    house.session("holder").call()
    for n in range(5):
        house.session(f"a{n}", "a").call(n_steps=3)
    house.session("b", "b").call(n_steps=6)
    seen = house.run(11)
    assert [name[0] for name in seen] == list("abababababa")
    # And its sessions have theirs in turn.
    assert [name for name in seen if name[0] == "a"] == ["a0", "a1", "a2", "a3", "a4", "a0"]


def test_a_long_call_lets_one_who_waits_pass_after_one_step(house: House) -> None:
    house.session("long").call(n_steps=4, n_tokens=MANY)
    assert house.run(1) == ["long"]
    house.session("short").call()
    assert house.run(3) == ["short", "long", "long"]


@pytest.mark.parametrize("n_others", [1, 3, 6])
def test_nobody_waits_longer_than_one_step_of_every_other_client(
    house: House, n_others: int
) -> None:
    """Wherever in the round it comes, and though the others have many sessions."""
    for n in range(n_others):
        for session in range(3):
            house.session(f"{n}.{session}", str(n)).call(n_steps=20, n_tokens=MANY)
    house.run(n_others * 2 + 1)
    me = house.session("me")
    me.call(n_steps=5)
    seen = house.run(4 * (n_others + 1))
    at = [n for n, name in enumerate(seen) if name == "me"]
    assert at[0] < n_others
    assert {later - earlier for earlier, later in itertools.pairwise(at)} == {n_others + 1}


def test_who_comes_again_gains_nothing(house: House) -> None:
    """A client without sessions is forgotten; a new one is behind those that wait."""
    house.session("a").call(n_steps=30)
    house.session("b").call(n_steps=30)
    house.run(1)
    for _ in range(3):
        house.session("new", f"new{len(house.seen)}").call()
        seen = house.run(3)
        assert seen[1] == "new"
        assert sorted(seen) == ["a", "b", "new"]
        house.sessions["new"].join()
    assert len(house.turns._clients) <= 3


def test_a_waiter_whose_deadline_passes_leaves(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.session("holder").call()
    late, gate = house.session("late"), Gate()
    monkeypatch.setattr(late.place, "_gate", gate)
    late.call(deadline_ns=2**62)
    house.session("next").call()
    gate.is_late.set()
    late.join()
    assert house.late == ["late"]
    assert house.seen == ["holder"]
    assert house.run(1) == ["next"]
    house.sessions["next"].go()
    house.sessions["next"].join()
    # Again, with more time.
    late.call()
    assert house.seen[-1] == "late"


def test_a_long_call_whose_deadline_passes_in_the_queue_ends_without_the_turn(house: House) -> None:
    long = house.session("long")
    long.call(n_steps=3, deadline_ns=time.monotonic_ns() + 2 * 10**8)
    house.session("other").call()
    assert house.run(1) == ["other"]
    long.join()
    assert house.late == ["long"]
    assert house.turns._taken.locked(), "the other one's turn"
    long.call(n_steps=2)
    assert house.run(2) == ["long", "long"]


def test_a_deadline_of_long_ago_does_not_take_a_turn(house: House) -> None:
    house.session("holder").call()
    late = house.turns.place("late")
    with pytest.raises(DeadlineExceeded, match="before the call's turn came"):
        late.take(1, FEW)
    assert house.turns._queue == []


def test_a_deadline_that_passes_in_the_middle_is_told_as_that(house: House) -> None:
    place, other = house.turns.place("long"), house.session("other")
    place.take(NO_DEADLINE, MANY)
    other.call()
    with pytest.raises(DeadlineExceeded, match="between two steps of the call"):
        place.offer(1)
    place.leave()


def test_a_client_has_one_long_call_in_its_middle(house: House) -> None:
    """Each keeps its memory. Short ones of its other sessions go on, and the next long one begins
    once that ended."""
    for n in range(3):
        house.session(f"long{n}", "one").call(n_steps=3, n_tokens=MANY)
    house.session("short", "one").call(n_steps=2)
    house.session("other").call(n_steps=20)
    seen = [name for name in house.run(19) if name != "other"]
    assert seen == ["short", "long0", "short", "long0", *["long1"] * 3, *["long2"] * 3][: len(seen)]
    assert "long2" in seen


def test_a_client_with_many_long_calls_keeps_no_other_from_beginning_one(house: House) -> None:
    for n in range(20):
        house.session(f"many{n}", "many").call(n_steps=9, n_tokens=MANY)
    house.run(2)
    for name in ("a", "b"):
        house.session(name).call(n_steps=9, n_tokens=MANY)
    assert house.run(5) == ["a", "b", "many0", "a", "b"]


def test_a_long_call_does_not_pause_for_one_of_its_client_which_may_not_begin(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [10**9]
    monkeypatch.setattr(turns_module, "time", SimpleNamespace(monotonic_ns=lambda: clock[0]))
    long = house.session("long", "one")
    long.call(n_tokens=MANY)
    house.session("next", "one").call(n_tokens=MANY)
    clock[0] += 2 * LONG_TURN_NS
    assert not long.place.is_wanted()
    house.session("short", "one").call()
    assert long.place.is_wanted()


def test_long_calls_pause_for_short_ones_at_once_and_for_long_ones_after_a_while(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [10**9]
    monkeypatch.setattr(turns_module, "time", SimpleNamespace(monotonic_ns=lambda: clock[0]))
    long = house.session("long")
    long.call(n_steps=9, n_tokens=MANY)
    assert not long.place.is_wanted()
    house.session("other").call(n_tokens=MANY)
    assert not long.place.is_wanted()
    clock[0] += LONG_TURN_NS + 1
    assert long.place.is_wanted()
    clock[0] -= 2
    assert not long.place.is_wanted()
    short = house.session("short")
    short.call()
    assert long.place.is_wanted()
    assert house.run(1) == ["other"]
    assert house.run(1) == ["short"]
    assert not short.place.is_wanted()
    # Its turn begins anew.
    assert house.run(1) == ["long"]
    clock[0] += LONG_TURN_NS
    house.session("third").call(n_tokens=MANY)
    assert long.place.is_wanted()
    clock[0] -= 1
    assert not long.place.is_wanted()


def test_a_long_call_is_let_through_after_as_long_as_it_takes_itself(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [10**9]
    monkeypatch.setattr(turns_module, "time", SimpleNamespace(monotonic_ns=lambda: clock[0]))
    batch, prefill = house.session("batch"), house.session("prefill")
    batch.call(n_tokens=40)
    clock[0] += 40_000
    batch.go()
    batch.join()
    prefill.call(n_steps=9, n_tokens=1000)
    batch.call(n_steps=2, n_tokens=80)
    clock[0] += 80_000 - 1
    assert not prefill.place.is_wanted()
    clock[0] += 1
    assert prefill.place.is_wanted()
    assert house.run(1) == ["batch"]
    # Of a prefill nobody knows yet how long it takes.
    clock[0] += 60_000
    assert not batch.place.is_wanted()
    assert house.run(1) == ["prefill"]
    # What is left of the batch.
    clock[0] += 20_000 - 1
    assert not prefill.place.is_wanted()
    clock[0] += 1
    assert prefill.place.is_wanted()


def test_a_clients_other_long_calls_do_not_cut_anothers_turn_short(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that may not begin as it has one in its middle."""
    clock = [10**9]
    monkeypatch.setattr(turns_module, "time", SimpleNamespace(monotonic_ns=lambda: clock[0]))
    small = house.session("small", "two")
    small.call(n_tokens=MANY)
    clock[0] += 1000
    small.go()
    small.join()
    house.session("large", "two").call(n_steps=9, n_tokens=10**6)
    one = house.session("one")
    one.call(n_steps=9, n_tokens=MANY)
    assert house.run(1) == ["one"]
    small.call(n_tokens=MANY)
    clock[0] += 1000
    assert not one.place.is_wanted()
    clock[0] += LONG_TURN_NS
    assert one.place.is_wanted()


def test_a_call_that_takes_longer_than_expected_gains_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [10**9]
    monkeypatch.setattr(turns_module, "time", SimpleNamespace(monotonic_ns=lambda: clock[0]))
    cheap = house.session("cheap")
    cheap.call(n_tokens=4096)
    clock[0] += 1000
    cheap.go()
    cheap.join()
    cheap.call(n_steps=9, n_tokens=MANY)
    other = house.session("other")
    other.call(n_steps=9, n_tokens=MANY)
    clock[0] += LONG_TURN_NS
    assert house.run(1) == ["other"]
    clock[0] += LONG_TURN_NS - 1
    assert not other.place.is_wanted()
    clock[0] += 1
    assert other.place.is_wanted()


def test_nobody_waits_for_a_turn_that_was_handed_over_at_the_deadline(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the end of the wait and the look at the queue."""
    holder = house.turns.place("holder")
    late = house.turns.place("late")
    holder.take(NO_DEADLINE, FEW)

    class Gate:
        """Whose wait ends without success, just before it is released."""

        def __init__(self) -> None:
            self._lock = threading.Lock()
            self._lock.acquire()

        def acquire(self, timeout: float = -1.0) -> bool:
            if timeout >= 0:
                holder.leave()
                return False
            return self._lock.acquire(timeout=PATIENCE_S)

        def release(self) -> None:
            self._lock.release()

    monkeypatch.setattr(late, "_gate", Gate())
    late.take(time.monotonic_ns() + 10**12, FEW)
    assert house.turns._taken.locked()
    late.leave()
    assert not house.turns._taken.locked()


def test_turns_under_fire() -> None:
    """Threads that come, offer and leave as they like: one at a time, and all of them end."""
    turns, inside, errors = Turns(), [0], list[str]()

    def serve(place: Place, seed: int) -> None:
        for n in range(300):
            deadline = time.monotonic_ns() + 50_000 if (n + seed) % 7 == 0 else NO_DEADLINE
            try:
                place.take(deadline, MANY if n % 2 else FEW)
            except DeadlineExceeded:
                continue
            try:
                for _ in range(n % 4):
                    inside[0] += 1
                    if inside[0] != 1:
                        errors.append("two at a time")
                    inside[0] -= 1
                    place.offer(deadline)
            except DeadlineExceeded:
                pass
            finally:
                place.leave()

    threads = [threading.Thread(target=serve, args=(turns.place(n // 3), n)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert errors == []
    assert turns._queue == []
    assert not turns._taken.locked()
