"""Linear costs: what was put in comes out, never negative, outliers and drifts told apart."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeshm.policy.fit import DRIFT_SAMPLES, LinearCost, least_squares

MESSAGES = (1, 2, 8, 32)
ROWS = (1, 10, 100)
#: Zero, or of a size that shows in the costs made of it.
coefficient = st.just(0.0) | st.floats(1e3, 1e6)


def teach(
    cost: LinearCost, true: tuple[float, ...], random: Random | None = None, rounds: int = 4
) -> None:
    for _ in range(rounds):
        for messages, rows in itertools.product(MESSAGES, ROWS):
            features = (messages, messages * rows, messages * rows**0.5)[: len(true)]
            value = sum(c * f for c, f in zip(true, features, strict=True))
            noise = random.uniform(0.9, 1.1) if random else 1.0
            cost.observe((messages, rows), features, value * noise)


@given(st.tuples(coefficient, coefficient, coefficient).filter(any))
def test_known_coefficients_are_found(true: tuple[float, ...]) -> None:
    cost = LinearCost((1e4, 1e2, 1e3))
    teach(cost, true)
    for messages, rows in itertools.product(MESSAGES, ROWS):
        features = (messages, messages * rows, messages * rows**0.5)
        expected = sum(c * f for c, f in zip(true, features, strict=True))
        assert cost.predict(features) == pytest.approx(expected, rel=0.02)


@given(st.tuples(coefficient, coefficient).filter(any), st.integers(0, 2**32))
def test_noise_moves_the_prediction_little(true: tuple[float, ...], seed: int) -> None:
    cost = LinearCost((1e4, 1e2))
    teach(cost, true, Random(seed), rounds=10)
    expected = true[0] * 4 + true[1] * 200
    assert cost.predict((4, 200)) == pytest.approx(expected, rel=0.1)


@given(
    st.lists(
        st.tuples(st.floats(1, 100), st.floats(1, 1e4), st.floats(-1e9, 1e9)),
        min_size=1,
        max_size=20,
    )
)
def test_no_coefficient_is_ever_negative(samples: list[tuple[float, float, float]]) -> None:
    plain, signed = LinearCost((1e4, 1e2)), LinearCost((1e4, 1e2))
    for number, (messages, rows, value) in enumerate(samples):
        plain.observe(number % 3, (messages, rows), value)
        signed.observe(number % 3, (messages, rows), value, scale=1e6)
        assert min(plain.coefficients) >= 0
        assert min(signed.coefficients) >= 0


@given(st.integers(0, 2**32), st.integers(1, 3))
def test_least_squares_meets_the_optimality_conditions(seed: int, size: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.standard_normal((size + 2, size))
    matrix, vector = rows.T @ rows + 1e-6 * np.eye(size), random.standard_normal(size)
    x = np.array(least_squares(matrix.tolist(), vector.tolist()))
    gradient = matrix @ x - vector
    assert (x >= 0).all()
    # Karush, Kuhn, Tucker: no descent where x may grow, none at all where it is positive.
    assert (gradient > -1e-6).all()
    assert np.abs(gradient[x > 0]).max(initial=0) < 1e-6


def test_before_any_sample_the_prior_counts_and_after_one_its_proportions() -> None:
    cost = LinearCost((100.0, 10.0))
    assert cost.predict((1, 10)) == 200
    cost.observe("one row", (1, 1), 1100)
    assert cost.predict((1, 1)) == pytest.approx(1100)
    assert cost.predict((1, 10)) == pytest.approx(2000)


def test_decode_calls_do_not_push_out_prefill() -> None:
    cost = LinearCost((1e4, 1e2))
    cost.observe("prefill", (1, 500), 2e4 + 500 * 3e3)
    for _ in range(5000):
        cost.observe("decode", (1, 1), 2e4 + 3e3)
    assert cost.predict((1, 500)) == pytest.approx(2e4 + 500 * 3e3, rel=0.01)
    assert cost.predict((1, 1)) == pytest.approx(2e4 + 3e3, rel=0.01)


def test_an_outlier_moves_the_cost_little() -> None:
    cost = LinearCost((1e4, 1e2))
    for number in range(14):
        cost.observe("decode", (1, 1), 5e6 if number == 10 else 1e4)
    assert cost.predict((1, 1)) == pytest.approx(1e4, rel=0.3)
    for _ in range(60):
        cost.observe("decode", (1, 1), 1e4)
    assert cost.predict((1, 1)) == pytest.approx(1e4, rel=0.02)


@pytest.mark.parametrize("factor", [8, 1 / 8])
def test_a_drift_of_one_kind_of_work_scales_all(factor: float) -> None:
    cost = LinearCost((1e4, 1e2))
    teach(cost, (2e4, 3e3))
    before = cost.predict((8, 800))
    for _ in range(DRIFT_SAMPLES - 1):
        cost.observe((1, 1), (1, 1), 2.3e4 * factor)
    assert cost.predict((8, 800)) == pytest.approx(before, rel=0.3)
    cost.observe((1, 1), (1, 1), 2.3e4 * factor)
    assert cost.predict((8, 800)) == pytest.approx(before * factor, rel=0.05)
    assert cost.predict((1, 1)) == pytest.approx(2.3e4 * factor, rel=0.05)


@pytest.mark.parametrize("factor", [8, 1 / 8])
def test_two_kinds_of_work_that_drift_together_are_scaled_once(factor: float) -> None:
    cost = LinearCost((1e4, 1e2))
    teach(cost, (2e4, 3e3))
    for _ in range(100):
        cost.observe((1, 1), (1, 1), 2.3e4 * factor)
        cost.observe((2, 10), (2, 20), 1e5 * factor)
        cost.observe((2, 10), (2, 20), 1e5 * factor)
    assert cost.predict((8, 800)) == pytest.approx(2.56e6 * factor, rel=0.05)


def test_a_difference_may_be_negative_now_and_then() -> None:
    random = Random(3)
    cost = LinearCost((1e4, 1e3))
    for _ in range(200):
        cost.observe("decode", (1, 1), 3e4, scale=1e5)
        cost.observe("prefill", (1, 8), 3e4 + random.uniform(-1, 1) * 2e6, scale=2e7)
    assert cost.predict((1, 1)) == pytest.approx(3e4, rel=0.05)
