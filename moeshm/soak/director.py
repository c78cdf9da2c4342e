"""Conducts a soak: processes call while faults are injected, and come to rest from time to time."""

from __future__ import annotations

import itertools
import os
import secrets
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import checkpoint, session, settings
from ..dtypes import DType
from ..errors import ConnectError, SettingError
from . import leaks, pool
from .actors import END_LIMIT_S, CallerProcess, Process, Worker
from .caller import ROLES
from .guard import Guard, end_all
from .injector import Injector
from .inspection import Inspection
from .ledger import Ledger
from .messages import Order, Ready, Resting
from .report import Report, report_of
from .schedule import faults

#: Of a model with more, the first, the last, and some between them.
MOST_LAYERS = 4
#: In a calling process, that call.
THREADS = 3
_START_LIMIT_S = 600.0
#: A calling process speaks ten times a second, unless it is stopped or gets no CPU.
_SILENCE_S = 120.0
#: A call may have a minute left, and a client may look for its worker a minute later.
_REST_LIMIT_S = 400.0
#: Where a process ends by itself so often, it does not help to start it again.
_MOST_BAD_ENDS = 5
#: In so long every kind of caller, and the worker that is kept, must have been compared once.
_COMPARED_IN_S = 120.0
#: Between two looks at which processes there are.
_NOTICE_S = 0.5
_STEP_S, _SHOW_S = 0.02, 0.5
#: Between two rests: a share of the whole, between these.
_ROUND_S, _ROUNDS = (4.0, 30.0), 6


