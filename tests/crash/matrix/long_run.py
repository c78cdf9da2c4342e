"""Random shots, as many as wished: `python -m tests.crash.matrix.long_run --runs N --seed S`.

Shot `i` of a seed is the same in every run; a failure names both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections import Counter

import numpy as np

from tests.crash.matrix import plan, steps
from tests.crash.matrix.shots import Hit, Load, Shot
from tests.crash.matrix.staged import Staged, staged

SIDES = ("client", "worker")
STAGES = [(side, transport) for side in SIDES for transport in steps.BOTH]


def draw(seed: int, index: int, counts: dict[str, int]) -> Shot:
    """The shot of that number, for its stage."""
    rng = np.random.default_rng((seed, index))
    point = str(rng.choice(sorted(counts)))
    load = Load(
        seed=int(rng.integers(1 << 30)),
        n_small=int(rng.integers(0, 9)),
        n_wide=int(rng.integers(1, 5)),
        n_threads=int(rng.integers(0, 4)),
        engine_s=float(rng.choice([0.0, 0.001, 0.004])),
    )
    # Rarely in the fourth round, mostly in the first two.
    nth = 1 + int(rng.integers(0, 1 + 2 * counts[point]))
    return Shot(point, nth, str(rng.choice(["KILL", "STOP"])), load, patience_s=3.0)


class Summary:
    """What all the shots came to."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._lock = threading.Lock()
        self._faults: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()
        self._longest: dict[str, float] = {}
        self._n_missed = 0
        self._start = time.monotonic()
        self.failures: list[str] = []

    def add(self, index: int, stage: tuple[str, str], shot: Shot, hit: Hit) -> None:
        """One more."""
        side, transport = stage
        with self._lock:
            if hit.was_reached:
                self._faults[f"{side} {transport} {shot.signal}"] += 1
            else:
                self._n_missed += 1
            self._calls.update(hit.tally)
            for name, value in (("ended", hit.ended_after_s), ("freed", hit.freed_after_s)):
                key = f"{name} {side} {shot.signal}"
                self._longest[key] = max(self._longest.get(key, 0.0), value)
            if hit.problems:
                self.fail(f"shot {index}, {side} {transport} {shot}: {'; '.join(hit.problems)}")

    def fail(self, what: str) -> None:
        """Tell of it at once."""
        self.failures.append(f"seed {self._seed}: {what}")
        print(self.failures[-1], file=sys.stderr, flush=True)

    def as_json(self) -> str:
        """For the reader."""
        wrong = sum(n for what, n in self._calls.items() if what == "wrong result")
        text = " ".join(self.failures)
        return json.dumps(
            {
                "seed": self._seed,
                "minutes": round((time.monotonic() - self._start) / 60, 2),
                "faults": sum(self._faults.values()),
                # Their load did not get so far; the calls were checked all the same.
                "shots_not_reached": self._n_missed,
                "faults_by_kind": dict(sorted(self._faults.items())),
                "exact_results": self._calls["exact"],
                "refused_as_they_should": self._calls["refused"],
                "typed_errors": {
                    what: n
                    for what, n in sorted(self._calls.items())
                    if what not in ("exact", "refused") and "wrong" not in what
                },
                "wrong_results": wrong,
                "hangs": text.count("Hang") + text.count("after the fault"),
                "leaks": text.count("the worker holds") + text.count("left") + text.count("grew"),
                "failures": self.failures,
                "longest_s": {key: round(s, 3) for key, s in sorted(self._longest.items())},
            },
            indent=2,
        )


def run(
    stage: tuple[str, str], indices: list[int], seed: int, until: float, summary: Summary
) -> None:
    """Every shot of one stage, until `until` (of time.monotonic); a stage that broke is followed by
    another."""
    while indices and time.monotonic() < until:
        try:
            with staged(*stage) as started:
                shoot(started, stage, indices, seed, until, summary)
        except AssertionError as error:
            summary.fail(f"{' '.join(stage)}: {error}")


def shoot(
    started: Staged,
    stage: tuple[str, str],
    indices: list[int],
    seed: int,
    until: float,
    summary: Summary,
) -> None:
    """Take shots off the list."""
    while indices and time.monotonic() < until:
        index = indices.pop(0)
        shot = draw(seed, index, started.counts)
        try:
            summary.add(index, stage, shot, started.shoot(shot))
        except AssertionError as error:
            raise AssertionError(f"shot {index} {shot}: {error}") from None
    for left in started.end():
        summary.fail(f"{' '.join(stage)}: {left}")


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="shots")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--minutes", type=float, default=1e9, help="no shot begins after them")
    parser.add_argument("--shot", type=int, help="only the one of this number")
    asked = parser.parse_args()
    if not plan.IS_BUILT_IN:
        raise SystemExit(plan.WHY_NOT)
    print(f"seed {asked.seed}", file=sys.stderr, flush=True)
    summary = Summary(asked.seed)
    until = time.monotonic() + 60 * asked.minutes
    numbers = range(asked.runs) if asked.shot is None else [asked.shot]
    threads = [
        threading.Thread(
            target=run,
            args=(
                stage,
                [i for i in numbers if i % len(STAGES) == n],
                asked.seed,
                until,
                summary,
            ),
        )
        for n, stage in enumerate(STAGES)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(summary.as_json())
    raise SystemExit(bool(summary.failures))


if __name__ == "__main__":
    main()
