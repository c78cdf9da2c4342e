"""The interface has the types that users' checkers rely on: mypy, as strict as on the package.

`assert_type` says what must be inferred; a `type: ignore` with a code, what must be refused: it
is an error itself when there is nothing to ignore.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def run_mypy(*files: Path) -> subprocess.CompletedProcess[str]:
    """On the files alone: what they import is checked elsewhere."""
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--no-error-summary"]
    return subprocess.run(
        [*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_interface_has_its_types() -> None:
    result = run_mypy(*sorted(FOLDER.glob("*_types.py")))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_wrong_type_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from typing_extensions import assert_type\n"
        "from moeshm import RingConsumer\n"
        "assert_type(RingConsumer.attach(3).acquire(), str)\n"
        "RingConsumer.attach(3).acquire()  # type: ignore[attr-defined]\n"
    )
    result = run_mypy(wrong)
    assert result.returncode == 1
    assert 'Expression is of type "Record", not "str"' in result.stdout
    assert "unused-ignore" in result.stdout
