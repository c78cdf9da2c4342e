"""One side of a crash matrix with one transport: who survives, and shots at those who do not.

`python -m tests.crash.matrix.stage SIDE TRANSPORT` takes a shot a line, as JSON, and says what came
of it.
"""

from __future__ import annotations

import abc
import contextlib
import json
import logging
import os
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec

from moeshm import daemon as daemons
from moeshm import reconnect, settings
from moeshm.transport import stream
from tests import leaks
from tests.crash.matrix import callers, steps
from tests.crash.matrix.backend import MatrixBackend, load_experts
from tests.crash.matrix.callers import Play, Played, seeded
from tests.crash.matrix.plan import Plan
from tests.crash.matrix.players import Hang, Player, fork, resident_bytes
from tests.crash.matrix.shots import LIGHT, Hit, Load, Shot
from tests.crash.processes import PATIENCE_S, mapped_rings, open_fds

#: Of calls whose worker stands still.
SHORT_S = 0.15
LONG_S = 60.0
#: Coarsely, a survivor's last call after the fault: far below LONG_S.
SOON_S = 10.0
#: Rounds, at most, until a point is reached so often.
MOST_ROUNDS = 400
#: After so many rounds, a worker that has not crashed yet is told to shut down.
ROUNDS_TO_SHUTDOWN = 2
#: What a survivor may grow by over all shots, coarsely.
MOST_GROWTH = 32 << 20