class Soak:
    """One run. `show`: is given the figures twice a second, and what it does, in words.

    CheckpointError, SettingError, ConnectError: it cannot begin.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        seconds: float,
        seed: int,
        device: str = "cpu",
        n_callers: int = len(ROLES),
        show: Callable[[Report, str], None] = lambda _report, _doing: None,
    ) -> None:
        if settings.current().transport == "device":
            raise SettingError(
                "MOESHM_TRANSPORT='device' is for arrays on a GPU, and a soak's are in the host's "
                "memory; choose auto, shared or stream"
            )
        self._model = os.fspath(model)
        self._seconds = seconds
        self._seed = seed
        self._device = device
        self._n_callers = n_callers
        self._show = show
        self._shown = self._noticed = 0.0
        self._doing = ""
        self._awaited: Callable[[], list[str]] = list
        #: Its clean-up must not be interrupted.
        self.is_cleaning_up = False
        self._is_stopped = self._is_round = False
        self._start = time.monotonic()
        self._layers: tuple[int, ...] = ()
        self._workers: list[Worker] = []
        self._callers: list[CallerProcess] = []
        self._seeds = itertools.count(seed * 1_000_000)
        self._run = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._ledger = Ledger()
        self._folder = Path(tempfile.gettempdir()) / f"moeshm-soak-{secrets.token_hex(4)}"
        self._inspection = Inspection(self._ledger, self._run, self._wait, self._folder)
        self._guard: Guard | None = None
        self._environment = {leaks.RUN_VARIABLE: self._run, "TMPDIR": str(self._folder)}
        self._injector = Injector(self._ledger, self._workers, self._callers)

    def stop(self) -> None:
        """End the run early, as if its time were over; from a signal's handler."""
        self._is_stopped = True

    def run(self) -> Report:
        """Until the time is over; what was found. No process or file of it is left then.

        KeyboardInterrupt, after `stop`: it ends at once, which is a failure among the others.
        """
        try:
            try:
                self._begin()
                self._call_and_rest()
                self._end()
            except KeyboardInterrupt:
                if not self._is_stopped:
                    raise
                self._ledger.failure(
                    f"it was ended at once by a second signal, {self._doing_now()}"
                )
            self._ledger.settle(is_end=True)
            return self._report()
        finally:
            self.is_cleaning_up = True
            try:
                self._clean_up()
            finally:
                if self._guard is not None:
                    self._guard.close()

    def _call_and_rest(self) -> None:
        self._now(
            "waiting until all call", lambda: [c.name for c in self._callers if not c.is_calling]
        )
        self._go()
        # However long a large model takes to load, its time begins with the calls.
        if not self._wait(self._all_call, _START_LIMIT_S):
            self._ledger.hang("callers", f"not all call within {_START_LIMIT_S:g} s")
        start = time.monotonic()
        end = start + self._seconds
        round_s = min(_ROUND_S[1], max(_ROUND_S[0], self._seconds / _ROUNDS))
        schedule = faults(self._seed)
        fault, injected_s = next(schedule), 0.0
        is_quiet = False
        while time.monotonic() < end and not self._is_stopped:
            begin = time.monotonic()
            self._injector.spares_callers = is_quiet
            self._now("calling")
            while time.monotonic() < min(begin + round_s, end) and not self._is_stopped:
                while fault.at_s <= injected_s + time.monotonic() - begin:
                    self._injector.inject(fault)
                    fault = next(schedule)
                self._step()
            injected_s += time.monotonic() - begin
            if self._rest():
                self._now("looking for leaks")
                self._inspection.look(self._workers, self._callers, is_quiet)
            # In every other round, so that what a caller held before can be compared.
            is_quiet = not is_quiet
            if time.monotonic() < end and not self._is_stopped:
                self._go()
        if time.monotonic() - start >= _COMPARED_IN_S:
            self._look_at_comparisons()

    def _look_at_comparisons(self) -> None:
        for each in (*self._workers, *self._callers):
            is_often_ended = each in self._workers and not each.is_kept
            if not (is_often_ended or self._inspection.compared[each.role]):
                self._ledger.failure(
                    f"nothing is known of leaks in {each.role!r}: never compared in "
                    f"{self._inspection.rests} rests"
                )

    def _all_call(self) -> bool:
        return self._is_stopped or all(caller.is_calling for caller in self._callers)

    def _all_serve(self) -> bool:
        return all(
            worker.is_ready or worker.n_bad_ends >= _MOST_BAD_ENDS for worker in self._workers
        )

    def _go(self) -> None:
        """Let all callers call that are there; others do once they are."""
        self._is_round = True
        for caller in self._callers:
            caller.go()

    def _rest(self) -> bool:
        """Let everything come to an end; False when something does not, which is a hang."""
        self._now("ending what stands still, and attacks")
        self._injector.end_all()
        self._now(
            "waiting until all workers are ready",
            lambda: [worker.name for worker in self._workers if not worker.is_ready],
        )
        # Calls that are on their way should find a worker.
        if not self._wait(self._all_serve, _START_LIMIT_S):
            self._ledger.hang("workers", f"not all are ready within {_START_LIMIT_S:g} s")
        self._now(
            "waiting until all calls end",
            lambda: [c.name for c in self._callers if not c.is_resting],
        )
        self._is_round = False
        for caller in self._callers:
            caller.say("rest")
        is_resting = self._wait(
            lambda: all(each.is_resting and not each.is_new for each in self._callers),
            _REST_LIMIT_S,
        )
        for caller in self._callers:
            if not caller.is_resting:
                self._give_up(caller, f"calls do not end within {_REST_LIMIT_S:g} s")
        return is_resting

    # --- the beginning and the end --------------------------------------------------------

    def _begin(self) -> None:
        self._check_folder()
        self._folder.mkdir(0o700)
        self._guard = Guard(self._run, str(self._folder))
        self._now("making the calls and their results")
        self._layers = _choose_layers(self._model)
        loaded = checkpoint.load(self._model, self._layers).layers
        cases = pool.draw(loaded, self._seed, coarsest=_coarsest_of_settings())
        pool.save(cases, self._folder / "cases.npz")
        self._now("starting workers")
        options = ["--model", self._model, "--device", self._device, "--threads", "1"]
        options += ["--layers", ",".join(map(str, self._layers))]
        for name, is_kept in (("kept worker", True), ("worker", False)):
            worker = Worker(name, is_kept, self._folder, options, self._environment)
            worker.start()
            self._workers.append(worker)
        for worker in self._workers:
            if not self._wait(lambda: worker.is_ready or not worker.pid, _START_LIMIT_S):  # noqa: B023
                raise ConnectError(f"a worker was not ready within {_START_LIMIT_S:g} s")
            if not worker.pid:
                raise ConnectError(f"a worker ended before it was ready: {worker.last_words()}")
        if self._device == "cpu":  # a GPU's driver opens fds as it goes
            self._inspection.know_worker(self._workers[0])
        for number in range(self._n_callers):
            role = ROLES[number % len(ROLES)]
            caller = CallerProcess(number, role, number == 0, self._folder)
            self._start_caller(caller)
            self._callers.append(caller)

    def _check_folder(self) -> None:
        """Callers' workers have the longest paths; a socket's is not to be longer."""
        try:
            session.parse_address(f"unix:{self._folder / 'moeshm-worker-12345678' / 'worker.sock'}")
        except SettingError as error:
            raise SettingError(
                f"TMPDIR={tempfile.gettempdir()!r} is too long for the sockets in it ({error}); "
                "set it to a shorter one, like /tmp"
            ) from error

    def _end(self) -> None:
        """Everything ends in good order."""
        processes = (*self._callers, *self._workers)
        self._now("ending all processes", lambda: [each.name for each in processes if each.pid])
        for caller in self._callers:
            caller.why_gone = "the end"
            caller.hang_up()
        self._wait_until_gone(self._callers)
        self._hear()
        # Not before: callers may still be opening clients of them.
        for worker in self._workers:
            worker.signal(signal.SIGTERM, "the end")
        self._wait_until_gone(self._workers)
        self._inspection.look_at_end()

    def _wait_until_gone(self, processes: Sequence[Process]) -> None:
        for process in processes:
            is_there = process.pid
            status = process.wait(END_LIMIT_S)
            if status is None and is_there:
                self._ledger.hang(process.name, f"told to end, it runs on: {_why(process)}")
            elif status:
                self._ended_badly(process, status)

    def _clean_up(self) -> None:
        self._injector.end_all()
        end_all(self._run)
        for process in (*self._callers, *self._workers):
            process.wait(END_LIMIT_S)
            process.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start_caller(self, caller: CallerProcess) -> None:
        caller.start(
            Order(
                role=caller.role,
                seed=next(self._seeds),
                model=self._model,
                device=self._device,
                layers=self._layers,
                cases=str(self._folder / "cases.npz"),
                addresses={worker.name: worker.address for worker in self._workers},
                own=caller.own,
                threads=THREADS,
            ),
            self._environment,
        )
        if self._is_round:
            caller.go()

    # --- a moment -------------------------------------------------------------------------

    def _step(self) -> None:
        """Hear everyone, look after them, and do what is due."""
        select.select([caller for caller in self._callers if caller.fileno() >= 0], [], [], _STEP_S)
        self._hear()
        now = time.monotonic()
        for caller in self._callers:
            self._look_after_caller(caller, now)
        for worker in self._workers:
            self._look_after_worker(worker)
        self._injector.step()
        self._ledger.settle()
        if now - self._noticed > _NOTICE_S:
            self._noticed = now
            self._inspection.notice()
        if now - self._shown > _SHOW_S:
            self._show_moment()

    def _now(self, doing: str, awaited: Callable[[], list[str]] = list) -> None:
        """What it does from now on, which may take long, and for whom it waits."""
        self._doing, self._awaited = doing, awaited
        self._show_moment()

    def _show_moment(self) -> None:
        self._shown = time.monotonic()
        self._show(self._report(), self._doing_now())

    def _doing_now(self) -> str:
        names = ", ".join(self._awaited())
        return f"{self._doing}: {names}" if names else self._doing

    def _hear(self) -> None:
        for caller in self._callers:
            for message in caller.hear():
                if isinstance(message, Resting):
                    caller.is_resting = True
                elif isinstance(message, Ready):
                    caller.is_calling = True
                else:
                    self._ledger.told(caller.name, message)

    def _look_after_caller(self, caller: CallerProcess, now: float) -> None:
        status = caller.status()
        if status is not None:
            if not caller.why_gone:
                self._ended_badly(caller, status)
            self._start_caller(caller)
        elif not (caller.is_stopped or caller.why_gone) and now - caller.heard > _SILENCE_S:
            self._give_up(caller, f"it says nothing for {_SILENCE_S:g} s")

    def _give_up(self, caller: CallerProcess, why: str) -> None:
        """A hang: what its threads do then is among its last words."""
        caller.signal(signal.SIGABRT, why)
        caller.wait(END_LIMIT_S)
        self._ledger.hang(caller.name, f"{why}: {_why(caller)}")
        self._start_caller(caller)

    def _look_after_worker(self, worker: Worker) -> None:
        status = worker.status()
        if status is not None:
            if not worker.why_gone or (worker.why_gone == "SIGTERM" and status):
                self._ended_badly(worker, status)
            if worker.cause is None:
                worker.cause = self._ledger.cause(worker.name, "", time.monotonic(), None)
            if self._callers:  # else it never was ready
                worker.start()
        elif worker.look() and worker.cause is not None:
            worker.cause.end = time.monotonic()
            worker.cause = None

    def _ended_badly(self, process: Process, status: int) -> None:
        process.n_bad_ends += 1
        if process.n_bad_ends >= _MOST_BAD_ENDS:
            self.stop()
        self._ledger.unexpected += 1
        self._ledger.failure(f"{process.name} ended with status {status}: {_why(process)}")

    def _wait(self, is_done: Callable[[], bool], limit_s: float) -> bool:
        """Step until then; False when it takes too long."""
        deadline = time.monotonic() + limit_s
        while not is_done():
            if time.monotonic() > deadline:
                return False
            self._step()
        return True

    def _report(self) -> Report:
        elapsed_s = time.monotonic() - self._start
        each = self._inspection
        compared = {role: each.compared[role] for role in dict.fromkeys(self._roles())}
        growth = each.growth_bytes()
        return report_of(self._ledger, self._seed, elapsed_s, each.rests, compared, growth)

    def _roles(self) -> list[str]:
        return [process.role for process in (*self._workers, *self._callers)]


def _choose_layers(model: str) -> tuple[int, ...]:
    numbers = sorted(checkpoint.load(model).layers)
    if len(numbers) <= MOST_LAYERS:
        return tuple(numbers)
    last = len(numbers) - 1
    return tuple(numbers[last * n // (MOST_LAYERS - 1)] for n in range(MOST_LAYERS))


def _coarsest_of_settings() -> DType:
    """A format that rows may be rounded to besides those that calls name."""
    current = settings.current()
    if current.tolerance:
        return DType.BF16
    return DType.F32 if current.wire_dtype == "auto" else DType.parse(current.wire_dtype)


def _why(process: Process) -> str:
    return f"its last words are: {process.last_words() or 'none'}"
