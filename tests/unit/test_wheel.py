"""A wheel holds all that the package needs beside what is compiled, which only an editable install
has by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: By folder of the package, where its files are (pyproject.toml).
FOLDERS = {
    "moeshm": ROOT / "moeshm",
    "moeshm/kernels": ROOT / "kernels",
    "moeshm/bench": ROOT / "bench",
}
#: Compiled, or made by compiling; and figures and words for people.
NOT_NEEDED = {".pyx", ".so", ".pyc", ".json", ".md"}
#: setup.py, but for the compiling.
BUILD = """
import runpy, sys, Cython.Build
Cython.Build.cythonize = lambda *_arguments, **_options: []
sys.argv = ["setup.py", "--quiet", "build_py", "--build-lib", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel has."""
    path = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-c", BUILD, str(path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("folder", FOLDERS)
def test_it_has_every_file(built: Path, folder: str) -> None:
    source = FOLDERS[folder]
    pyx = {path.with_suffix(".c") for path in source.rglob("*.pyx")}
    needed = {
        path.relative_to(source)
        for path in source.rglob("*")
        if path.is_file() and path.suffix not in NOT_NEEDED and path not in pyx
    }
    assert needed, "a folder without files"
    missing = {str(path) for path in needed if not (built / folder / path).is_file()}
    assert missing == set()


def test_it_has_the_model_that_ships_with_it(built: Path) -> None:
    for path in (ROOT / "moeshm/demo/tiny_moe").iterdir():
        assert (built / "moeshm/demo/tiny_moe" / path.name).read_bytes() == path.read_bytes()


def test_it_has_no_more_than_that(built: Path) -> None:
    top = {path.relative_to(built).parts[0] for path in built.rglob("*")}
    assert top == {"moeshm"}
