"""Every side at every crash point, killed and stopped, over each transport: docs/crashes.md."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.crash.matrix import plan, steps
from tests.crash.matrix.shots import Shot
from tests.crash.matrix.staged import Staged, staged

if not plan.IS_BUILT_IN:
    pytest.skip(plan.WHY_NOT, allow_module_level=True)

STAGES = [(side, transport) for side in ("client", "worker") for transport in steps.BOTH]
#: The first reaching of a point, and one in the middle of a round.
REACHINGS = {"first": 1, "middle": 0}


SHOTS = [
    pytest.param(each, Shot(point, nth, signal), id="-".join((*each, point, reaching, signal)))
    for each in STAGES
    for point in steps.points(*each)
    for reaching, nth in REACHINGS.items()
    for signal in ("KILL", "STOP")
]


@pytest.fixture(scope="module")
def stages() -> Iterator[dict[tuple[str, str], Staged]]:
    """One for all the shots at a side with a transport; last, each looks what they left."""
    with contextlib.ExitStack() as stack:
        started = {each: stack.enter_context(staged(*each)) for each in STAGES}
        yield started
        left = {each: stage.end() for each, stage in started.items()}
        assert not any(left.values()), left


@pytest.mark.parametrize(("where", "shot"), SHOTS)
def test_a_crash(stages: dict[tuple[str, str], Staged], where: tuple[str, str], shot: Shot) -> None:
    hit = stages[where].shoot(shot)
    assert hit.problems == []
    assert hit.was_reached, (
        f"not {hit.nth} times, and {stages[where].counts[shot.point]} in a round"
    )
