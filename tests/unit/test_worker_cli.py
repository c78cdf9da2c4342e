"""`moeshm worker`: what it serves, what it says, and what it refuses."""

from __future__ import annotations

import grp
import json
import os
import pty
import re
import resource
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import moeshm
from moeshm.backends.cpu import CpuBackend
from moeshm.checkpoint import load
from moeshm.demo import tiny_moe_path
from tests.crash.processes import NotifySocket, Pipe, Process, running

MODEL = str(tiny_moe_path())
HIDDEN_SIZE, TOP_K, NUM_EXPERTS = 128, 4, 16


@pytest.fixture
def notify(tmp_path: Path) -> Iterator[NotifySocket]:
    """Where a worker says that it is ready."""
    opened = NotifySocket(tmp_path / "notify")
    yield opened
    opened.close()


def command(folder: Path, *options: str, model: str = MODEL) -> list[str]:
    """A worker of the bundled model that listens in the folder."""
    address = f"unix:{folder / 'w.sock'}"
    return ["-m", "moeshm", "worker", "--model", model, "--listen", address, *options]


def run_to_end(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit status and standard error of a worker that does not come to serve."""
    with running(arguments) as process:
        said = process.log.read_rest()
        assert process.output.read_rest() == ""
        return process.wait(), said


def end(process: Process, number: signal.Signals = signal.SIGTERM) -> str:
    """Let it drain; the rest of its log."""
    process.signal(number)
    assert process.wait() == 0
    return process.log.read_rest()


# --- what it serves -----------------------------------------------------------------------


def test_it_serves_the_whole_model(tmp_path: Path, notify: NotifySocket) -> None:
    with running(command(tmp_path, "--threads", "1"), environment=notify.environment) as process:
        assert notify.receive(process) == "READY=1"
        path = tmp_path / "w.sock"
        assert path.stat().st_mode & 0o777 == 0o600
        checkpoint = load(MODEL).layers
        with moeshm.connect(f"unix:{path}") as client:
            assert client.worker_pid == process.pid
            assert client.layers == {n: layer.info for n, layer in checkpoint.items()}
            rng = np.random.default_rng(3)
            hidden_states = rng.standard_normal((5, HIDDEN_SIZE)).astype(np.float32)
            ids = rng.integers(0, NUM_EXPERTS, (5, TOP_K), dtype=np.int32)
            weights = rng.random((5, TOP_K), dtype=np.float32)
            expected = np.empty_like(hidden_states)
            CpuBackend(checkpoint, 1).ffn(2, hidden_states, ids, weights, expected)
            result = client.compute(2, hidden_states, ids, weights)
            np.testing.assert_array_equal(result, expected)
        process.signal(signal.SIGTERM)
        assert notify.receive(process) == "STOPPING=1"
        assert process.wait() == 0
        log = process.log.read_rest()
        assert not path.exists()
    lines = log.splitlines()
    assert [line for line in lines if "layer 3 loaded (4 of 4)" in line]
    assert [line for line in lines if "4 layers, 64 experts" in line and "with 1 threads" in line]
    assert [line for line in lines if f"listening at unix:{path}" in line]
    assert [line for line in lines if f"process {os.getpid()}: session ended after 1 calls" in line]


def test_layers_and_experts_choose_what_it_holds(tmp_path: Path, notify: NotifySocket) -> None:
    experts = tmp_path / "experts.json"
    experts.write_text('{"1": "0-2,9", "3": [7, 5]}')
    with running(
        command(tmp_path, "--experts", str(experts), "--quiet"), environment=notify.environment
    ) as process:
        assert notify.receive(process) == "READY=1"
        with moeshm.connect(f"unix:{tmp_path / 'w.sock'}") as client:
            held = {number: info.experts for number, info in client.layers.items()}
            assert held == {1: (0, 1, 2, 9), 3: (7, 5)}
        # --quiet: nothing to warn of.
        assert end(process) == ""


@pytest.mark.parametrize(("layers", "held"), [("0-1,3", [0, 1, 3]), ("2", [2])])
def test_layers(tmp_path: Path, notify: NotifySocket, layers: str, held: list[int]) -> None:
    with running(command(tmp_path, "--layers", layers), environment=notify.environment) as process:
        assert notify.receive(process) == "READY=1"
        with moeshm.connect(f"unix:{tmp_path / 'w.sock'}") as client:
            assert list(client.layers) == held
        end(process)


@pytest.fixture
def no_cupy(tmp_path: Path) -> dict[str, str]:
    """An environment in which CuPy cannot be imported, whether it is installed or not."""
    (tmp_path / "cupy.py").write_text("raise ImportError('none for this test')")
    return {"PYTHONPATH": str(tmp_path)}


def test_auto_is_the_cpu_where_there_is_no_gpu(
    tmp_path: Path, notify: NotifySocket, no_cupy: dict[str, str]
) -> None:
    environment = {**notify.environment, **no_cupy}
    with running(command(tmp_path, "--device", "auto"), environment=environment) as process:
        assert notify.receive(process) == "READY=1"
        with moeshm.connect(f"unix:{tmp_path / 'w.sock'}") as client:
            assert client.layers.keys() == {0, 1, 2, 3}
        log = end(process)
    assert "device auto is the CPU: no CuPy for device auto (none for this test)" in log
    assert "MiB on cpu with" in log


@pytest.mark.parametrize("device", ["cuda:0", "hip:1"])
def test_a_gpu_without_cupy(tmp_path: Path, device: str, no_cupy: dict[str, str]) -> None:
    with running(command(tmp_path, "--device", device), environment=no_cupy) as process:
        said = process.log.read_rest()
        assert process.wait() == 1
    assert said.startswith(
        f"moeshm: no CuPy for device {device} (none for this test); pip install "
    )
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_with_status_0(
    tmp_path: Path, notify: NotifySocket, number: signal.Signals
) -> None:
    with running(command(tmp_path), environment=notify.environment) as process:
        assert notify.receive(process) == "READY=1"
        log = end(process, number)
        assert f"{number.name}: draining" in log
        assert not (tmp_path / "w.sock").exists()


# --- what it says -------------------------------------------------------------------------


def test_json_logs_are_one_object_a_line(tmp_path: Path, notify: NotifySocket) -> None:
    with running(command(tmp_path, "--json-logs"), environment=notify.environment) as process:
        assert notify.receive(process) == "READY=1"
        with moeshm.connect(f"unix:{tmp_path / 'w.sock'}"):
            pass
        records = [json.loads(line) for line in end(process).splitlines()]
    assert len(records) > 6
    assert {tuple(sorted(record)) for record in records} == {
        ("level", "logger", "message", "pid", "time")
    }
    assert {record["pid"] for record in records} == {process.pid}
    assert any("layer 0 loaded" in record["message"] for record in records)


def test_a_terminal_shows_a_bar_instead_of_lines(tmp_path: Path, notify: NotifySocket) -> None:
    controller, terminal = pty.openpty()
    try:
        with running(
            command(tmp_path),
            environment={**notify.environment, "TERM": "xterm", "COLUMNS": "100"},
            stderr=terminal,
        ) as process:
            os.close(terminal)
            terminal = -1
            assert notify.receive(process) == "READY=1"
            process.signal(signal.SIGTERM)
            shown = Pipe(controller).read_rest()
            assert process.wait() == 0
    finally:
        os.close(controller)
        if terminal >= 0:
            os.close(terminal)
    assert "100%" in shown
    assert "\x1b[" in shown
    assert "loaded (" not in shown
    assert "listening at" in shown


# --- what it refuses ----------------------------------------------------------------------


def test_a_bad_model_directory_is_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    status, said = run_to_end(command(tmp_path, model=str(empty)))
    assert status == 1
    (line,) = said.splitlines()
    assert line.startswith("moeshm: ")
    assert str(empty) in line
    assert not (tmp_path / "w.sock").exists()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (("--device", "abacus"), 2, "'abacus' is not cpu, auto, cuda:N or hip:N"),
        (("--device", "cuda:"), 2, "'cuda:' is not cpu, auto, cuda:N or hip:N"),
        (("--layers", "0-x"), 2, "'0-x' .* no number or range like 0-23"),
        (("--layers", "3-1"), 2, "'3-1' .* counts down; write 1-3"),
        (("--layers", "0-9"), 1, "layers 4, 5, 6, 7, 8, 9 .*0-3"),
        (("--threads", "0"), 2, "0 is not in the range x>=1"),
        (("--threads", "some"), 2, "'some' is not a valid integer"),
        (("--experts", "/nowhere.json"), 1, "/nowhere.json.*write it like"),
        (("--group", "no-such-group"), 1, "--group 'no-such-group': there is no such group here"),
        (("--bogus",), 2, "No such option.*--bogus"),
    ],
)
def test_bad_options_name_the_value_and_what_is_allowed(
    tmp_path: Path, options: tuple[str, ...], status: int, message: str
) -> None:
    found, said = run_to_end(command(tmp_path, *options))
    assert found == status, said
    assert "Traceback" not in said
    assert re.search(message, said, re.DOTALL), said


def test_experts_that_the_model_lacks(tmp_path: Path) -> None:
    experts = tmp_path / "experts.json"
    experts.write_text('{"1": "0-16"}')
    status, said = run_to_end(command(tmp_path, "--experts", str(experts)))
    assert status == 1
    assert "layer 1 has no expert 16; its experts are 0-15" in said
    assert len(said.splitlines()) == 1


def test_a_group_owns_the_socket(tmp_path: Path, notify: NotifySocket) -> None:
    gid = os.getegid()
    options = ("--group", grp.getgrgid(gid).gr_name)
    with running(command(tmp_path, *options), environment=notify.environment) as process:
        assert notify.receive(process) == "READY=1"
        found = (tmp_path / "w.sock").stat()
        assert (found.st_mode & 0o777, found.st_gid) == (0o660, gid)
        moeshm.connect(f"unix:{tmp_path / 'w.sock'}").close()
        end(process)


def test_a_folder_that_everybody_may_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    status, said = run_to_end(command(tmp_path, "--quiet"))
    assert status == 1
    (line,) = said.splitlines()
    assert f"cannot listen in {tmp_path}: it may be written by every user" in line
    assert "choose a folder of your own" in line
    assert os.listdir(tmp_path) == []


def test_a_limit_that_is_none(tmp_path: Path) -> None:
    with running(command(tmp_path), environment={"MOESHM_MAX_SESSIONS": "0"}) as process:
        said = process.log.read_rest()
        assert process.wait() == 1
    assert said == "moeshm: MOESHM_MAX_SESSIONS=0; it must lie in 1..65536\n"


def test_it_may_open_as_many_files_as_its_sessions_need(
    tmp_path: Path, notify: NotifySocket
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 600), hard))
    try:
        with running(command(tmp_path), environment=notify.environment) as process:
            assert notify.receive(process) == "READY=1"
            allowed, _ = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
            log = end(process)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if hard == resource.RLIM_INFINITY or hard > 256 * 8:
        assert allowed > 256 * 6
    else:
        assert "open files are allowed" in log


def test_an_address_of_another_kind(tmp_path: Path) -> None:
    status, said = run_to_end(
        ["-m", "moeshm", "worker", "--model", MODEL, "--listen", "tcp:127.0.0.1:9", "--quiet"]
    )
    assert status == 1
    assert said == "moeshm: address 'tcp:127.0.0.1:9'; write unix:PATH\n"
    assert os.listdir(tmp_path) == []


def test_a_bad_setting_in_the_environment(tmp_path: Path) -> None:
    with running(command(tmp_path), environment={"MOESHM_TIMEOUT_S": "soon"}) as process:
        said = process.log.read_rest()
        assert process.wait() == 1
    assert said == "moeshm: MOESHM_TIMEOUT_S='soon' is not a number\n"


def test_a_path_in_use_by_a_live_worker(tmp_path: Path, notify: NotifySocket) -> None:
    with running(command(tmp_path), environment=notify.environment) as process:
        assert notify.receive(process) == "READY=1"
        status, said = run_to_end(command(tmp_path, "--quiet"))
        assert status == 1
        (line,) = said.splitlines()
        assert str(tmp_path / "w.sock") in line
        assert "a live process listens" in line
        assert "choose another path" in line
        # The first has not noticed.
        moeshm.connect(f"unix:{tmp_path / 'w.sock'}").close()
        end(process)


def test_a_stale_socket_is_replaced(tmp_path: Path, notify: NotifySocket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(tmp_path / "w.sock"))
        dead.listen()
    with running(command(tmp_path), environment=notify.environment) as process:
        assert notify.receive(process) == "READY=1"
        moeshm.connect(f"unix:{tmp_path / 'w.sock'}").close()
        end(process)


def test_a_worker_that_was_started_for_a_process_that_is_gone(tmp_path: Path) -> None:
    status, said = run_to_end(command(tmp_path, "--until-exit-of", "1", "--quiet"))
    assert status == 1
    assert "process 1, for which this worker was started, is gone" in said
