"""`moeshm soak` through the command line: a short run, one that finds something, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from moeshm import process
from moeshm.cli.soak import _ended_by_signals, soak
from moeshm.demo import tiny_moe_path
from moeshm.errors import CheckpointError, SettingError
from moeshm.soak import leaks, pool
from moeshm.soak.director import Soak
from moeshm.soak.pool import Case

ROOT = Path(__file__).parents[2]
#: Where nothing hangs, also on a machine whose CPUs are busy with others' work.
PATIENCE_S = 150.0


def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(soak, ["--json", *arguments])
    # Before it are lines about the moment, with a click that has one output for both.
    printed: dict[str, Any] = msgspec.json.decode(result.stdout.splitlines()[-1])
    print(printed)
    return result.exit_code, printed


@pytest.fixture
def folder(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For temporary files, sockets among them."""
    monkeypatch.setattr("tempfile.tempdir", str(short_folder))
    return short_folder


def wait_until(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of_the_run(soak: int) -> list[int]:
    mark = leaks.RUN_VARIABLE.encode()
    return [
        pid for pid in leaks.children_of(soak) if mark in Path(f"/proc/{pid}/environ").read_bytes()
    ]


def test_a_short_run_finds_nothing(folder: Path) -> None:
    status, printed = run("--minutes", "0.1", "--seed", "5")
    assert printed["failures"] == []
    assert status == 0
    assert printed["wrong_results"] == printed["leaks"] == printed["hangs"] == 0
    assert printed["unexpected_errors"] == 0
    assert printed["calls"] > 0
    assert printed["checked"] > 0
    assert printed["faults"] == sum(printed["faults_by_kind"].values()) > 0
    assert printed["rests"] > 0
    assert isinstance(printed["deadline_misses"], int)
    assert list(folder.iterdir()) == []


def test_a_wrong_result_is_found_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*arguments: Any, **options: Any) -> Sequence[Case]:
        cases = real_draw(*arguments, **options)
        for case in cases:
            case.expected[...] = np.roll(case.expected, 1)
        return cases

    real_draw = pool.draw
    monkeypatch.setattr(pool, "draw", draw)
    result = CliRunner().invoke(soak, ["--minutes", "0.05", "--seed", "6", "--clients", "1"])
    assert result.exit_code == 1
    assert "wrong result of" in result.stdout
    assert "rows are wrong" in result.stdout
    assert "s before:" in result.stdout


def test_ctrl_c_ends_it_with_what_was_found() -> None:
    command = [sys.executable, "-m", "moeshm", "soak", "--minutes", "60", "--json"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        try:
            deadline = time.monotonic() + PATIENCE_S
            # Two workers, three callers, and the guard.
            while len(leaks.children_of(running.pid)) < 6:
                assert running.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            running.send_signal(signal.SIGINT)
            stdout, stderr = running.communicate(timeout=PATIENCE_S)
        finally:
            running.kill()
    assert b"SIGINT: ending" in stderr
    printed = msgspec.json.decode(stdout)
    assert printed["failures"] == []
    assert running.returncode == (0 if printed["calls"] else 1)
    assert printed["elapsed_s"] < 60 * 60


def test_it_tells_whom_it_waits_for() -> None:
    told = []
    run = Soak(tiny_moe_path(), 1.0, 1, show=lambda _report, doing: told.append(doing))
    run._now("calling")
    run._now("waiting until all calls end", lambda: ["caller 0", "caller 2"])
    assert told == ["calling", "waiting until all calls end: caller 0, caller 2"]


def test_a_second_ctrl_c_ends_it_at_once_and_still_tells_what_was_found() -> None:
    command = [sys.executable, "-m", "moeshm", "soak", "--minutes", "60", "--json"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        try:
            wait_until(lambda: len(processes_of_the_run(running.pid)) == 5)
            # A caller that stands still does not come to rest, and the run not to its end.
            os.kill(processes_of_the_run(running.pid)[-1], signal.SIGSTOP)
            running.send_signal(signal.SIGINT)
            assert running.stderr is not None
            told: list[bytes] = []
            while not told or b"SIGINT: ending" not in told[-1]:
                told.append(running.stderr.readline())
                assert told[-1]
            running.send_signal(signal.SIGINT)
            stdout, _ = running.communicate(timeout=PATIENCE_S)
        finally:
            running.kill()
    assert running.returncode == 1
    (failure,) = msgspec.json.decode(stdout)["failures"]
    assert "it was ended at once by a second signal, " in failure
    # Nobody watches: it tells of itself by the line.
    assert b"0 calls" in told[0]
    assert told[0].endswith(b"; making the calls and their results\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_soak_that_is_ended_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "moeshm", "soak", "--minutes", "60"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        try:
            # Two workers and three callers; not those that are about to be what they will be.
            wait_until(lambda: len(processes_of_the_run(running.pid)) == 5)
            children = processes_of_the_run(running.pid)
            if number == signal.SIGKILL:  # who stands still must end as well
                for pid in children:
                    os.kill(pid, signal.SIGSTOP)
            running.send_signal(number)
            running.communicate(timeout=PATIENCE_S)
        finally:
            running.kill()
    # The folder goes last.
    wait_until(lambda: list(folder.iterdir()) == [])
    assert not any(process.is_alive(pid) for pid in children)


def test_a_clean_up_is_not_interrupted() -> None:
    class Run:
        is_stopped = is_cleaning_up = False

        def stop(self) -> None:
            self.is_stopped = True

    run = Run()
    with _ended_by_signals(run):  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGHUP)
        assert run.is_stopped
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        run.is_cleaning_up = True
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)


def test_options_that_are_refused() -> None:
    refused = [("--minutes", "0"), ("--minutes", "nan"), ("--minutes", "inf")]
    for option, value in [*refused, ("--clients", "0"), ("--device", "tpu")]:
        assert CliRunner().invoke(soak, [option, value]).exit_code == 2


def test_what_cannot_begin_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError):
        CliRunner().invoke(soak, ["--model", "/nowhere"], catch_exceptions=False)
    long = folder / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with pytest.raises(SettingError, match=r"TMPDIR=.* longer than 107 bytes"):
        CliRunner().invoke(soak, [], catch_exceptions=False)
    assert list(long.iterdir()) == []
    long.rmdir()
    assert list(folder.iterdir()) == []
