"""`moeshm doctor`: the command, and what `auto` makes of findings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from click.testing import CliRunner, Result

from moeshm import diagnosis, settings
from moeshm.cli.doctor import doctor
from moeshm.diagnosis import ESSENTIAL, SHARED_NEEDS, Diagnosis
from moeshm.diagnosis.finding import Finding, Status

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No MOESHM_* variable, and none remembered by an earlier test or for a later one."""
    for variable in [name for name in os.environ if name.startswith("MOESHM_")]:
        monkeypatch.delenv(variable)
    settings.current.cache_clear()
    yield
    settings.current.cache_clear()


def all_ok_but(name: str = "", status: Status = "missing") -> list[Finding]:
    """Findings that decide, with one of them changed."""
    names = dict.fromkeys([*ESSENTIAL, *SHARED_NEEDS])
    return [Finding(each, status if each == name else "ok", "") for each in names]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(doctor, arguments)


# --- the command --------------------------------------------------------------------------


def test_json_is_one_object_with_the_documented_keys() -> None:
    result = run("--json")
    printed = msgspec.json.decode(result.stdout)
    assert set(printed) == {"findings", "auto"}
    assert all(set(line) == {"name", "status", "value", "remedy"} for line in printed["findings"])
    assert set(printed["auto"]) == {"transport", "device", "transport_reason", "device_reason"}
    report = msgspec.convert(printed, Diagnosis)
    assert {finding.status for finding in report.findings} <= set(get_args(Status))
    names = [finding.name for finding in report.findings]
    assert len(names) == len(set(names))
    assert {*ESSENTIAL, *SHARED_NEEDS} <= set(names)
    assert result.exit_code == 0, report


def test_every_finding_but_ok_has_a_remedy() -> None:
    for finding in diagnosis.diagnose().findings:
        assert finding.value
        assert bool(finding.remedy) == (finding.status != "ok"), finding


def test_what_is_tried_works_here() -> None:
    """Linux with a built extension has all of these."""
    found = {finding.name: finding for finding in diagnosis.diagnose().findings}
    for name in ("extension", "ring", "memfd", "posix_shm", "futex", "unix_socket", "settings"):
        assert found[name].status == "ok", found[name]


def test_table_shows_every_line_and_what_auto_picks() -> None:
    result = run()
    report = diagnosis.diagnose()
    for finding in report.findings:
        assert re.search(rf"^ *{finding.name} +{finding.status} ", result.stdout, re.MULTILINE)
    assert f"auto picks transport {report.auto.transport}: " in result.stdout
    assert "auto picks device cpu: " in result.stdout


def test_brackets_in_a_remedy_survive_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    bent = Finding("numpy", "degraded", "[red]old[/red]", "pip install 'moeshm[cuda13]'")
    monkeypatch.setattr(diagnosis, "CHECKS", [*diagnosis.CHECKS, ("numpy", lambda: bent)])
    assert "[red]old[/red]" in run().stdout
    assert "→ pip install 'moeshm[cuda13]'" in run().stdout


def test_a_bad_setting_is_a_finding_and_exit_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESHM_TRANSPORT", "pigeon")
    result = run("--json")
    assert result.exit_code == 1
    report = msgspec.json.decode(result.stdout, type=Diagnosis)
    bad = next(finding for finding in report.findings if finding.name == "settings")
    assert bad.status == "missing"
    assert "MOESHM_TRANSPORT='pigeon'" in bad.value
    assert (report.auto.transport, report.auto.device) == (None, None)
    assert "settings" in report.auto.transport_reason


def test_a_table_says_why_moeshm_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESHM_NONSENSE", "1")
    result = run()
    assert result.exit_code == 1
    assert "moeshm cannot run without settings" in result.stdout
    assert "auto picks" not in result.stdout


def test_the_documentation_names_every_check() -> None:
    text = (ROOT / "docs" / "doctor.md").read_text()
    for name, _ in diagnosis.CHECKS:
        assert f"`{name}`" in text, name


# --- what auto picks ----------------------------------------------------------------------


def test_auto_is_shared_where_all_it_needs_is_ok() -> None:
    auto = diagnosis.choose(all_ok_but())
    assert (auto.transport, auto.device) == ("shared", "cpu")


@pytest.mark.parametrize(
    ("name", "status"),
    [("memfd", "missing"), ("futex", "missing"), ("ring", "missing"), ("unix_socket", "degraded")],
)
def test_auto_steps_down_to_stream_and_says_why(name: str, status: Status) -> None:
    auto = diagnosis.choose(all_ok_but(name, status))
    assert auto.transport == "stream"
    assert name in auto.transport_reason


def test_auto_takes_the_first_gpu() -> None:
    names = ("hip:0-hip:1", "hip:0-host", "hip:0", "hip:1")
    gpus = [Finding(name, "degraded", "") for name in names]
    assert diagnosis.choose([*all_ok_but(), *gpus]).device == "hip:0"


@pytest.mark.parametrize("name", ESSENTIAL)
def test_auto_is_nothing_without_an_essential(name: str) -> None:
    auto = diagnosis.choose(all_ok_but(name))
    assert (auto.transport, auto.device) == (None, None)
    assert name in auto.device_reason


def test_optional_packages_are_not_essential() -> None:
    assert not {"cupy", "torch", "transformers"} & set(ESSENTIAL)


def test_a_check_that_raises_is_a_finding() -> None:
    def broken() -> Finding:
        raise RuntimeError("driver/library\nversion mismatch")

    (finding,) = diagnosis.run_check("gpu", broken)
    assert finding.name == "gpu"
    assert finding.status == "missing"
    assert "RuntimeError: driver/library version mismatch" in finding.value
