"""Rows on the engine's GPU: the chooser takes the way that is measured to be cheapest."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from moeshm.dtypes import DType
from moeshm.errors import SettingError
from moeshm.policy import Choice, Chooser, Path, Policy, Times, Work
from moeshm.policy.rules import candidates, usable_paths

from .policy_simulator import NUM_EXPERTS, SHAPE, TOP_K

PATHS = {way: Path(way, 1024, 16 << 20) for way in ("shared", "pinned", "device", "stream")}
F32, BF16 = DType.F32, DType.BF16


class Line(NamedTuple):
    """What a call takes, in us: so much, and more for each token."""

    call_us: float
    token_us: float


#: For one token and for 512, about as engine and worker measured on two GPUs, and on one.
WORLDS = {
    "two GPUs": {
        "shared": Line(60, 1.86),
        "pinned": Line(72, 1.12),
        "device": Line(81, 0.73),
        "stream": Line(120, 2.5),
    },
    "one GPU": {
        "shared": Line(77, 2.0),
        "pinned": Line(540, 1.9),
        "device": Line(725, 1.8),
        "stream": Line(140, 2.7),
    },
    # Where slabs are best for the shortest calls, and at nothing else.
    "turned around": {
        "shared": Line(90, 0.5),
        "pinned": Line(40, 2.0),
        "device": Line(150, 1.5),
        "stream": Line(200, 3.0),
    },
}
BEST = [
    ("two GPUs", 1, "shared"),
    ("two GPUs", 512, "device"),
    ("one GPU", 1, "shared"),
    ("one GPU", 512, "shared"),
    ("turned around", 1, "pinned"),
    ("turned around", 512, "shared"),
]


def times(world: dict[str, Line], choice: Choice, n_tokens: int) -> Times:
    line = world[choice.transport]
    messages = -(-n_tokens // choice.slice_tokens)
    elapsed_ns = round(1e3 * (messages * line.call_us + n_tokens * line.token_us))
    if choice.transport in ("pinned", "device"):
        # Nobody tells how long the worker took.
        pack_ns = messages * 30_000
        return Times(messages, pack_ns, elapsed_ns - pack_ns, 0, None, elapsed_ns)
    # Of its own time a worker says the same over either, and copies take what rows add to it.
    compute_ns = round(messages * 10e3 + n_tokens * 300)
    copy_ns = round(messages * 5e3 + n_tokens * (line.token_us * 1e3 - 300) / 2)
    return Times(messages, copy_ns, elapsed_ns - 2 * copy_ns, copy_ns, compute_ns, elapsed_ns)


def work_of(n_tokens: int, on_gpu: bool = True) -> Work:
    slots = n_tokens * TOP_K
    return Work(n_tokens, n_tokens, slots, min(slots, NUM_EXPERTS), TOP_K, BF16, 0.0, on_gpu)


def calibrated(chooser: Chooser, world: dict[str, Line]) -> Chooser:
    for choice, work in chooser.probes(SHAPE, NUM_EXPERTS, TOP_K, BF16, 1e8, True):
        assert work.on_gpu
        chooser.seed(SHAPE, work, choice, times(world, choice, work.n_tokens))
    return chooser


@pytest.mark.parametrize("is_calibrated", [True, False])
@pytest.mark.parametrize(("name", "n_tokens", "best"), BEST)
def test_it_takes_the_cheapest_way(
    name: str, n_tokens: int, best: str, is_calibrated: bool
) -> None:
    world, work, chooser = WORLDS[name], work_of(n_tokens), Chooser(Policy(), PATHS)
    if is_calibrated:
        calibrated(chooser, world)
    taken = []
    for _ in range(300):
        choice = chooser.choose(SHAPE, work)
        chooser.observe(SHAPE, work, choice, times(world, choice, n_tokens))
        taken.append(choice.transport)
    if is_calibrated:
        assert taken[0] == best
    # But for a second look at what is close.
    assert taken[-100:].count(best) > 80
    verdicts = chooser.explain(SHAPE, work)
    assert {each.transport for each in verdicts} == set(PATHS)
    (chosen,) = (each for each in verdicts if each.is_chosen)
    assert chosen.transport == best
    assert chosen.measured_ns == pytest.approx(times(world, chosen_of(chosen), n_tokens).elapsed_ns)


def chosen_of(verdict: object) -> Choice:
    assert isinstance(verdict, tuple)
    return Choice(*verdict[:3])


@pytest.mark.parametrize("name", WORLDS)
def test_calibration_predicts_every_way(name: str) -> None:
    world = WORLDS[name]
    chooser = calibrated(Chooser(Policy(mode="batched"), PATHS), world)
    for n_tokens in (1, 64, 512):
        for verdict in chooser.explain(SHAPE, work_of(n_tokens)):
            true_ns = times(world, chosen_of(verdict), n_tokens).elapsed_ns
            assert verdict.predicted_ns == pytest.approx(true_ns, rel=0.35), verdict


def test_what_a_slab_takes_says_nothing_of_other_ways() -> None:
    """And the reverse: nobody tells the worker's time from the latency there."""
    chooser = Chooser(Policy(mode="batched"), PATHS)
    work = work_of(16)
    for way in PATHS:
        measured = Times(1, 30_000, 300_000_000, 30_000, 250_000_000, 300_060_000)
        if way in ("pinned", "device"):
            measured = measured._replace(compute_ns=None)
        chooser.seed(SHAPE, work, Choice(way, BF16, 1024), measured)
    before = {each.transport: each.predicted_ns for each in chooser.explain(SHAPE, work)}
    quick = Times(1, 30_000, 99_000_000, 0, None, 99_030_000)
    chooser.seed(SHAPE, work, Choice("device", BF16, 1024), quick)
    chooser.seed(SHAPE, work, Choice("device", BF16, 1024), quick)
    after = {each.transport: each.predicted_ns for each in chooser.explain(SHAPE, work)}
    assert after.pop("device") < 0.7 * before.pop("device")
    assert after == before


