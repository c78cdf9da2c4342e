"""`moeshm bench copies`, without a GPU: contenders in turns, what must arrive, ratios, refusals."""

from __future__ import annotations

import sys

import msgspec
import pytest
from click.testing import CliRunner

from moeshm.backends.gpu.device import Registration
from moeshm.bench import copies
from moeshm.bench.harness import Plan
from moeshm.bench.schema import CopyReport, CopyRow
from moeshm.cli.bench import bench
from moeshm.errors import DeviceError
from tests.simt.device import SimtDevice

PLAN = Plan(0, 0, 2, 0.0, None, 3)
#: The second is no multiple of a page.
SIZES = [4096, 10_000]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of a few copies."""
    monkeypatch.setattr(copies, "_ROUND_BYTES", 1 << 18)


class Card(SimtDevice):
    """Copies from and to any memory, as drivers do."""

    def __init__(self) -> None:
        super().__init__()
        #: Bytes that were registered, and whether they were read-only.
        self.seen: set[tuple[int, bool]] = set()

    def register(self, address: int, nbytes: int, *, read_only: bool) -> Registration:
        """As `Device.register`."""
        self.seen.add((nbytes, read_only))
        return super().register(address, nbytes, read_only=read_only)

    def copy_in(self, to: int, source: int, nbytes: int) -> None:
        """Enqueued by a command list."""
        self._pinned[source] = nbytes
        super().copy_in(to, source, nbytes)

    def copy_out(self, to: int, source: int, nbytes: int) -> None:
        """Enqueued by a command list."""
        self._pinned[to] = nbytes
        super().copy_out(to, source, nbytes)


def measure(device: SimtDevice) -> tuple[dict[tuple[str, str, int], CopyRow], list[str]]:
    """Rows by contender, direction and size, and the steps."""
    steps: list[str] = []
    report = copies.measure(device, SIZES, PLAN, steps.append)
    assert msgspec.convert(msgspec.to_builtins(report), CopyReport) == report
    assert (report.meta.benchmark, report.device) == ("copies", "SIMT shim")
    return {(row.contender, row.direction, row.size_bytes): row for row in report.results}, steps


def test_every_contender_copies_every_size_both_ways() -> None:
    device = Card()
    rows, steps = measure(device)
    assert len(rows) == len(copies.CONTENDERS) * 2 * len(SIZES)
    assert sorted(steps) == sorted(2 * copies.CONTENDERS)
    assert len(steps) == copies.count_steps(PLAN)
    for (contender, direction, size), row in rows.items():
        assert row.error is None
        # 3 rounds of whole lists of 8, twice.
        assert row.n == 2 * 3 * 8 * ((1 << 18) // (8 * size))
        assert row.p50_us
        assert row.gb_per_s == pytest.approx(size / row.p50_us / 1e3)
        base = rows[copies.BASE, direction, size]
        if contender == copies.BASE:
            assert row.pinned_ratio is None
        else:
            assert row.gb_per_s is not None
            assert row.pinned_ratio == pytest.approx(row.gb_per_s / (base.gb_per_s or 0))
    assert not device.registered
    assert device.device_bytes == 0


def test_a_worker_reads_calls_and_writes_replies() -> None:
    device = Card()
    measure(device)
    assert device.seen == {
        (2 * (each + 4096), flag) for each in (4096, 16384) for flag in (True, False)
    }


def test_memory_that_is_refused_fails_its_contender_alone() -> None:
    """The shim copies from and to no memory that is not registered."""
    rows, steps = measure(SimtDevice())
    for (contender, _, _), row in rows.items():
        if contender == "ring-unregistered":
            assert "are not allocated" in (row.error or "")
        else:
            assert row.error is None
    # Not tried again.
    assert steps.count("ring-unregistered") == 1


def test_rings_that_cannot_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Registration:
        raise DeviceError("not supported")

    device = Card()
    monkeypatch.setattr(device, "register", refuse)
    rows, _ = measure(device)
    assert rows["ring", "in", 4096].error == (
        "rings cannot be registered here; moeshm doctor says why"
    )
    assert rows["ring-unregistered", "in", 4096].error is None


@pytest.mark.parametrize("direction", copies.DIRECTIONS)
def test_what_does_not_arrive(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    device = Card()
    monkeypatch.setattr(device, f"copy_{direction}", lambda *_: None)
    rows, _ = measure(device)
    assert {row.error for row in rows.values()} == {
        f"a copy {way} of {size} bytes went wrong" for way in copies.DIRECTIONS for size in SIZES
    }


# --- the command ----------------------------------------------------------------------------


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    result = CliRunner().invoke(bench, ["copies"])
    assert result.exit_code == 1
    assert "Error: copies need a GPU: no CuPy for device auto" in result.output
    assert "pip install" in result.output


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setattr(copies, "open_device", lambda _name: SimtDevice())
    arguments = ["copies", "--sizes", "4K,8K", "--repeats", "1", *(["--json"] if as_json else [])]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 0, result.output
    if as_json:
        report = msgspec.json.decode(result.stdout, type=CopyReport)
        assert {row.size_bytes for row in report.results} == {4096, 8192}
    else:
        assert "Into the device" in result.stdout
        assert "of pinned" in result.stdout
        assert "ring-unregistered: " in result.stdout
