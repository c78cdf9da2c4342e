"""Decides how each forward's rows travel to one worker, and learns from how long it took."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ..dtypes import DType
from .bucket import Bucket
from .losses import Losses
from .model import CostModel
from .rules import (
    SLABS,
    Choice,
    Path,
    Policy,
    Shape,
    Times,
    Verdict,
    Work,
    bucket_of,
    candidates,
    paths_for,
    usable_paths,
    wire_dtypes,
)

#: The probe that follows is this many times as large.
PROBE_GROWTH = 4


class ChooserStats(NamedTuple):
    """Since the chooser was made."""

    #: Changes of what a kind of work usually takes.
    switches: int
    #: Forwards that tried something else.
    tries: int
    #: How often what was measured no longer held and everything was opened again.
    reopened: int
    losses: int


class Chooser:
    """The policy towards one worker; any thread may call it.

    Work is sorted into buckets by its shape, dtype, tokens, rows, and where these are. Each bucket
    has its own choice, which decode and prefill therefore never take from each other; what one
    bucket measures about costs serves all. SettingError: the policy's transport is not among
    `paths`.
    """

    def __init__(self, policy: Policy, paths: Mapping[str, Path]) -> None:
        self.policy = policy
        self._paths = usable_paths(policy, paths)
        self._model = CostModel(self._paths)
        self._losses = Losses()
        self._buckets: dict[tuple[Shape, DType, int, int, bool], Bucket] = {}
        self._lock = threading.Lock()
        self._seeded_ns = 0.0

    def ways(self, dtype: DType, on_gpu: bool) -> frozenset[str]:
        """Those that rows of this dtype can take which are there."""
        paths = paths_for(self._paths, on_gpu)
        return frozenset(each.transport for each in paths if wire_dtypes(self.policy, each, dtype))

    def choose(self, shape: Shape, work: Work, left_out: frozenset[str] = frozenset()) -> Choice:
        """How this forward's rows go to the worker, by none of the ways `left_out`, which are not
        all of `ways`. `work` has at least one row."""
        with self._lock:
            bucket = self._bucket(shape, work)
            bucket.leave_out(left_out)
            bucket.n_calls += 1
            if bucket.n_calls >= bucket.next_review:
                bucket.review(work)
            return bucket.current.choice

    def observe(self, shape: Shape, work: Work, choice: Choice, times: Times) -> None:
        """Learn from a forward that went as chosen."""
        with self._lock:
            self._bucket(shape, work).observe(work, choice, times)
            self._losses.succeeded(choice.transport)

    def lost(self, shape: Shape, work: Work, choice: Choice, cost_ns: float) -> None:
        """Learn that a call failed: the time it wasted, with what was computed in its stead."""
        with self._lock:
            self._bucket(shape, work).wasted(choice, cost_ns)
            self._losses.lost(choice.transport, cost_ns)
            for bucket in self._buckets.values():
                bucket.look_again()

    def explain(self, shape: Shape, work: Work) -> list[Verdict]:
        """Every candidate for work like this, with what is known of it, and why it is so."""
        with self._lock:
            return self._bucket(shape, work).explain(work)

    def stats(self) -> ChooserStats:
        """Counts since it was made."""
        with self._lock:
            buckets = self._buckets.values()
            return ChooserStats(
                switches=sum(bucket.n_switches for bucket in buckets),
                tries=sum(bucket.n_tries for bucket in buckets),
                reopened=sum(bucket.n_reopened for bucket in buckets),
                losses=self._losses.n_lost,
            )

    # --- calibration ------------------------------------------------------------------------

    def probes(
        self,
        shape: Shape,
        num_experts: int,
        top_k: int,
        dtype: DType,
        budget_ns: float,
        on_gpu: bool = False,
    ) -> Iterator[tuple[Choice, Work]]:
        """Calls that calibrate the costs: make each, give its times to `seed`, ask for the next.

        From one row on, growing, over all transports and wire dtypes, as long as the next is
        expected to end within what is left of `budget_ns`.
        """
        start_ns = self._seeded_ns
        most = max(min(self.policy.batch_capacity, path.max_tokens) for path in self._paths)
        # The first of all pays for cold caches, and is made twice.
        for rows in (1, *_powers(PROBE_GROWTH, most)):
            slots = rows * top_k
            experts = min(slots, num_experts)
            work = Work(rows, rows, slots, experts, top_k, dtype, 0.0, on_gpu)
            for choice in self._probe_choices(dtype, rows, on_gpu):
                with self._lock:
                    expected_ns = self._model.predict_ns(shape, work, choice, 0.0)
                    left_ns = budget_ns - (self._seeded_ns - start_ns)
                    # The priors know too little to forbid the smallest.
                    if expected_ns > left_ns and (rows > 1 or left_ns <= 0):
                        return
                yield choice, work

    def seed(self, shape: Shape, work: Work, choice: Choice, times: Times) -> None:
        """Learn the costs from a call that was made only to measure."""
        with self._lock:
            self._model.learn(shape, work, choice, times)
            self._seeded_ns += times.elapsed_ns
            for bucket in self._buckets.values():
                bucket.look_again()

    def _probe_choices(self, dtype: DType, rows: int, on_gpu: bool) -> Iterator[Choice]:
        for path in paths_for(self._paths, on_gpu):
            capacity = min(self.policy.batch_capacity, path.max_tokens)
            for wire_dtype in wire_dtypes(self.policy, path, dtype):
                if rows <= capacity:
                    yield Choice(path.transport, wire_dtype, capacity)
                # Only several messages tell what each costs by itself; slabs are given one.
                if PROBE_GROWTH < rows <= PROBE_GROWTH**2 and path.transport not in SLABS:
                    yield Choice(path.transport, wire_dtype, min(PROBE_GROWTH, capacity))

    def _bucket(self, shape: Shape, work: Work) -> Bucket:
        sizes = bucket_of(work.n_tokens), bucket_of(work.rows)
        key = shape, work.dtype, *sizes, work.on_gpu
        bucket = self._buckets.get(key)
        if bucket is None:
            choices = candidates(self.policy, self._paths, work.dtype, work.n_tokens, work.on_gpu)
            bucket = self._buckets[key] = Bucket(shape, choices, self._model, self._losses)
        return bucket


def _powers(base: int, most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= base
