"""`moeshm place`: a budget becomes a placement, and the table says what to expect of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from moeshm.cli import cli
from moeshm.placement import Placement
from moeshm.routing_stats import RoutingStats
from tests import checkpoints as ck


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ck.write_model(tmp_path / "model", "qwen3_moe")
    stats = RoutingStats(dict.fromkeys(range(ck.NUM_LAYERS), ck.NUM_EXPERTS))
    for layer in range(ck.NUM_LAYERS):
        counts = np.arange(ck.NUM_EXPERTS) * (layer + 1)
        stats.observe(layer, np.repeat(np.arange(ck.NUM_EXPERTS), counts))
    stats.save(tmp_path / "stats.csv")
    return tmp_path


def run(folder: Path, *words: str) -> Result:
    options = ["--stats", str(folder / "stats.csv"), "--model", str(folder / "model")]
    return CliRunner().invoke(cli, ["place", *options, *words], catch_exceptions=False)


def expert_bytes(folder: Path) -> int:
    from moeshm.checkpoint import load

    return load(folder / "model", [0]).layers[0].expert(0).nbytes


def test_the_placement_is_written_and_the_table_adds_up(model: Path) -> None:
    size = expert_bytes(model)
    output = model / "placement.json"
    budget = str(size * 4)
    done = run(
        model, "--budget", budget, "--workers", "a,b", "--floor", "1", "--output", str(output)
    )
    assert done.exit_code == 0, done.output
    placement = Placement.load(output)
    assert placement.workers == ("a", "b")
    assert sum(len(layer.hot) for layer in placement.layers.values()) == 4
    assert all(ck.NUM_EXPERTS - 1 in layer.hot for layer in placement.layers.values())
    assert "% of all slots" in done.output


def test_json_has_the_shares(model: Path) -> None:
    done = run(model, "--budget", "1GiB", "--json")
    found = json.loads(done.stdout)
    assert found["hot_share"] == 1
    assert [row["hot_experts"] for row in found["layers"]] == [ck.NUM_EXPERTS] * ck.NUM_LAYERS
    assert list(found["fingerprints"]) == ["w0"]


def test_without_an_output_the_placement_itself_is_printed(model: Path) -> None:
    done = run(model, "--budget", "0")
    placement = Placement.from_json(done.stdout)
    assert all(layer.hot == () for layer in placement.layers.values())


@pytest.mark.parametrize("text", ["", "lots", "8XB", "-1"])
def test_a_budget_that_is_no_size_is_named(model: Path, text: str) -> None:
    done = run(model, f"--budget={text}")
    assert done.exit_code == 2
    assert "is no size; write bytes, or like 512MiB or 8GiB" in done.output


def test_statistics_of_another_model_are_refused(model: Path) -> None:
    RoutingStats({0: 99}).save(model / "stats.csv")
    done = run(model, "--budget", "1GiB")
    assert done.exit_code == 1
    assert "these are of different models" in done.output
