"""`moeshm bench device-calls` on this machine's GPUs: every way is right, and has figures."""

from __future__ import annotations

import msgspec
import pytest
from click.testing import CliRunner

from moeshm.bench.device_calls_client import WAYS
from moeshm.bench.schema import DeviceCallReport
from moeshm.cli.bench import bench

# Kernels are compiled first.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def test_every_way_has_figures() -> None:
    words = ["device-calls", "--tokens=1,512", "--repeats=1", "--json", "--engine-device=auto"]
    done = CliRunner().invoke(bench, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = msgspec.json.decode(done.stdout, type=DeviceCallReport)
    assert [(row.n_tokens, row.way) for row in report.results] == [
        (n, way) for n in (1, 512) for way in WAYS
    ]
    for row in report.results:
        assert row.error is None, row
        assert row.p50_us
        assert row.kernels_us
        assert row.submit_us
        assert row.overhead_us is not None
    for floor in report.floors:
        assert floor.error is None, floor
        assert floor.p50_us
