"""NVIDIA's compute-sanitizer has nothing to say about any kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_ERRORS_FOUND = 77

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def find_sanitizer() -> str:
    """The tool of the CUDA toolkit; skips where there is none."""
    toolkit = os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = [*os.get_exec_path(), f"{toolkit}/bin", f"{toolkit}/compute-sanitizer"]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        pytest.skip("no compute-sanitizer; it is part of the CUDA toolkit")
    return found


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    command = [find_sanitizer(), "--tool", tool, "--error-exitcode", str(_ERRORS_FOUND)]
    # CuPy tries what a driver may refuse.
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    calls = [sys.executable, "-m", "tests.gpu.calls", "cuda:0"]
    result = subprocess.run(
        [*command, *calls], cwd=ROOT, capture_output=True, text=True, check=False
    )
    said = result.stdout + result.stderr
    if "Device not supported" in said:
        pytest.skip(f"compute-sanitizer does not support this device: {said[-500:]}")
    assert result.returncode == 0, said
    assert said.count("right: ") >= 4, said
