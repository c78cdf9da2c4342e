"""`moeshm place --watch` looks at what was counted since the last look, and proposes swaps."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from moeshm.cli import cli
from moeshm.cli.place import place
from moeshm.cli.place_watch import Watch
from moeshm.errors import SettingError
from moeshm.placement import LayerPlacement, Placement
from moeshm.routing_stats import RoutingStats
from moeshm.swaps import MAX_SWAPS, MIN_GAIN, Swap, apply_swaps
from tests.crash.processes import running

#: Experts 0 and 1 are hot.
PLACEMENT = Placement(["w"], {0: LayerPlacement(4, (0, 1), {"w": (2, 3)})})


class Engine:
    """Counts, and saves what it counted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stats = RoutingStats({0: 4})

    def counts(self, *experts: int) -> None:
        """Each a hundred times, so that no difference could be chance."""
        self.stats.observe(0, np.repeat(np.array(experts, np.int32), 100))
        self.stats.save(self.path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PLACEMENT.save(tmp_path / "p.json")
    return tmp_path


@pytest.fixture
def engine(folder: Path) -> Engine:
    return Engine(folder / "stats.npz")


def make(folder: Path, output: str | None = None) -> Watch:
    return Watch(str(folder / "stats.npz"), str(folder / "p.json"), 1.25, 8, output)


def command(folder: Path, *words: str) -> list[str]:
    files = ["--stats", str(folder / "stats.npz"), "--placement", str(folder / "p.json")]
    return ["place", "--watch", *files, *words]


def invoke(arguments: Sequence[str]) -> Result:
    return CliRunner().invoke(cli, arguments)


# --- a step -------------------------------------------------------------------------------


def test_it_waits_for_the_first_counts(folder: Path, engine: Engine) -> None:
    task = make(folder)
    assert task.step() is None
    engine.counts()
    assert task.step() is None
    engine.counts(0)
    found = task.step()
    assert found is not None
    assert (found.step, found.counted_slots, found.swaps) == (1, 100, [])
    assert task.step() is None


def test_only_what_came_since_the_last_step_counts(folder: Path, engine: Engine) -> None:
    task = make(folder)
    engine.counts(*[0] * 100, *[1] * 100)
    assert task.step() is not None
    engine.counts(0, 0, 1, 2, 2, 2, 2, 2)
    found = task.step()
    assert found is not None
    assert (found.counted_slots, found.hot_share, found.proposed_hot_share) == (800, 3 / 8, 7 / 8)
    assert found.swaps == [Swap(0, 2, 1, 0.5)]


def test_all_counts_once_they_fell(folder: Path, engine: Engine) -> None:
    task = make(folder)
    engine.counts(0, 0, 0, 0)
    assert task.step() is not None
    engine.stats.decay(0.5)
    engine.counts(3)
    found = task.step()
    assert found is not None
    assert found.counted_slots == 300


def test_without_an_output_the_file_says_what_the_engine_has(folder: Path, engine: Engine) -> None:
    task = make(folder)
    engine.counts(2)
    first = task.step()
    engine.counts(2)
    second = task.step()
    assert first is not None
    assert second is not None
    assert first.swaps == second.swaps
    assert first.written is None
    apply_swaps(PLACEMENT, first.swaps).save(folder / "p.json")
    engine.counts(2)
    third = task.step()
    assert third is not None
    assert (third.swaps, third.hot_share) == ([], 1)


def test_with_an_output_each_step_builds_on_the_last(folder: Path, engine: Engine) -> None:
    output = folder / "new.json"
    task = make(folder, str(output))
    engine.counts(0, 1)
    assert task.step() is not None
    assert not output.exists()
    engine.counts(2, 2, 0)
    found = task.step()
    assert found is not None
    assert found.written == str(output)
    assert Placement.load(output) == apply_swaps(PLACEMENT, found.swaps)
    assert Placement.load(output).layers[0].hot == (0, 2)
    engine.counts(3, 3, 2)
    found = task.step()
    assert found is not None
    assert [(each.promote, each.demote) for each in found.swaps] == [(3, 0)]
    assert Placement.load(output).layers[0].hot == (2, 3)
    assert Placement.load(folder / "p.json") == PLACEMENT


def test_files_that_cannot_be_used_are_named(folder: Path, engine: Engine) -> None:
    engine.counts(2)
    with pytest.raises(SettingError, match=r"none/new\.json cannot be written"):
        make(folder, str(folder / "none" / "new.json")).step()
    engine.path.write_bytes(b"no archive")
    with pytest.raises(SettingError, match=r"routing statistics .*stats\.npz"):
        make(folder).step()


# --- the command --------------------------------------------------------------------------


def test_one_step_prints_a_table(folder: Path, engine: Engine) -> None:
    engine.counts(2, 2, 0)
    output = folder / "new.json"
    done = invoke(command(folder, "--steps", "1", "--output", str(output)))
    assert done.exit_code == 0, done.output
    assert "step 1: 300 slots counted, hot share 33.3%, 100.0% after 1 swap;" in done.output
    assert f"written to {output}" in done.output
    assert [line.split("│")[1:4] for line in done.output.splitlines() if "66.7%" in line] == [
        [each.rjust(width) for each, width in (("0 ", 7), ("2 ", 13), ("1 ", 14))]
    ]


def test_no_swap_is_said_too(folder: Path, engine: Engine) -> None:
    engine.counts(2, 2, 0, 0, 1, 1)
    done = invoke(command(folder, "--steps", "1"))
    assert done.output == (
        "step 1: 600 slots counted, hot share 66.7%; no swap would gain enough\n"
    )
    # A pair of equals is none for a lower gain either.
    done = invoke(command(folder, "--steps", "1", "--gain", "1", "--json"))
    assert json.loads(done.output)["swaps"] == []


def test_swaps_are_capped_and_gain_is_obeyed(folder: Path, engine: Engine) -> None:
    engine.counts(*[2] * 9, *[3] * 8, *[0] * 5, *[1] * 4)

    def swaps(*words: str) -> list[dict[str, Any]]:
        done = invoke(command(folder, "--steps", "1", "--json", *words))
        found: list[dict[str, Any]] = json.loads(done.output)["swaps"]
        return found

    assert [(each["promote"], each["demote"]) for each in swaps()] == [(2, 1), (3, 0)]
    assert len(swaps("--max-swaps", "1")) == 1
    assert len(swaps("--gain", "2")) == 1


def test_the_command_has_the_defaults_of_python() -> None:
    defaults = {option.name: option.default for option in place.params}
    assert (defaults["gain"], defaults["max_swaps"]) == (MIN_GAIN, MAX_SWAPS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_follows_the_engine_until_a_signal(
    folder: Path, engine: Engine, number: signal.Signals
) -> None:
    engine.counts(0, 1)
    words = command(folder, "--json", "--interval", "0.01", "--output", str(folder / "new.json"))
    with running(["-m", "moeshm", *words]) as process:
        assert json.loads(process.output.read_until("\n"))["swaps"] == []
        # A person may be at the file; once is enough to say so.
        engine.path.write_bytes(b"no archive")
        assert "stats.npz" in process.log.read_until("looking again\n")
        engine.counts(2, 2, 0)
        found = json.loads(process.output.read_until("\n"))
        assert found["step"] == 2
        assert found["swaps"] == [{"layer": 0, "promote": 2, "demote": 1, "gained_share": 2 / 3}]
        assert Placement.load(folder / "new.json").layers[0].hot == (0, 2)
        process.signal(number)
        assert process.wait() == 0
        assert process.output.read_rest() == ""
        assert process.log.read_rest() == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--watch", "--placement", "p"], "Missing option '--stats'"),
        (["--watch", "--stats", "s"], "Missing option '--placement'"),
        (["--stats", "s", "--budget", "1"], "Missing option '--model'"),
        (["--stats", "s", "--model", "m"], "Missing option '--budget'"),
        *(
            (["--watch", "--stats", "s", "--placement", "p", *words], f"{words[0]} is there only")
            for words in (
                *(["--model", "m"], ["--budget", "1"], ["--workers", "w0"]),
                *(["--replicas", "1"], ["--floor", "0"]),
            )
        ),
        *(
            (["--stats", "s", "--model", "m", "--budget", "1", *words], f"{words[0]} is there only")
            for words in (
                *(["--placement", "p"], ["--gain", "2"], ["--max-swaps", "8"]),
                *(["--interval", "5"], ["--steps", "1"]),
            )
        ),
        (["--watch", "--gain", "0.5"], "0.5 is not in the range x>=1"),
    ],
)
def test_options_of_the_other_form_and_missing_ones_are_named(
    words: list[str], message: str
) -> None:
    done = invoke(["place", *words])
    assert done.exit_code == 2
    assert message in done.output


def test_a_placement_of_another_model_is_refused(folder: Path, engine: Engine) -> None:
    engine.stats = RoutingStats({0: 9})
    engine.counts(8)
    done = invoke(command(folder, "--steps", "1"))
    assert isinstance(done.exception, SettingError)
    assert "these are of different models" in str(done.exception)
