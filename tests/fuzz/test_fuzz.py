"""Every target for a fixed number of executions, without what a fuzzer needs; and what one found.

`tools/fuzz.sh` runs them for longer, on builds with sanitizers, and guided by coverage.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeshm._claims import Allocator
from moeshm.layers import MAX_EXPERTS, parse_ranges
from moeshm.placement import Placement, PlacementError
from moeshm.transport.slab import FLAGS_BYTES
from tests.crash.processes import ROOT
from tests.fuzz import targets
from tests.fuzz.choices import EDGES, Choices, data_of

#: Executions of each, of about a second.
RUNS = {
    "ring": 5000,
    "records": 8000,
    "handshakes": 5000,
    "streams": 8000,
    "slabs": 8000,
    "files": 2000,
    "live": 1500,
    "lying": 100,
}
CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", [*targets.NAMES, *targets.LIVE_NAMES])
def test_a_target_holds(name: str) -> None:
    """Of seed 0; how to repeat the execution that breaks it is printed."""
    target = targets.load(name)
    with contextlib.closing(target):
        for data in target.seeds():
            target.test_one(data)
        for number in range(RUNS[name]):
            try:
                target.test_one(data_of(0, number))
            except BaseException:
                print(f"python -m tests.fuzz.runner --seed 0 --only {number} {name}")
                raise


def test_every_target_is_run() -> None:
    assert RUNS.keys() == {*targets.NAMES, *targets.LIVE_NAMES}
    with_targets = {
        path.stem
        for path in Path(__file__).parent.glob("*.py")
        if "\ndef test_one(data: bytes) -> str:" in path.read_text()
    }
    assert with_targets == {*RUNS, "broken"}


# --- what was found ---------------------------------------------------------------------------


def test_a_layer_of_no_width_has_no_tokens() -> None:
    """It divided by zero, which ends the process."""
    assert Allocator(bytearray(FLAGS_BYTES), 1 << 20).most_tokens(0, 0, 0) == 0


@pytest.mark.parametrize("num_experts", [-1, 0, MAX_EXPERTS + 1, 2**40, 2**63 - 1])
def test_a_placement_of_an_impossible_number_of_experts_is_none(num_experts: int) -> None:
    """NumPy's errors escaped, or the memory was gone."""
    layer = f'{{"num_experts": {num_experts}, "hot": "", "cold": {{}}}}'
    text = f'{{"version": 1, "workers": [], "layers": {{"0": {layer}}}}}'
    with pytest.raises(PlacementError, match=f"num_experts={num_experts}; it must be 1..1048576"):
        Placement.from_json(text)


@pytest.mark.parametrize("text", ["0-99999999999999999999", "5,0-1048576", "0-1048575,3-5"])
def test_a_range_of_too_many_numbers_is_none(text: str) -> None:
    """The list of them took all memory."""
    with pytest.raises(ValueError, match="more than 1048576 numbers"):
        parse_ranges(text)
    assert len(parse_ranges("0-1048575")) == MAX_EXPERTS


# --- the fuzzer itself ------------------------------------------------------------------------


def test_no_data_changes_nothing() -> None:
    choices = Choices(bytes(8))
    assert choices.near(77, 8) == 77
    assert choices.edit(b"as it was") == b"as it was"
    fields = {"x": 1}
    choices.change(fields, {"x": 8})
    assert fields == {"x": 1}
    assert not choices.are_left()


def test_choices_stay_in_their_width() -> None:
    for number in range(2000):
        choices = Choices(data_of(7, number))
        while choices.are_left():
            assert 0 <= choices.near(5, 16) < 1 << 16
            assert 0 <= choices.number(32) < 1 << 32
            assert 0 <= choices.below(300) < 300
    assert EDGES[:3] == (0, 1, 2)


def test_a_seed_and_a_number_repeat_an_execution() -> None:
    made = hashlib.sha256(b"".join(data_of(1, number) for number in range(1000))).hexdigest()
    assert made.startswith("69da598069fc5540"), "of a seed's figures, none can be repeated any more"


@pytest.mark.parametrize("engine", ["seeded", "guided"])
def test_the_runner_tells_of_what_breaks(tmp_path: Path, engine: str) -> None:
    if engine == "guided":
        pytest.importorskip("atheris", reason="guided runs need atheris: pip install .[fuzz]")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz.runner", "--engine", engine, "--runs", "2000"),
            *("--corpus", str(tmp_path / "corpus"), "--crashes", str(tmp_path / "crashes")),
            "broken",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert '"crashes": 1' in done.stdout.splitlines()[-1].replace("5", "1")
    assert "seven is too much" in done.stderr
    found = list((tmp_path / "crashes").iterdir())
    assert found
    assert all(path.read_bytes()[:1] == b"\7" for path in found)
