"""The time of a forward, against an engine and a worker that are played message by message."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeshm.dtypes import DType
from moeshm.policy import Choice, LocalCost
from moeshm.policy.model import CostModel, count_messages, distinct_per_message, forward_ns

from .policy_simulator import (
    LINKS,
    NUM_EXPERTS,
    PATHS,
    SHAPE,
    Forward,
    World,
    make_forward,
    make_work,
    play,
)

SLICES = (4, 16, 64, 256, 1024)


def test_one_message_is_a_chain() -> None:
    assert forward_ns(1, 10, 100, 20, 5, busy_ns=0, buffered=9) == 10 + 100 + 5 + 20


def test_the_longer_of_the_two_timelines_counts() -> None:
    assert forward_ns(1, 10, 100, 20, 5, busy_ns=500, buffered=9) == 10 + 500 + 20
    assert forward_ns(1, 10, 100, 20, 5, busy_ns=50, buffered=9) == 10 + 100 + 5 + 20


def test_slices_overlap_packing_with_the_workers_time() -> None:
    # 100 to pack and 100 to compute: ten slices need one slice of each more than the longer.
    assert forward_ns(10, 100, 100, 0, 0, busy_ns=0, buffered=99) == pytest.approx(110)
    assert forward_ns(1, 100, 100, 0, 0, busy_ns=0, buffered=99) == pytest.approx(200)


def test_a_full_buffer_keeps_the_engine_from_its_own_work() -> None:
    free = forward_ns(10, 10, 1000, 0, 0, busy_ns=1000, buffered=10)
    blocked = forward_ns(10, 10, 1000, 0, 0, busy_ns=1000, buffered=1)
    assert free == pytest.approx(1010)
    # Nine messages must be finished before the tenth can leave.
    assert blocked == pytest.approx(1 + 900 + 1000)


def test_a_message_larger_than_the_buffer_waits_for_none_before_it() -> None:
    assert forward_ns(1, 10, 100, 0, 0, busy_ns=200, buffered=0.1) == 210


@given(
    st.integers(1, 200),
    *[st.floats(0, 1e9) for _ in range(5)],
    st.floats(0.01, 300),
)
def test_a_forward_takes_no_less_than_either_side(
    messages: int,
    pack: float,
    worker: float,
    unpack: float,
    latency: float,
    busy: float,
    buffered: float,
) -> None:
    total = forward_ns(messages, pack, worker, unpack, latency, busy, buffered)
    slack = 1 + 1e-9
    assert total * slack >= pack + busy + unpack
    assert total * slack >= worker + latency
    serial = pack + worker + unpack + latency + busy
    assert total <= serial * slack


@pytest.mark.parametrize("slice_tokens", SLICES)
def test_counts_per_slice_match_what_routing_gives(slice_tokens: int) -> None:
    random = np.random.default_rng(7)
    messages, experts, expected_messages, expected_experts = 0.0, 0.0, 0, 0
    for _ in range(30):
        # Uniform experts: a skew makes slices share more than the formula, which knows none, says.
        ids = random.integers(0, NUM_EXPERTS, (512, 8))
        ids[random.random(ids.shape) < 0.94] = -1
        forward = Forward(ids, DType.F32, 0.0)
        found = forward.slices(slice_tokens)
        expected_messages += len(found)
        expected_experts += sum(each.experts for each in found)
        work = forward.work
        count = count_messages(work.n_tokens, work.rows, slice_tokens)
        messages += count
        experts += count * distinct_per_message(work.slots, work.experts, count)
    assert messages == pytest.approx(expected_messages, rel=0.05)
    # Some experts are used more often than others, which the formula does not know.
    assert experts == pytest.approx(expected_experts, rel=0.1)


def test_counts_are_exact_for_one_message_and_for_full_rows() -> None:
    assert count_messages(512, 512, 4) == 128
    assert count_messages(510, 510, 4) == 128
    assert count_messages(3, 1, 4) == 1
    assert distinct_per_message(240, 71, 1) == 71
    # Each expert used once: nothing is shared.
    assert distinct_per_message(64, 64, 16) == pytest.approx(4)


@pytest.mark.parametrize("local_ms", [0, 5, 50])
@pytest.mark.parametrize("speed", [1 / 16, 1, 4])
@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_what_was_learnt_predicts_other_work(local_ms: float, speed: float, transport: str) -> None:
    """Learnt from some sizes and slices, asked for others."""
    random, numbers = Random(5), np.random.default_rng(5)
    world = World(speed=speed)
    model = CostModel(list(PATHS.values()))
    for n_tokens in (1, 16, 64, 1000):
        for slice_tokens in (16, 1024):
            forward = make_forward(numbers, n_tokens, 0.0)
            choice = Choice(transport, DType.F32, slice_tokens)
            model.learn(SHAPE, forward.work, choice, play(world, forward, choice, random))
    for slice_tokens in SLICES:
        forward = make_forward(numbers, 512, local_ms * 1e6)
        choice = Choice(transport, DType.F32, slice_tokens)
        predicted = model.predict_ns(SHAPE, forward.work, choice, local_ms * 1e6)
        measured = play(world, forward, choice, random).elapsed_ns
        # Skewed routing shares more experts within a slice than the model assumes.
        assert measured * 0.9 < predicted < measured * 1.35, slice_tokens


def test_latency_is_learnt_only_from_a_forward_that_waited() -> None:
    choice = Choice("shared", DType.F32, 1024)
    world = World(links={**LINKS, "shared": LINKS["shared"]._replace(wake_ns=3e5)})
    idle, busy = (make_forward(np.random.default_rng(2), 1, local_ns) for local_ns in (0.0, 1e8))
    true_ns = play(world, idle, choice, Random(0)).elapsed_ns
    for forward, is_seen in ((idle, True), (busy, False)):
        model = CostModel(list(PATHS.values()))
        model.learn(SHAPE, forward.work, choice, play(world, forward, choice, Random(0)))
        predicted_ns = model.predict_ns(SHAPE, forward.work, choice, 0.0)
        assert (abs(predicted_ns / true_ns - 1) < 0.05) == is_seen


def test_a_sender_that_was_blocked_does_not_count_as_slow_to_pack() -> None:
    model, numbers, world = CostModel(list(PATHS.values())), np.random.default_rng(2), World()
    blocked, one = make_forward(numbers, 512, 0.0), make_forward(numbers, 1, 0.0)
    choice = Choice("stream", DType.F32, 16)
    times = play(world, blocked, choice, Random(0))
    assert times.compute_ns is not None
    assert times.pack_ns > 0.8 * times.compute_ns
    for forward in (one, blocked):
        model.learn(SHAPE, forward.work, choice, play(world, forward, choice, Random(0)))
    # So busy that only packing and unpacking add to it.
    whole, busy_ns = choice._replace(slice_tokens=1024), 1e9
    predicted_ns = model.predict_ns(SHAPE, blocked.work, whole, busy_ns) - busy_ns
    true = play(world, blocked, whole, Random(0))
    assert predicted_ns == pytest.approx(true.pack_ns + true.unpack_ns, rel=0.5)


def test_before_any_measurement_one_shared_message_is_cheapest() -> None:
    model = CostModel(list(PATHS.values()))
    for n_tokens in (1, 64, 512):
        work = make_work(n_tokens)
        times = {
            (transport, slice_tokens): model.predict_ns(
                SHAPE, work, Choice(transport, DType.F32, slice_tokens), work.local_ns
            )
            for transport in PATHS
            for slice_tokens in SLICES
        }
        assert times["shared", 1024] == min(times.values())
        assert times["shared", 1024] < times["stream", 1024]


def test_the_local_part_is_learnt_by_shape() -> None:
    cost, other = LocalCost(), SHAPE._replace(hidden_size=64)
    for slots, experts in ((2, 2), (8, 6), (100, 40), (400, 60)) * 3:
        cost.observe(SHAPE, slots, experts, 1e4 + slots * 2e3 + experts * 5e4)
        cost.observe(other, slots, experts, 1e3)
    assert cost.predict(SHAPE, 200, 50) == pytest.approx(1e4 + 200 * 2e3 + 50 * 5e4, rel=0.02)
    assert cost.predict(other, 200, 50) < 3e3
    cost.observe(SHAPE, 0, 0, 10)
    assert cost.predict(SHAPE, 0, 0) == 0
