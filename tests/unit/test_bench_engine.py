"""The engine of a replay: its warm-up, its check, the cold part alone, a worker that is lost."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moeshm.bench import policy, processes, replay_engine
from moeshm.bench.replay import Replay
from moeshm.bench.replay_model import SHAPES
from moeshm.offload import ExpertOffload

from ..replays import opened, small_replay


@pytest.fixture
def small() -> Replay:
    return small_replay()


class _Spoilt:
    """An offload that spoils a token of the last layer, or says that its fallback computed."""

    def __init__(self, right: ExpertOffload, token: int | None) -> None:
        self.placement = right.placement
        self._right = right
        self._token = token
        self._n_fallbacks = 0

    def forward(self, *inputs: Any) -> Any:
        result = self._right.forward(*inputs).copy()
        if self._token is None:
            self._n_fallbacks += 1
        elif inputs[0] == max(self.placement.layers):
            result[self._token] = 0
        return result

    def stats(self) -> Any:
        return msgspec.structs.replace(self._right.stats(), fallback_calls=self._n_fallbacks)


@pytest.mark.parametrize("is_null", [True, False])
def test_a_wrong_result_fails_the_replay(is_null: bool, small: Replay, tmp_path: Path) -> None:
    with opened(small._replace(is_null=is_null), tmp_path) as engine:
        engine.check()
        for token in (0, 5):  # of the whole chunk
            wrong: Any = _Spoilt(engine.offload, token)
            with pytest.raises(RuntimeError, match="forward differs by"):
                engine._replace(offload=wrong).check()


def test_a_check_that_the_fallback_answered_fails_the_replay(small: Replay, tmp_path: Path) -> None:
    with opened(small, tmp_path) as engine:
        spoilt: Any = _Spoilt(engine.offload, None)
        with pytest.raises(RuntimeError, match="the fallback computed"):
            engine._replace(offload=spoilt).check()


def test_a_lost_worker_shows_in_the_run_and_fails_the_check(
    small: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = []

    @contextlib.contextmanager
    def worker_process(*words: str) -> Iterator[tuple[int, str]]:
        with processes.worker_process(*words) as (pid, address):
            pids.append(pid)
            yield pid, address

    monkeypatch.setattr(replay_engine, "worker_process", worker_process)
    with opened(small, tmp_path) as engine:
        os.kill(pids[0], signal.SIGKILL)
        run = replay_engine.replay(engine, warm_up=1, is_played_alone=False)
        assert run.fallback_calls > 0
        assert run.losses > 0
        with pytest.raises(RuntimeError, match="the fallback computed"):
            engine.check()


@pytest.mark.parametrize("n_layers", [1, 4])
def test_the_warm_up_is_passes_through_all_layers_that_do_not_count(
    n_layers: int, small: Replay, tmp_path: Path
) -> None:
    trace = small.trace.fitted(SHAPES["tiny"].with_layers(n_layers))
    passes = 2 + 2  # of the prompt, of the completion
    warm = 64 + 2 * n_layers  # forwards of one chunk, and of the completion's tokens
    with opened(small._replace(trace=trace), tmp_path) as engine:
        n_forwards, counted = 0, set()
        for warm_up in (0, 1, 3):
            run = replay_engine.replay(engine, warm_up, is_played_alone=False)
            n_forwards += passes * n_layers + warm_up * warm
            assert engine.offload.stats().forwards == n_forwards
            counted.add((run.calls, run.rows, run.payload_bytes))
    assert len(counted) == 1


def test_the_cold_part_alone_is_the_same_calls_without_a_local_part(
    small: Replay, tmp_path: Path
) -> None:
    with opened(small, tmp_path) as engine:
        run = replay_engine.replay(engine, warm_up=0, is_played_alone=True)
        stats = engine.offload.stats()
    assert (stats.messages, stats.rows) == (2 * run.calls, 2 * run.rows)
    assert stats.bytes_out == 2 * run.payload_bytes
    is_hot = [small.placement().is_hot(layer) for layer in range(4)]
    slots = [n[ids] for n, ids in zip(is_hot, small.trace.topk_ids, strict=True)]
    assert stats.hot_slots == sum(int(each.sum()) for each in slots)  # once, not twice
    assert run.alone_s is not None
    assert run.alone_forward_s is not None
    assert 0 < run.alone_s < run.alone_forward_s


@pytest.mark.parametrize(("fallback_calls", "losses"), [(1, {}), (0, {"worker": 2})])
def test_policy_does_not_explain_what_the_fallback_computed(
    fallback_calls: int, losses: dict[str, int], small: Replay, tmp_path: Path
) -> None:
    with opened(small, tmp_path) as engine:
        good = engine.offload.stats()
    policy.check_nothing_was_lost(good)
    bad = msgspec.structs.replace(good, fallback_calls=fallback_calls, losses=losses)
    with pytest.raises(RuntimeError, match=f"fallback_calls={fallback_calls}, losses="):
        policy.check_nothing_was_lost(bad)
