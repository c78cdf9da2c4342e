"""The chooser against simulated workers: it finds the best way, soon, and keeps to it."""

from __future__ import annotations

import functools
from random import Random

import numpy as np
import pytest

from moeshm.dtypes import DType
from moeshm.policy import Choice, Chooser, Path, Policy, Times, Work
from moeshm.policy.bucket import SHORT_NS, TRY_COLD
from moeshm.policy.rules import candidates

from .policy_simulator import (
    LINKS,
    NUM_EXPERTS,
    PATHS,
    SHAPE,
    TOP_K,
    Forward,
    Link,
    World,
    calibrate,
    drive,
    make_forward,
    make_work,
    play,
    total_of_fixed,
)

N_FORWARDS = 300
SPEEDS = (1 / 16, 1, 4)
#: Slow packing, work without weights to read again: what is sent in slices overlaps.
FINE = World(
    expert_ns=0,
    slot_ns=4e4,
    worker_message_ns=1e3,
    links={"shared": Link(2e3, 5, 1.2e4), "stream": Link(4e3, 5, 3e4)},
)
#: Every message reads its experts' weights again.
COARSE = World(expert_ns=1e6, slot_ns=1e3)
#: Bytes only.
NULL = World(expert_ns=0, slot_ns=50)
WORLDS = {"usual": World(), "fine": FINE, "coarse": COARSE, "null": NULL}


@functools.cache
def make_forwards(n_tokens: int, local_ns: float, seed: int = 0) -> list[Forward]:
    random = np.random.default_rng(seed)
    return [make_forward(random, n_tokens, local_ns) for _ in range(N_FORWARDS)]


def make_world(name: str, speed: float) -> World:
    return WORLDS[name]._replace(speed=speed, noise=0.02)


@functools.cache
def best_fixed(n_tokens: int, local_ns: float, name: str, speed: float) -> tuple[Choice, int]:
    forwards, world = make_forwards(n_tokens, local_ns), make_world(name, speed)
    choices = candidates(Policy(), list(PATHS.values()), DType.F32, n_tokens)
    totals = {choice: total_of_fixed(choice, forwards, world, seed=1) for choice in choices}
    best = min(totals, key=lambda choice: totals[choice])
    return best, totals[best]


@pytest.mark.parametrize("is_calibrated", [True, False])
@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize(("n_tokens", "local_ns"), [(512, 1.2e7), (512, 0.0), (1, 1e5)])
def test_it_takes_hardly_longer_than_the_best_of_all_fixed_ways(
    n_tokens: int, local_ns: float, name: str, speed: float, is_calibrated: bool
) -> None:
    world = make_world(name, speed)
    forwards = make_forwards(n_tokens, local_ns)
    chooser, random = Chooser(Policy(), PATHS), Random(1)
    if is_calibrated:
        calibrate(chooser, world, random)
    _, elapsed = drive(chooser, forwards, world, random)
    best, best_ns = best_fixed(n_tokens, local_ns, name, speed)
    assert sum(elapsed) < 1.05 * best_ns, "tries included"
    tail_ns = total_of_fixed(best, forwards[-100:], world, seed=2)
    assert sum(elapsed[-100:]) < 1.035 * tail_ns, "once it has settled"


@pytest.mark.parametrize(
    ("world", "is_fine"), [(FINE._replace(speed=0.25), True), (COARSE._replace(speed=0.25), False)]
)
def test_slices_win_where_they_overlap_and_lose_where_they_read_weights_again(
    world: World, is_fine: bool
) -> None:
    chooser = Chooser(Policy(), PATHS)
    choices, _ = drive(chooser, make_forwards(512, 0.0), world, Random(1))
    assert (choices[-1].slice_tokens <= 64) == is_fine


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("n_tokens", [1, 512])
def test_it_does_not_flap_when_times_scatter(n_tokens: int, name: str, seed: int) -> None:
    world = WORLDS[name]._replace(noise=0.1)
    chooser = Chooser(Policy(), PATHS)
    choices, _ = drive(chooser, make_forwards(n_tokens, 1e5, seed), world, Random(seed))
    stats = chooser.stats()
    assert stats.switches <= 4
    assert stats.reopened == 0
    # What is tried late is a second look at those close to the best.
    late = choices[150:]
    usual = max(set(late), key=late.count)
    assert late.count(usual) > 100 or stats.switches


