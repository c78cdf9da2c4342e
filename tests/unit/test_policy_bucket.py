"""One bucket under a model that knows nothing: what is tried, when, and at what price."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from moeshm.dtypes import DType
from moeshm.policy import Choice, Times
from moeshm.policy.bucket import REVIEW_EVERY, Bucket
from moeshm.policy.losses import Losses
from moeshm.policy.model import CostModel

from .policy_simulator import PATHS, SHAPE, make_work

MS = 1_000_000
WORK = make_work(512, 0.0)
#: By slice, so that each candidate has a name.
FIRST, SECOND = 1, 2


class FlatModel(CostModel):
    """Predicts the same for all, except that FIRST is taken first."""

    def __init__(self) -> None:
        super().__init__(list(PATHS.values()))

    def predict_ns(self, _shape: object, _work: object, choice: Choice, _busy_ns: float) -> float:
        return 10.0 * MS + (choice.slice_tokens != FIRST)

    def learn(self, *_: object) -> None:
        pass


class MisledModel(FlatModel):
    """After an unlucky calibration: it takes SECOND for thirty times as slow."""

    def predict_ns(self, shape: object, work: object, choice: Choice, busy_ns: float) -> float:
        factor = 30 if choice.slice_tokens == SECOND else 1
        return factor * super().predict_ns(shape, work, choice, busy_ns)


def make_bucket(n_choices: int, model: CostModel | None = None) -> Bucket:
    choices = [Choice("shared", DType.F32, 1 + number) for number in range(n_choices)]
    return Bucket(SHAPE, choices, model or FlatModel(), Losses())


def drive(bucket: Bucket, n_forwards: int, elapsed_ms: Callable[[int, int], float]) -> list[int]:
    """`elapsed_ms(candidate, number)`; the candidates that were taken."""
    taken = []
    for number in range(n_forwards):
        bucket.n_calls += 1
        if bucket.n_calls >= bucket.next_review:
            bucket.review(WORK)
        choice = bucket.current.choice
        elapsed_ns = round(elapsed_ms(choice.slice_tokens, number) * MS)
        bucket.observe(WORK, choice, Times(1, 0, elapsed_ns, 0, 0, elapsed_ns))
        taken.append(choice.slice_tokens)
    return taken


def test_tries_cost_a_small_share_however_bad_they_are() -> None:
    taken = drive(make_bucket(10), 300, lambda candidate, _: 10 if candidate == FIRST else 40)
    n_tries = 300 - taken.count(FIRST)
    # In forwards: a share of all, one more, and the last may exceed what was left.
    spent = 0.02 * (300 + 3 * n_tries) + 1 + 3
    assert 2 <= n_tries <= spent / 3


def test_each_is_tried_twice_where_that_is_cheap() -> None:
    taken = drive(make_bucket(10), 60, lambda candidate, _: 10 if candidate == FIRST else 10.5)
    assert all(taken.count(candidate) == 2 for candidate in range(2, 11))


def test_an_unlucky_candidate_gets_another_chance() -> None:
    tries = itertools.count()

    def elapsed_ms(candidate: int, _: int) -> float:
        if candidate == FIRST:
            return 10
        return 20 if next(tries) < 2 else 8  # cold memory

    taken = drive(make_bucket(2), 600, elapsed_ms)
    assert taken[:60].count(SECOND) == 2
    assert taken[-1] == SECOND


def test_what_only_seems_far_is_tried_once_that_costs_little() -> None:
    bucket = make_bucket(2, MisledModel())
    taken = drive(bucket, 12_000, lambda candidate, _: 10 if candidate == FIRST else 8)
    assert SECOND not in taken[:1000]
    assert taken[-1] == SECOND


@pytest.mark.parametrize("gain", [0.04, 0.0])
def test_the_best_is_measured_until_a_small_gain_can_be_believed(gain: float) -> None:
    """Times scatter by 3.5 % to both sides: too much for two measurements to show 4 %."""

    def elapsed_ms(candidate: int, number: int) -> float:
        scatter = 1 + 0.035 * (1, -1)[number % 4 // 2]
        return 10 * (1 - gain * (candidate == SECOND)) * scatter

    bucket = make_bucket(2)
    drive(bucket, 50, elapsed_ms)
    assert bucket.n_switches == (1 if gain else 0)


def test_a_difference_too_small_to_matter_changes_nothing() -> None:
    bucket = make_bucket(2)
    drive(bucket, 300, lambda candidate, _: 10 if candidate == FIRST else 9.9)
    assert bucket.n_switches == 0


@pytest.mark.parametrize("since_review", range(REVIEW_EVERY))
@pytest.mark.parametrize("factor", [3, 1 / 3])
def test_while_a_drift_is_suspected_nothing_old_is_trusted(
    factor: float, since_review: int
) -> None:
    """When all ways become slower, the others' old times look good, and mean nothing."""
    bucket = make_bucket(4)
    taken: list[int] = []

    def elapsed_ms(candidate: int, _: int) -> float:
        return 10 if candidate == FIRST else 11

    drive(bucket, 100 + since_review, elapsed_ms)
    while not bucket.n_reopened:
        taken += drive(bucket, 1, lambda candidate, _: factor * elapsed_ms(candidate, 0))
        assert len(taken) < 30
    assert taken.count(FIRST) >= len(taken) - 1
    taken = drive(bucket, 100, lambda candidate, _: factor * elapsed_ms(candidate, 0))
    assert set(taken) == {1, 2, 3, 4}
    assert bucket.n_switches == 0


def test_another_transport_is_tried_until_it_is_warm() -> None:
    """A way that was not used for a while is slow at first; only its later forwards count."""
    choices = [Choice(transport, DType.F32, 1024) for transport in ("shared", "stream")]
    bucket = Bucket(SHAPE, choices, FlatModel(), Losses())
    taken: list[str] = []
    for _ in range(400):
        bucket.n_calls += 1
        if bucket.n_calls >= bucket.next_review:
            bucket.review(WORK)
        choice = bucket.current.choice
        is_cold = choice.transport == "stream" and taken[-1:] != ["stream"]
        elapsed_ns = (8 if choice.transport == "stream" else 10) * MS + is_cold * 9 * MS
        bucket.observe(WORK, choice, Times(1, 0, elapsed_ns, 0, 0, elapsed_ns))
        taken.append(choice.transport)
    assert taken[0] == "shared"
    assert taken[-100:] == ["stream"] * 100
