"""The threads of the CPU's backend: they compute one call together, and stop together."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from . import BetweenSteps
from .cpu_blas import ONE_THREAD

#: Multiply-adds of a thread after which the call looks whether somebody waits: 1.4 ms of a core
#: that does 47e9 a second, as those of the machine that `cpu_matmul` was measured on. What it is in
#: the middle of is finished first; cpu_matmul._ROWS_TO_WIDEN says how much that is.
STEP_MULTIPLY_ADDS = 1 << 26
#: How often whoever waits for the others' last steps looks whether somebody waits for the turn.
_LOOK_S = 0.001

#: What one thread at a time does, step by step; it gives the multiply-adds of each.
Task = Iterator[int]


class Pace:
    """Counts the work of a call's own thread, and says when the call should pause."""

    def __init__(self, between_steps: BetweenSteps | None) -> None:
        self._between_steps = between_steps
        self._done = 0
        #: How long to wait for other threads before `asks`.
        self.look_s = None if between_steps is None else _LOOK_S

    def is_due(self, multiply_adds: int) -> bool:
        """So much more is done: whether to `pause`, now or soon."""
        self._done += multiply_adds
        if self._done < STEP_MULTIPLY_ADDS:
            return False
        self._done = 0
        return self.asks()

    def asks(self) -> bool:
        """Whether somebody waits, however much was done."""
        return self._between_steps is not None and self._between_steps.is_due()

    def pause(self) -> None:
        """Let others compute; raises what `BetweenSteps` does. Nobody may work on the call."""
        assert self._between_steps is not None
        self._between_steps()

    def did(self, multiply_adds: int) -> None:
        """As `is_due`, and pauses then."""
        if self.is_due(multiply_adds):
            self.pause()


class Team:
    """The calling thread and its helpers, which take tasks until none is left."""

    def __init__(self, threads: int) -> None:
        self._n_helpers = threads - 1
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = 0

    def run(self, tasks: Sequence[Task], is_shared: bool, pace: Pace) -> None:
        """Finish every task, here or, if `is_shared`, on all threads.

        In a pause no thread has a task in hand: other calls find the whole team.
        """
        if not is_shared or self._n_helpers < 1 or len(tasks) < 2:
            for task in tasks:
                for multiply_adds in task:
                    pace.did(multiply_adds)
            return
        queue = deque(tasks)
        try:
            while self._run_until_due(queue, pace):
                pace.pause()
        finally:
            # The pool forgets what it ran a moment after the result is there: without tasks that
            # holds none of the call's arrays.
            queue.clear()

    def _run_until_due(self, queue: deque[Task], pace: Pace) -> bool:
        """Until all is done, or a pause is due: True then. Nobody works any more."""
        job = _Job(queue)
        helpers: list[Future[None]] = []
        try:
            try:
                for _ in range(min(self._n_helpers, len(queue) - 1)):
                    helpers.append(self._helpers().submit(job.help))
                if not job.lead(pace):
                    _wait_for(helpers, pace)
            finally:
                job.is_stopped = True
                _end(helpers)
            while helpers:
                if not helpers[-1].cancelled():
                    helpers[-1].result()
                helpers.pop()
            return bool(queue)
        finally:
            # An error's frames, this one among them, would hold its future, and that the error: a
            # cycle that keeps the call's arrays.
            helpers.clear()

    def _helpers(self) -> ThreadPoolExecutor:
        # After fork() the child has the pool but not its threads.
        if self._pool is None or self._pool_pid != os.getpid():
            self._pool = ThreadPoolExecutor(self._n_helpers, thread_name_prefix="moeshm-cpu")
            self._pool_pid = os.getpid()
        return self._pool


class _Job:
    """What the team does until the next pause; a task that is not finished goes back."""

    def __init__(self, queue: deque[Task]) -> None:
        self._queue = queue
        self.is_stopped = False

    def lead(self, pace: Pace) -> bool:
        """Of the calling thread: True when a pause is due, False when no task is left to take, or
        a helper failed."""
        for task in self._tasks():
            for multiply_adds in task:
                if self.is_stopped:
                    return False
                if pace.is_due(multiply_adds):
                    self._queue.appendleft(task)
                    return True
        return False

    def help(self) -> None:
        """Of every other. An error is the end of the job for all."""
        with np.errstate(all="ignore"), ONE_THREAD:
            try:
                for task in self._tasks():
                    for _ in task:
                        if self.is_stopped:
                            self._queue.appendleft(task)
                            return
            except BaseException:
                self.is_stopped = True
                raise

    def _tasks(self) -> Iterator[Task]:
        while not self.is_stopped:
            try:
                yield self._queue.popleft()
            except IndexError:
                return


def _end(helpers: Sequence[Future[None]]) -> None:
    """Wait until none works any more, however often that is interrupted, which is raised then."""
    try:
        wait([helper for helper in helpers if not helper.cancel()])
    except BaseException:
        _end(helpers)
        raise


def _wait_for(helpers: Sequence[Future[None]], pace: Pace) -> None:
    """Until they are done, or a pause is due."""
    running = {helper for helper in helpers if not helper.cancel()}
    while running:
        running = wait(running, pace.look_s).not_done
        if running and pace.asks():
            return