def test_what_no_way_has_told_of_the_worker_is_taken_from_another() -> None:
    """Else a prior that is far off would keep ways out that were never measured."""
    chooser = Chooser(Policy(mode="batched"), PATHS)
    work = work_of(16)
    measured = Times(1, 30_000, 470_000, 0, None, 500_000)
    chooser.seed(SHAPE, work, Choice("pinned", BF16, 1024), measured)
    for verdict in chooser.explain(SHAPE, work):
        assert verdict.predicted_ns < 1_000_000


def test_a_slab_that_was_not_waited_for_teaches_nothing_of_the_worker() -> None:
    chooser = Chooser(Policy(mode="batched"), PATHS)
    work, choice = work_of(16), Choice("pinned", BF16, 1024)
    before = [each for each in chooser.explain(SHAPE, work) if each.transport == "pinned"]
    # It was done long before: the local part took most of the time.
    chooser.seed(SHAPE, work, choice, Times(1, 50_000, 0, 0, None, 99_000_000))
    after = [each for each in chooser.explain(SHAPE, work) if each.transport == "pinned"]
    assert after[0].predicted_ns < 1.2 * before[0].predicted_ns


def test_rows_in_the_host_s_memory_take_no_slab_and_learn_for_themselves() -> None:
    chooser = calibrated(Chooser(Policy(), PATHS), WORLDS["turned around"])
    work = work_of(1, on_gpu=False)
    assert chooser.choose(SHAPE, work).transport == "shared"
    ways = {each.transport for each in chooser.explain(SHAPE, work)}
    assert ways == {"shared", "stream"}
    assert chooser.choose(SHAPE, work_of(1)).transport == "pinned"


@pytest.mark.parametrize(
    ("setting", "on_gpu", "ways"),
    [
        ("auto", True, ["shared", "pinned", "device", "stream"]),
        ("auto", False, ["shared", "stream"]),
        ("shared", True, ["shared", "pinned"]),
        ("shared", False, ["shared"]),
        ("stream", True, ["stream"]),
        ("device", True, ["device"]),
    ],
)
def test_a_setting_leaves_open_what_it_names(setting: str, on_gpu: bool, ways: list[str]) -> None:
    policy = Policy(transport=setting, mode="batched")
    found = candidates(policy, usable_paths(policy, PATHS), BF16, 64, on_gpu)
    assert [choice.transport for choice in found] == ways


def test_slabs_carry_rows_as_they_are_in_one_piece() -> None:
    found = candidates(Policy(tolerance=1.0), list(PATHS.values()), F32, 512, True)
    slabs = [choice for choice in found if choice.transport in ("pinned", "device")]
    assert slabs == [Choice("pinned", F32, 1024), Choice("device", F32, 1024)]
    assert Choice("shared", BF16, 16) in found
    found = candidates(Policy(wire_dtype="bf16"), list(PATHS.values()), F32, 512, True)
    assert {choice.transport for choice in found} == {"shared", "stream"}
    found = candidates(Policy(mode="stream"), list(PATHS.values()), F32, 512, True)
    assert {choice.slice_tokens for choice in found} == {4}


def test_what_no_way_carries_is_refused() -> None:
    policy = Policy(transport="device", wire_dtype="f16")
    with pytest.raises(SettingError, match="wire_dtype='f16' and rows of f32 on the engine's GPU"):
        Chooser(policy, PATHS).choose(SHAPE, work_of(1)._replace(dtype=F32))
    with pytest.raises(SettingError, match="in the host's memory: no way carries them so"):
        candidates(Policy(), [PATHS["device"]], F32, 1)


def test_losses_lead_to_another_way() -> None:
    world, work = WORLDS["two GPUs"], work_of(512)
    chooser = calibrated(Chooser(Policy(), PATHS), world)
    choice = chooser.choose(SHAPE, work)
    assert choice.transport == "device"
    chooser.lost(SHAPE, work, choice, 1e9)
    assert chooser.choose(SHAPE, work).transport == "pinned"


@pytest.mark.parametrize("is_suspicious", [False, True])
def test_ways_that_are_left_out_are_not_taken_and_come_back(is_suspicious: bool) -> None:
    world, work = WORLDS["two GPUs"], work_of(512)
    chooser = calibrated(Chooser(Policy(), PATHS), world)
    slow = {**world, "device": Line(4000, 100)}

    def drive(n_forwards: int, world: dict[str, Line], *left_out: str) -> list[str]:
        taken = []
        for _ in range(n_forwards):
            choice = chooser.choose(SHAPE, work, frozenset(left_out))
            chooser.observe(SHAPE, work, choice, times(world, choice, 512))
            taken.append(choice.transport)
        return taken

    assert drive(60, world)[-1] == "device"
    if is_suspicious:
        # What would keep a decision from being looked at.
        drive(3, slow)
    assert chooser.ways(BF16, True) == set(PATHS)
    assert chooser.ways(BF16, False) == {"shared", "stream"}
    taken = drive(60, world, "device")
    assert "device" not in taken
    assert taken[-1] == "pinned"
    (device,) = (each for each in chooser.explain(SHAPE, work) if each.transport == "device")
    assert device.why.startswith("left alone after a loss: ")
    assert set(drive(60, world, "device", "pinned", "stream")) == {"shared"}
    if not is_suspicious:
        assert drive(60, world)[-1] == "device"
