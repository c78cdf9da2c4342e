"""The systemd unit fits the worker that it starts, and systemd understands it."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeshm import daemon, limits
from moeshm.cli.worker import worker
from moeshm.session import parse_address
from moeshm.settings import Settings
from moeshm.worker import DRAIN_LIMIT_S

FOLDER = Path(__file__).parents[2] / "packaging"
UNIT = FOLDER / "moeshm-worker@.service"
GPU = FOLDER / "gpu.conf"


def read(path: Path) -> dict[str, list[str]]:
    """Its keys, each with the values that it is given."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def unit() -> dict[str, list[str]]:
    """The service's keys."""
    return read(UNIT)


def test_its_command_is_one_that_there_is(unit: dict[str, list[str]]) -> None:
    (command,) = unit["ExecStart"]
    filled = command.replace("%i", "w0").replace("${MODEL}", "/srv/model")
    for options in ("", "--layers 0-23 --json-logs", "--device cuda:0 --resident"):
        program, name, *arguments = shlex.split(filled.replace("$OPTIONS", options))
        assert Path(program).is_absolute()
        assert name == "worker"
        parsed = worker.make_context("moeshm worker", arguments).params
        assert parsed["model"] == "/srv/model"
        assert parsed["group"] == unit["Group"][0]
        path = Path(parse_address(parsed["listen"]))
        # In the folder that systemd makes for it, which the group may enter.
        assert path.parent == Path("/run") / unit["RuntimeDirectory"][0].replace("%i", "w0")
        assert unit["RuntimeDirectoryMode"] == ["0750"]


def test_it_waits_for_what_the_worker_tells_it(unit: dict[str, list[str]]) -> None:
    assert unit["Type"] == ["notify"]
    assert unit["KillMode"] == ["mixed"]
    assert int(unit["TimeoutStopSec"][0]) > max(daemon.DRAIN_TIMEOUT_S, DRAIN_LIMIT_S)
    assert unit["Restart"] == ["on-failure"]
    assert unit["RestartForceExitStatus"] == [str(os.EX_SOFTWARE)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("ProtectSystem", "strict"),
        ("PrivateNetwork", "yes"),
        ("PrivateDevices", "yes"),
        ("RestrictAddressFamilies", "AF_UNIX"),
        ("MemoryDenyWriteExecute", "yes"),
        ("SystemCallFilter", "@system-service"),
        ("UMask", "0077"),
        ("LimitCORE", "0"),
        ("LimitMEMLOCK", "infinity"),
    ],
)
def test_what_it_may_not_do(unit: dict[str, list[str]], key: str, value: str) -> None:
    assert unit[key] == [value]


def test_nothing_hides_who_connects(unit: dict[str, list[str]]) -> None:
    """Under these, clients have no numbers of their own, or memory cannot be looked up."""
    assert not unit.keys() & {"PrivateUsers", "PrivatePIDs", "ProcSubset", "DynamicUser"}


def test_it_may_open_the_files_that_sessions_need(
    unit: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = int(unit["LimitNOFILE"][0])
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert limits.allow_fds(Settings()) == ""


def test_a_gpu_is_let_in() -> None:
    added = read(GPU)
    assert added["PrivateDevices"] == ["no"]
    assert "char-nvidia* rw" in added["DeviceAllow"]
    assert "/dev/kfd rw" in added["DeviceAllow"]
    assert f"CUPY_CACHE_DIR=/var/cache/{added['CacheDirectory'][0]}" in added["Environment"]


def test_the_user_and_the_groups_are_made(unit: dict[str, list[str]]) -> None:
    """With one that is not there systemd starts nothing (216/GROUP); video is its own."""
    lines = (FOLDER / "moeshm.sysusers.conf").read_text().splitlines()
    assert unit["User"] == unit["Group"] == ["moeshm"]
    (groups,) = read(GPU)["SupplementaryGroups"]
    others = [["g", name] for name in groups.split() if name != "video"]
    made = [line.split()[:2] for line in lines if not line.startswith("#")]
    assert made == [["u", "moeshm"], *others]


@pytest.mark.parametrize("has_gpu", [False, True])
def test_systemd_understands_it(tmp_path: Path, has_gpu: bool) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not here")
    copy = tmp_path / UNIT.name
    # A program that is here, too.
    copy.write_text(UNIT.read_text().replace("/opt/moeshm/bin/moeshm", sys.executable))
    if has_gpu:
        (tmp_path / f"{UNIT.name}.d").mkdir()
        shutil.copy(GPU, tmp_path / f"{UNIT.name}.d")

    def said() -> str:
        ended = subprocess.run(
            [verify, "verify", str(copy)], capture_output=True, text=True, check=False, timeout=60
        )
        return ended.stdout + ended.stderr

    assert "moeshm" not in said()
    # It would have found a key that there is not.
    with copy.open("a") as file:
        file.write("NoSuchKey=1\n")
    assert "NoSuchKey" in said()