def test_two_ways_that_are_alike_do_not_alternate() -> None:
    links = {"shared": LINKS["shared"], "stream": LINKS["shared"]}
    chooser = Chooser(Policy(mode="batched"), PATHS)
    drive(chooser, make_forwards(64, 1e5), World(links=links, noise=0.1), Random(0))
    assert chooser.stats().switches <= 2


def test_tries_stay_within_their_budget() -> None:
    """Even where the model is wrong about everything but the incumbent."""
    chooser = Chooser(Policy(), PATHS)
    work, total_ns, best_ns = make_work(512, 0.0), 0, 0
    for _ in range(N_FORWARDS):
        choice = chooser.choose(SHAPE, work)
        elapsed_ns = 10_000_000 if choice == Choice("shared", DType.F32, 1024) else 35_000_000
        # The parts say nothing of what makes the others slow.
        times = Times(1, 100_000, elapsed_ns - 200_000, 100_000, 9_000_000, elapsed_ns)
        chooser.observe(SHAPE, work, choice, times)
        total_ns += elapsed_ns
        best_ns += 10_000_000
    assert total_ns < 1.08 * best_ns


def test_the_first_choice_is_never_absurd() -> None:
    for n_tokens in (1, 64, 512, 1024):
        chooser = Chooser(Policy(), PATHS)
        assert chooser.choose(SHAPE, make_work(n_tokens)) == Choice("shared", DType.F32, 1024)


def test_narrower_rows_win_where_bytes_cost_and_a_tolerance_allows_them() -> None:
    world = World(links={"shared": Link(6e3, 2.0, 1e4), "stream": Link(2e4, 3.0, 3e4)}, speed=100)
    for tolerance, expected in ((0.0, DType.F32), (2**-8, DType.BF16)):
        chooser = Chooser(Policy(tolerance=tolerance), PATHS)
        choices, _ = drive(chooser, make_forwards(512, 0.0), world, Random(3))
        assert choices[-1].wire_dtype is expected
        assert {choice.wire_dtype for choice in choices} <= {DType.F32, expected}


def test_no_message_exceeds_what_the_worker_takes() -> None:
    """The simulated worker refuses larger ones."""
    paths = {name: path._replace(max_tokens=100) for name, path in PATHS.items()}
    chooser = Chooser(Policy(batch_capacity=4096), paths)
    assert max(work.rows for _, work in calibration_works(chooser)) <= 100
    choices, _ = drive(chooser, make_forwards(600, 1e5), World(), Random(0))
    assert max(choice.slice_tokens for choice in choices) <= 100


def calibration_works(chooser: Chooser) -> list[tuple[Choice, Work]]:
    found = []
    for choice, work in chooser.probes(SHAPE, NUM_EXPERTS, TOP_K, DType.F32, 1e8):
        chooser.seed(SHAPE, work, choice, Times(1, 1000, 1000, 1000, 1000, 5000))
        found.append((choice, work))
    return found


# --- calibration -----------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [1 / 256, *SPEEDS, 100])
def test_calibration_keeps_to_its_budget(speed: float) -> None:
    chooser = Chooser(Policy(), PATHS)
    spent_ns = calibrate(chooser, World(speed=speed), Random(0))
    smallest = Forward(np.arange(TOP_K).reshape(1, TOP_K), DType.F32, 0.0)
    choice = Choice("stream", DType.F32, 1024)
    one_ns = play(World(speed=speed), smallest, choice, Random(0)).elapsed_ns
    # A single row is always tried, twice over each transport at most.
    assert spent_ns < max(1.3e8, 4.2 * one_ns)


