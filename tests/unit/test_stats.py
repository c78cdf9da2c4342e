"""What a client counts."""

from __future__ import annotations

import threading

import pytest

from moeshm.stats import StatsCounter


def test_a_new_counter_is_zero() -> None:
    stats = StatsCounter().snapshot()
    for name in stats.__struct_fields__:
        assert not getattr(stats, name), name


def test_sums_are_in_seconds_and_bytes() -> None:
    counter = StatsCounter()
    counter.sent(2, 30, 400, 5_000_000)
    counter.sent(1, 3, 40, 500_000)
    counter.received(1000, 2_000_000_000, 1_000_000_000, 250_000_000)
    stats = counter.snapshot()
    assert (stats.calls, stats.messages, stats.rows) == (2, 3, 33)
    assert (stats.bytes_out, stats.bytes_in) == (440, 1000)
    assert stats.pack_s == pytest.approx(0.0055)
    assert (stats.wait_s, stats.compute_s, stats.unpack_s) == (2.0, 1.0, 0.25)


def test_only_the_first_fallback_of_a_cause_is_news() -> None:
    counter = StatsCounter()
    assert [counter.fell_back(cause) for cause in ("deadline", "deadline", "worker_died")] == [
        True,
        False,
        True,
    ]
    stats = counter.snapshot()
    assert stats.fallbacks == {"deadline": 2, "worker_died": 1}
    assert stats.fallback_calls == 3


def test_sessions_after_the_first_are_reconnects() -> None:
    counter = StatsCounter()
    counter.connected(True, True, "")
    counter.connected(False, False, "too little memory")
    counter.connected(False, True, "too little memory")
    stats = counter.snapshot()
    assert (stats.reconnects, stats.worker_restarts) == (2, 1)
    assert stats.stepped_down == {"too little memory": 2}


def test_a_snapshot_does_not_change() -> None:
    counter = StatsCounter()
    counter.fell_back("deadline")
    before = counter.snapshot()
    counter.fell_back("deadline")
    counter.sent(1, 1, 1, 1)
    assert before.fallbacks == {"deadline": 1}
    assert before.calls == 0


def test_threads_lose_nothing() -> None:
    counter = StatsCounter()

    def count() -> None:
        for _ in range(2000):
            counter.sent(1, 2, 3, 4)
            counter.fell_back("deadline")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = counter.snapshot()
    assert (stats.calls, stats.rows, stats.bytes_out) == (8000, 16000, 24000)
    assert stats.fallback_calls == 8000