class Stage(abc.ABC):
    """What both sides share; one shot after the other."""

    side = ""

    def __init__(self, folder: Path, transport: str) -> None:
        self.transport = transport
        self.other = "stream" if transport == "shared" else "shared"
        self.address = f"unix:{folder / 'w.sock'}"
        self.points = steps.points(self.side, transport)
        self.plan = Plan()
        self.counts: dict[str, int] = {}
        self._notify = os.pipe()
        self.problems: list[str] = []
        self.tally: Counter[str] = Counter()

    def shoot(self, shot: Shot) -> Hit:
        """Let it happen, and look at everybody afterwards."""
        self.problems, self.tally = [], Counter()
        number = self.points[shot.point]
        nth = shot.nth or max(2, self.counts[shot.point] // 2)
        self.plan.arm(number, nth, getattr(signal, f"SIG{shot.signal}"), self._notify[1])
        hit = Hit(nth, self.problems, {})
        self._shoot(shot, hit)
        hit.was_reached = self.plan.has_fired
        while select.select([self._notify[0]], [], [], 0)[0]:
            os.read(self._notify[0], 1)
        self.problems += [f"{n} times {what}" for what, n in self.tally.items() if "wrong" in what]
        hit.tally = dict(self.tally)
        return hit

    @abc.abstractmethod
    def _shoot(self, shot: Shot, hit: Hit) -> None:
        """Let it happen, and note what came of it."""

    # --- parts of shots ---------------------------------------------------------------------

    def fork_worker(self, is_victim: bool) -> Player:
        """One that listens when it has said so."""

        def body(pipe: Connection) -> None:
            _prepare()
            if is_victim:
                steps.install("worker", self.transport)
                self.plan.follow()
            daemon = daemons.Daemon(MatrixBackend(), self.address, load=_load)
            if is_victim:
                steps.install_draining(daemon)
            # Told when signals are dealt with, too.
            daemons.notify_systemd = pipe.send  # type: ignore[assignment]
            daemon.run()

        # Also one that is no victim, so that all of them hold the same.
        worker = fork("worker", body, [self._notify[1]])
        assert worker.hear() == "READY=1"
        return worker

    def fork_callers(self, name: str, transports: tuple[str, ...], **is_: bool) -> Player:
        """`is_`: `victim`, `staying`."""

        def body(pipe: Connection) -> None:
            _prepare()
            if is_.get("victim"):
                steps.install("client", self.transport)
                self.plan.follow()
            callers.serve(pipe, self.address, transports, is_.get("staying", False))

        return fork(name, body, [self._notify[1]] if is_.get("victim") else [])

    def wait_for_fault(self, playing: Player, rounds: int, until: float) -> bool:
        """Until the point fires, so many rounds were played, the player's last was, or `until`."""
        while True:
            ready = select.select([self._notify[0], playing.fileno()], [], [], PATIENCE_S)[0]
            if not ready:
                playing.dump()
                raise Hang("no round was played")
            if self._notify[0] in ready:
                return True
            with contextlib.suppress(EOFError):
                said = playing.hear()
                if isinstance(said, int) and said < rounds and time.monotonic() < until:
                    continue
                if isinstance(said, Played):
                    self._last_words = said
            return self.plan.has_fired

    def end_of_play(self, player: Player, has_worker: bool = True) -> Played:
        """What an endless play came to; it is told to stop, or, if it has no worker any more,
        stops by itself."""
        if has_worker:
            player.say("stop")
        while isinstance(said := self._take_last_words() or player.hear(), int):
            pass
        if not has_worker:
            player.say("stop")
        assert isinstance(said, Played)
        self.tally += said.tally
        return said

    _last_words: Played | None = None

    def _take_last_words(self) -> Played | None:
        said, self._last_words = self._last_words, None
        return said

    def play(self, player: Player, load: Load, timeout_s: float) -> Played:
        """One round, which must be right in everything."""
        player.say(Play(load, timeout_s, n_rounds=1))
        played = player.hear()
        assert isinstance(played, Played)
        self.tally += played.tally
        self.all_right(player, played)
        return played

    def all_right(self, player: Player, played: Played) -> None:
        """A problem for each call that was not answered as if there had been no fault."""
        self.problems.extend(
            f"{player.name}: {n} times {what}"
            for what, n in played.tally.items()
            if what not in ("exact", "refused")
        )

    def close_callers(self, player: Player) -> None:
        """Close its clients, which leave nothing."""
        player.say("close")
        if left := player.hear():
            self.problems.append(left)

    def wait_until_freed(self, worker: Player, before: Any) -> float:
        """Until a worker holds no more than before; how long that took."""
        start = time.monotonic()
        while (now := cost(worker)) != before:
            if time.monotonic() > start + SOON_S:
                self.problems.append(f"the worker holds {now}, and should {before}")
                break
            select.select([], [], [], 0.001)
        return time.monotonic() - start

    def end(self, player: Player, status: int = 0) -> None:
        """Wait for its end."""
        found = player.wait()
        if found != status:
            self.problems.append(f"{player.name} ended with {found}")


class ClientStage(Stage):
    """Clients are hit; the worker, and a process with a client of each transport, live on."""

    side = "client"

    def __init__(self, folder: Path, transport: str) -> None:
        super().__init__(folder, transport)
        self.worker = self.fork_worker(is_victim=False)
        self.others = self.fork_callers("bystander", (transport, self.other), staying=True)
        self.play(self.others, Load(), LONG_S)
        self.before = cost(self.worker)
        self._count_points()
        self.memory = self._memory()

    def _memory(self) -> list[int]:
        return [resident_bytes(self.worker.pid), own_bytes(self.others)]

    def _count_points(self) -> None:
        victim = self.fork_callers("victim", (self.transport,), victim=True)
        self.play(victim, Load(), LONG_S)
        self.counts = {name: self.plan.count(number) for name, number in self.points.items()}
        victim.say(None)
        assert not victim.hear()
        self.end(victim)
        self.wait_until_freed(self.worker, self.before)
        assert not self.problems, self.problems

    def _shoot(self, shot: Shot, hit: Hit) -> None:
        load = shot.load
        self.others.say(Play(load, LONG_S))
        victim = self.fork_callers("victim", (self.transport,), victim=True)
        try:
            victim.say(Play(seeded(load, 501), LONG_S))
            self.wait_for_fault(victim, MOST_ROUNDS, time.monotonic() + shot.patience_s)
            self.plan.give_up()
            fired_at = time.monotonic()
            if self.plan.has_fired:
                victim.wait_until_it_stands()
            played = self.end_of_play(self.others)
            self.all_right(self.others, played)
            # And as if nobody had been there.
            played = self.play(self.others, seeded(LIGHT, load.seed), LONG_S)
            hit.ended_after_s = played.ended_at - fired_at
            if played.n_reconnects:
                self.problems.append("a bystander had to connect anew")
            if shot.signal == "KILL" and self.plan.has_fired:
                self.end(victim, -signal.SIGKILL)
            else:
                victim.signal(signal.SIGCONT)
                self.all_right(victim, self.end_of_play(victim))
                victim.say(None)
                if left := victim.hear():
                    self.problems.append(left)
                self.end(victim)
            hit.freed_after_s = self.wait_until_freed(self.worker, self.before)
        finally:
            victim.kill()

    def finish(self) -> list[str]:
        """Problems of all the shots together."""
        self.problems = []
        grown = [n - before for n, before in zip(self._memory(), self.memory, strict=True)]
        if max(grown) > MOST_GROWTH:
            self.problems.append(f"worker and bystander grew by {grown} bytes")
        self.others.say(None)
        if left := self.others.hear():
            self.problems.append(left)
        self.end(self.others)
        self.worker.signal(signal.SIGTERM)
        self.end(self.worker)
        return self.problems


class WorkerStage(Stage):
    """Workers are hit; two processes with clients live on."""

    side = "worker"

    def __init__(self, folder: Path, transport: str) -> None:
        super().__init__(folder, transport)
        self.worker = self.fork_worker(is_victim=True)
        self.callers = [
            self.fork_callers("caller", (transport,)),
            self.fork_callers(f"caller by {self.other}", (self.other,)),
        ]
        self._count_points()
        self.memory = [own_bytes(each) for each in self.callers]

    def _count_points(self) -> None:
        for each in self.callers:
            self.play(each, Load(), LONG_S)
        self.before = None
        self.wait_until_idle()
        self.before = cost(self.worker)
        self._shut_down()
        self.counts = {name: self.plan.count(number) for name, number in self.points.items()}
        assert not self.problems, self.problems

    def wait_until_idle(self) -> None:
        """Until the worker has no session."""
        start = time.monotonic()
        while mapped_rings(self.worker.pid) or len(os.listdir(_tasks(self.worker))) > 1:
            if time.monotonic() > start + SOON_S:
                raise Hang("the worker keeps sessions")
            select.select([], [], [], 0.001)

    def _shut_down(self) -> None:
        self.worker.signal(signal.SIGTERM)
        self.end(self.worker)

    def _shoot(self, shot: Shot, hit: Hit) -> None:
        is_kill = shot.signal == "KILL"
        timeout_s = LONG_S if is_kill else SHORT_S
        until = time.monotonic() + shot.patience_s
        while not self.plan.has_fired and time.monotonic() < until:
            if self._play_until_fault(shot, timeout_s, hit) or self.problems:
                break
        if is_kill and self.plan.has_fired:
            self.end(self.worker, -signal.SIGKILL)
        elif self.plan.has_fired:
            self.worker.signal(signal.SIGCONT)
        is_shutdown = shot.point.startswith("shutdown.") or self._was_told
        if not is_kill and is_shutdown:
            self.end(self.worker)
        if is_kill or is_shutdown:
            self.worker = self.fork_worker(is_victim=False)
            for each in self.callers:
                each.say("notice")
                assert each.hear() == "noticed"
        for each in self.callers:
            self.play(each, seeded(LIGHT, shot.load.seed), LONG_S)
            self.close_callers(each)
        hit.freed_after_s = self.wait_until_freed(self.worker, self.before)
        self._shut_down()

    def _play_until_fault(self, shot: Shot, timeout_s: float, hit: Hit) -> bool:
        """Start a worker, let it be called, tell it to shut down; True when it was hit."""
        self._was_told = False
        self.worker = self.fork_worker(is_victim=True)
        first, second = self.callers
        for n, each in enumerate(self.callers):
            each.say(Play(seeded(shot.load, 77 * n), timeout_s))
        if not self.wait_for_fault(first, ROUNDS_TO_SHUTDOWN, time.monotonic() + PATIENCE_S):
            self._was_told = True
            self.worker.signal(signal.SIGTERM)
            select.select([self._notify[0], self.worker._pidfd], [], [], PATIENCE_S)
        has_fired = self.plan.has_fired
        fired_at = time.monotonic()
        if has_fired:
            self.worker.wait_until_it_stands()
        played = [self.end_of_play(each, has_worker=False) for each in (first, second)]
        hit.ended_after_s = max(each.ended_at for each in played) - fired_at
        if hit.ended_after_s > SOON_S:
            self.problems.append(f"the last call ended {hit.ended_after_s:.1f} s after the fault")
        if not has_fired:
            self.end(self.worker)
            for each in self.callers:
                self.close_callers(each)
        return has_fired

    def finish(self) -> list[str]:
        """Problems of all the shots together."""
        self.problems = []
        now = [own_bytes(each) for each in self.callers]
        grown = [n - before for n, before in zip(now, self.memory, strict=True)]
        if max(grown) > MOST_GROWTH:
            self.problems.append(f"callers grew by {grown} bytes")
        for each in self.callers:
            each.say(None)
            if left := each.hear():
                self.problems.append(left)
            self.end(each)
        return self.problems


def _load(experts: Any) -> Any:
    # Looked up anew: it may be wrapped.
    return sys.modules[load_experts.__module__].load_experts(experts)


def _prepare() -> None:
    """A process of the matrix: what it writes to the log is not wanted, and rooms are small, so
    that they are often full."""
    logging.disable(logging.CRITICAL)
    stream._SOCKET_BYTES = 32 << 10
    reconnect.FIRST_PAUSE_S = 0.0
    os.environ.setdefault("MOESHM_SPIN_US", "0")
    settings.current.cache_clear()


def cost(player: Player) -> tuple[list[str], int]:
    """What sessions cost a worker."""
    return open_fds(player.pid), mapped_rings(player.pid)


def own_bytes(caller: Player) -> int:
    """Memory that a caller cannot give back."""
    caller.say("memory")
    n_bytes = caller.hear()
    assert isinstance(n_bytes, int)
    return n_bytes


def _tasks(player: Player) -> str:
    return f"/proc/{player.pid}/task"


def main() -> None:
    """Shots from standard input, until an empty line. Says first the points' names and counts, and
    last what all of them left."""
    side, transport = sys.argv[1:3]
    os.environ[leaks.RUN_VARIABLE] = os.environ.get(leaks.RUN_VARIABLE, f"{os.getpid()}-matrix")
    before = leaks.take_snapshot()
    with tempfile.TemporaryDirectory() as folder:
        stage = (ClientStage if side == "client" else WorkerStage)(Path(folder), transport)
        print(json.dumps(stage.counts), flush=True)
        for line in iter(sys.stdin.readline, "\n"):
            hit = stage.shoot(msgspec.json.decode(line, type=Shot))
            print(msgspec.json.encode(hit).decode(), flush=True)
        problems = stage.finish()
    os.close(stage._notify[0])
    os.close(stage._notify[1])
    print(json.dumps(problems + leaks.find_leaks(before)), flush=True)


if __name__ == "__main__":
    main()
