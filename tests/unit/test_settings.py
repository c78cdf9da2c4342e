"""MOESHM_* variables: parsed once, and a bad one is named with what is allowed."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest

from moeshm import settings
from moeshm.errors import MoeshmError, SettingError
from moeshm.settings import Settings


def test_nothing_set_gives_the_defaults() -> None:
    assert Settings.from_environment({}) == Settings()
    assert Settings.from_environment({"PATH": "/bin", "XMOESHM_Y": "1", "moeshm_z": "1"}) == (
        Settings()
    )


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("MOESHM_MODE", "Batched", "mode", "batched"),
        ("MOESHM_MODE", "stream", "mode", "stream"),
        ("MOESHM_TRANSPORT", "stream", "transport", "stream"),
        ("MOESHM_TRANSPORT", " Shared ", "transport", "shared"),
        ("MOESHM_WIRE_DTYPE", "BF16", "wire_dtype", "bf16"),
        ("MOESHM_TOLERANCE", "1", "tolerance", 1.0),
        ("MOESHM_TOLERANCE", "4e-3", "tolerance", 0.004),
        ("MOESHM_BATCH_CAPACITY", "1", "batch_capacity", 1),
        ("MOESHM_BATCH_CAPACITY", "4096", "batch_capacity", 4096),
        ("MOESHM_SPIN_US", "0", "spin_us", 0.0),
        ("MOESHM_SPIN_US", "1e3", "spin_us", 1000.0),
        ("MOESHM_TIMEOUT_S", "0.5", "timeout_s", 0.5),
        ("MOESHM_CONNECT_TIMEOUT_S", "3600", "connect_timeout_s", 3600.0),
        ("MOESHM_KERNELS", "Decode=FMA, prefill=wgmma", "kernels", "decode=fma, prefill=wgmma"),
        ("MOESHM_LOG_LEVEL", "DEBUG", "log_level", "debug"),
        ("MOESHM_WORKER_USER", " Some.One ", "worker_user", "Some.One"),
        ("MOESHM_MAX_SESSIONS", "1", "max_sessions", 1),
        ("MOESHM_MAX_SESSIONS_PER_USER", "65536", "max_sessions_per_user", 65536),
        ("MOESHM_MAX_SESSIONS_PER_PROCESS", "2", "max_sessions_per_process", 2),
        ("MOESHM_MAX_HANDSHAKES", "3", "max_handshakes", 3),
        ("MOESHM_MAX_BYTES", "0", "max_bytes", 0),
        ("MOESHM_MAX_BYTES_PER_SESSION", "1000000", "max_bytes_per_session", 1_000_000),
        ("MOESHM_MAX_CALLS_PER_SESSION", "32", "max_calls_per_session", 32),
        ("MOESHM_MAX_EXPERTS_PER_SESSION", "9", "max_experts_per_session", 9),
    ],
)
def test_a_variable_sets_its_field(
    variable: str, text: str, field: str, value: str | float
) -> None:
    parsed = Settings.from_environment({variable: text})
    assert getattr(parsed, field) == value
    others = [name for name in Settings.__struct_fields__ if name != field]
    assert all(getattr(parsed, name) == getattr(Settings(), name) for name in others)


@pytest.mark.parametrize(
    ("variable", "text", "allowed"),
    [
        ("MOESHM_MODE", "fast", "choose auto, batched, stream"),
        ("MOESHM_TRANSPORT", "tcp", "choose auto, stream, shared"),
        ("MOESHM_TRANSPORT", "", "choose auto"),
        ("MOESHM_WIRE_DTYPE", "f64", "choose auto, f32, f16, bf16"),
        ("MOESHM_LOG_LEVEL", "loud", "choose debug, info, warning, error"),
        ("MOESHM_KERNELS", "fma", r"'fma'; choose auto, or of decode=fma\|mma, "),
        ("MOESHM_KERNELS", "decode=wgmma", r"'decode=wgmma'; .*prefill=fma\|mma\|wgmma"),
        ("MOESHM_KERNELS", "decode=fma,route=mma", "'route=mma'; choose auto"),
        ("MOESHM_KERNELS", "decode=fma,", "''; choose auto"),
        ("MOESHM_TOLERANCE", "-0.1", r"it must lie in 0\.\.1"),
        ("MOESHM_TOLERANCE", "1.1", r"it must lie in 0\.\.1"),
        ("MOESHM_TOLERANCE", "nan", r"it must lie in 0\.\.1"),
        ("MOESHM_BATCH_CAPACITY", "0", r"it must lie in 1\.\.4096"),
        ("MOESHM_BATCH_CAPACITY", "4097", r"it must lie in 1\.\.4096"),
        ("MOESHM_BATCH_CAPACITY", "-1", r"it must lie in 1\.\.4096"),
        ("MOESHM_BATCH_CAPACITY", "1e3", "is not a whole number"),
        ("MOESHM_BATCH_CAPACITY", "many", "is not a whole number"),
        ("MOESHM_SPIN_US", "fast", "is not a number"),
        ("MOESHM_SPIN_US", "-1", "it must lie in 0"),
        ("MOESHM_SPIN_US", "nan", "it must lie in 0"),
        ("MOESHM_SPIN_US", "inf", "it must lie in 0"),
        ("MOESHM_TIMEOUT_S", "0", "it must lie in"),
        ("MOESHM_TIMEOUT_S", "", "is not a number"),
        ("MOESHM_CONNECT_TIMEOUT_S", "1e9", "it must lie in"),
        ("MOESHM_MAX_SESSIONS", "0", r"it must lie in 1\.\.65536"),
        ("MOESHM_MAX_SESSIONS_PER_USER", "65537", r"it must lie in 1\.\.65536"),
        ("MOESHM_MAX_SESSIONS_PER_PROCESS", "all", "is not a whole number"),
        ("MOESHM_MAX_HANDSHAKES", "-1", r"it must lie in 1\.\.65536"),
        ("MOESHM_MAX_BYTES", "-1", r"it must lie in 0\.\.1125899906842624"),
        ("MOESHM_MAX_BYTES_PER_SESSION", "1G", "is not a whole number"),
        ("MOESHM_MAX_CALLS_PER_SESSION", "33", r"it must lie in 1\.\.32"),
        ("MOESHM_MAX_EXPERTS_PER_SESSION", "0", r"it must lie in 1\.\.16777216"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(variable: str, text: str, allowed: str) -> None:
    with pytest.raises(SettingError, match=rf"^{variable}=.*{allowed}"):
        Settings.from_environment({variable: text})


@pytest.mark.parametrize("variable", ["MOESHM_TRANSPROT", "MOESHM_", "MOESHM___POST_INIT__"])
def test_an_unknown_variable_is_named_with_those_that_exist(variable: str) -> None:
    with pytest.raises(SettingError, match=f"^{variable} is no setting; known are .*MOESHM_TRANSP"):
        Settings.from_environment({variable: "x"})


def test_kernels() -> None:
    assert settings.parse_kernels("auto") == {}
    found = settings.parse_kernels("decode=fma, prefill=wgmma")
    assert found == {"decode": "fma", "prefill": "wgmma"}


def test_a_field_and_a_variable_that_is_not_ours() -> None:
    assert Settings.from_environment({"MOESHM_SANITIZE": "address"}) == Settings()


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_settings_made_in_code_are_checked_too(value: float) -> None:
    with pytest.raises(SettingError, match="MOESHM_TIMEOUT_S"):
        Settings(timeout_s=value)


def test_they_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings.current.cache_clear()
    try:
        first = settings.current()
        monkeypatch.setenv("MOESHM_TRANSPORT", "stream")
        assert settings.current() is first
        settings.current.cache_clear()
        assert settings.current().transport == "stream"
    finally:
        settings.current.cache_clear()


def test_a_bad_value_is_caught_as_either_kind() -> None:
    assert issubclass(SettingError, MoeshmError)
    assert issubclass(SettingError, ValueError)


def test_the_command_says_it_in_a_line() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "moeshm", "worker", "--model", ".", "--listen", "unix:/nowhere"],
        env={**os.environ, "MOESHM_TRANSPORT": "pigeon"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode != 0
    assert "MOESHM_TRANSPORT='pigeon'; choose auto" in ended.stderr
    assert "Traceback" not in ended.stderr
