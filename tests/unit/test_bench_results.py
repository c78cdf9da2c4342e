"""bench/results: what is kept there is what the benchmarks printed, and is listed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from moeshm.bench.schema import (
    CopyReport,
    DeviceCallReport,
    KernelReport,
    OverloadReport,
    ReplayReport,
)

RESULTS = Path(__file__).parents[2] / "bench" / "results"
_Report = KernelReport | CopyReport | DeviceCallReport | OverloadReport | ReplayReport
#: By what a file's name says after its date.
SCHEMAS: Mapping[str, type[_Report]] = {
    "kernels": KernelReport,
    "copies": CopyReport,
    "device-calls": DeviceCallReport,
    "overload": OverloadReport,
    "replay": ReplayReport,
}


def test_kept_results_follow_the_schema_and_are_listed() -> None:
    listed = (RESULTS / "README.md").read_text()
    for path in RESULTS.glob("*.json"):
        kinds = [kind for kind in SCHEMAS if path.name[11:].startswith(f"{kind}-")]
        assert len(kinds) == 1, f"{path.name}; name it DATE-BENCHMARK-DEVICE.json"
        found = msgspec.json.decode(path.read_bytes(), type=SCHEMAS[kinds[0]])
        assert found.results, path
        assert found.meta.benchmark == kinds[0], path
        assert found.meta.date.startswith(path.name[:10]), path
        assert f"`{path.name}`" in listed