def test_calibration_covers_every_way_and_grows() -> None:
    works = calibration_works(Chooser(Policy(tolerance=1.0), PATHS))
    rows = [work.rows for _, work in works]
    assert rows == sorted(rows)
    assert rows[0] == 1
    assert rows[-1] == 1024
    for transport in PATHS:
        for wire in (DType.F32, DType.BF16):
            assert sum(
                (choice.transport, choice.wire_dtype) == (transport, wire) for choice, _ in works
            ) >= 6  # fmt: skip


def test_what_calibration_finds_decides_the_first_choice() -> None:
    reversed_links = {"shared": LINKS["stream"], "stream": LINKS["shared"]}
    chooser = Chooser(Policy(), PATHS)
    assert chooser.choose(SHAPE, make_work(1)).transport == "shared"
    calibrate(chooser, World(links=reversed_links), Random(0))
    assert chooser.choose(SHAPE, make_work(1)).transport == "stream"
    assert chooser.stats().tries == 0


# --- explaining ------------------------------------------------------------------------------


def test_explain_agrees_with_what_is_chosen() -> None:
    chooser, random = Chooser(Policy(), PATHS), Random(1)
    for forward in make_forwards(512, 1e6):
        (choice,), _ = drive(chooser, [forward], FINE, random)
        verdicts = chooser.explain(SHAPE, forward.work)
        (chosen,) = (each for each in verdicts if each.is_chosen)
        tried = [each for each in verdicts if each.why.startswith("being tried")]
        assert Choice(*(tried or [chosen])[0][:3]) == choice
        assert all((each.measured_ns is None) == (each.n_measured == 0) for each in verdicts)
    n_cold = TRY_COLD * chooser.stats().tries
    assert N_FORWARDS - n_cold <= sum(each.n_measured for each in verdicts) < N_FORWARDS
    assert chosen.expected_ns < 1.06 * min(each.expected_ns for each in verdicts)
    assert chosen.measured_ns == pytest.approx(chosen.expected_ns, rel=0.01)
    assert len(verdicts) == len(candidates(Policy(), list(PATHS.values()), DType.F32, 512))


def test_explain_gives_reasons() -> None:
    chooser = Chooser(Policy(), PATHS)
    before = chooser.explain(SHAPE, make_work(512))
    assert [each.why for each in before if each.is_chosen] == ["fastest as predicted"]
    assert all(each.why.startswith("predicted: ") for each in before if not each.is_chosen)
    drive(chooser, make_forwards(512, 1e6), COARSE, Random(1))
    after = chooser.explain(SHAPE, make_forwards(512, 1e6)[0].work)
    (chosen,) = (each for each in after if each.is_chosen)
    assert chosen.why == "fastest as measured" or chosen.why.startswith("kept: within ")
    reasons = {each.why.partition(":")[0] for each in after if not each.is_chosen}
    assert {"predicted"} < reasons <= {"predicted", "measured", "being tried"}
    assert any(each.why.endswith("too far to be tried yet") for each in after)


def test_a_settled_short_forward_is_learnt_from_now_and_then() -> None:
    """So that decode pays little; the time of all of them is counted."""
    chooser, forwards = Chooser(Policy(), PATHS), make_forwards(1, 0.0)
    drive(chooser, forwards, World(speed=4), Random(0))
    assert max(play(World(speed=4), f, Choice("stream", DType.F32, 4), Random(0)).elapsed_ns
               for f in forwards) < SHORT_NS  # fmt: skip
    n_measured = sum(each.n_measured for each in chooser.explain(SHAPE, make_work(1)))
    assert N_FORWARDS / 8 <= n_measured < N_FORWARDS / 4


def test_paths_other_than_the_allowed_are_never_taken() -> None:
    paths = {**PATHS, "device": Path("device", 1024, 1 << 20)}
    chooser = Chooser(Policy(transport="stream"), paths)
    choices, _ = drive(chooser, make_forwards(64, 0.0), World(), Random(0))
    assert {choice.transport for choice in choices} == {"stream"}
