"""`moeshm demo`: the worker's text is the text of experts in this process, whatever happens."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result

import moeshm
from moeshm import checkpoint, settings
from moeshm.backends import Ids, Weights
from moeshm.backends.cpu import CpuBackend
from moeshm.cli.demo import demo
from moeshm.demo import tiny_moe_path
from moeshm.demo.decoder import Decoder, generate
from moeshm.demo.run import DEFAULT_PROMPT, SEED, TEMPERATURE
from moeshm.errors import SettingError, WorkerDied
from moeshm.handshake import SlabWish

KEYS = [
    *("text", "tokens", "tokens_per_s", "calls", "rows", "bytes_out", "bytes_in"),
    *("max_abs_logit_diff", "fallback_calls", "worker_restarts"),
    *("hot_fraction", "hot_share", "cold_share"),
]
N_LAYERS = 4


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No MOESHM_* variable, and none remembered by an earlier test or for a later one."""
    for variable in [name for name in os.environ if name.startswith("MOESHM_")]:
        monkeypatch.delenv(variable)
    settings.current.cache_clear()
    yield
    settings.current.cache_clear()


@pytest.fixture(params=["shared", "stream"])
def _transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How activations travel."""
    monkeypatch.setenv("MOESHM_TRANSPORT", request.param)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(demo, arguments)


def run_json(*arguments: str) -> dict[str, Any]:
    result = run("--json", *arguments)
    assert result.exit_code == 0, result.output
    printed: dict[str, Any] = msgspec.json.decode(result.stdout)
    return printed


def text_without_a_worker(prompt: bytes, n_tokens: int) -> str:
    backend = CpuBackend(checkpoint.load(tiny_moe_path()).layers, threads=1)

    def experts(layer: int, x: npt.NDArray[Any], ids: Ids, weights: Weights) -> npt.NDArray[Any]:
        out = np.empty_like(x)
        backend.ffn(layer, x, ids, weights, out)
        return out

    decoder = Decoder(tiny_moe_path(), experts)
    tokens = bytes(token for token, _ in generate(decoder, prompt, n_tokens, TEMPERATURE, SEED))
    return tokens.decode("utf-8", "replace")


@pytest.mark.usefixtures("_transport")
def test_json_is_one_object_with_the_documented_keys() -> None:
    printed = run_json("--tokens", "30")
    assert list(printed) == KEYS
    assert printed["text"] == text_without_a_worker(DEFAULT_PROMPT, 30)
    assert printed["tokens"] == 30
    assert printed["calls"] == 30 * N_LAYERS
    assert printed["rows"] == (len(DEFAULT_PROMPT) + 29) * N_LAYERS
    # A row of 128 float32 values goes out and comes back.
    assert min(printed["bytes_out"], printed["bytes_in"]) > printed["rows"] * 512
    assert printed["tokens_per_s"] > 0
    assert printed["max_abs_logit_diff"] <= 1e-3
    assert (printed["fallback_calls"], printed["worker_restarts"]) == (0, 0)
    assert {printed[name] for name in ("hot_fraction", "hot_share", "cold_share")} == {None}


@pytest.mark.usefixtures("_transport")
def test_the_text_goes_on_when_the_worker_is_killed() -> None:
    printed = run_json("--tokens", "30", "--kill-worker")
    assert printed["text"] == run_json("--tokens", "30")["text"]
    assert printed["calls"] == 30 * N_LAYERS
    assert printed["max_abs_logit_diff"] <= 1e-3
    # The call that was on its way; the next one found another worker.
    assert (printed["fallback_calls"], printed["worker_restarts"]) == (1, 1)


@pytest.mark.usefixtures("_transport")
def test_the_call_on_its_way_is_the_one_that_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    computed_here: list[int] = []
    ffn = CpuBackend.ffn

    def record(backend: CpuBackend, layer: int, *arguments: Any) -> None:
        computed_here.append(layer)
        ffn(backend, layer, *arguments)

    states: list[str] = []
    kill = os.kill

    def observe(pid: int, number: int) -> None:
        if number == signal.SIGKILL:
            stat = Path(f"/proc/{pid}/stat").read_text()
            states.append(stat.rpartition(")")[2].split()[0])
        kill(pid, number)

    monkeypatch.setattr(CpuBackend, "ffn", record)
    monkeypatch.setattr(os, "kill", observe)
    assert run_json("--tokens", "6", "--kill-worker")["fallback_calls"] == 1
    # Stopped: it had no time to answer.
    assert states[0] == "T"
    # The worker was killed in layer 1; the rest is the comparison.
    assert computed_here == [1, *([0, 1, 2, 3] * 6)]


@pytest.mark.usefixtures("_transport")
def test_one_token_can_be_killed_while_a_long_prompt_is_read() -> None:
    prompt = "x = 1\n" * 50
    printed = run_json("--tokens", "1", "--prompt", prompt, "--kill-worker")
    assert printed["text"] == text_without_a_worker(prompt.encode(), 1)
    assert printed["worker_restarts"] == 1


def test_text_and_table_are_plain_where_there_is_no_terminal() -> None:
    result = run("--tokens", "20", "--prompt", "import ")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("import " + text_without_a_worker(b"import ", 20) + "\n")
    assert "\x1b" not in result.stdout
    for row in (
        "transport +shared",
        rf"worker +process \d+; this is {os.getpid()}",
        r"tokens/s +[\d,]+ \(20 tokens\); [\d,]+ with the experts in this process",
        "calls +80,",
        "rows +104 ",
        r"bytes +[\d,]+ to the worker, [\d,]+ back",
        "µs per call +pack .*, wait .*, unpack .* computes ",
        "logits +largest difference .*; the text is the same",
        "fallback calls +0 ",
        "worker restarts +0 ",
    ):
        assert re.search(rf"^ {row}", result.stdout, re.MULTILINE), row


def test_the_table_says_why_there_is_another_worker() -> None:
    result = run("--tokens", "20", "--kill-worker")
    assert result.exit_code == 0, result.output
    assert re.search(r"fallback calls +1: the worker died", result.stdout)
    killed = re.search(
        r"worker restarts +1: SIGKILL to process (\d+) during token 10, with a call of layer 1",
        result.stdout,
    )
    assert killed
    assert f"process {killed[1]};" not in result.stdout
    # Not in the middle of the text.
    assert "moeshm: the fallback computes calls" in result.stderr


def test_bytes_that_are_no_utf8_are_shown_somehow() -> None:
    result = run("--tokens", "5", "--prompt", os.fsdecode(b"\xff\x1b[2J "))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("�␛[2J ")


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1.01, r"difference 0\.\d+ from .*; the text is the same"), (0.0, r"another from token \d+")],
)
def test_other_logits_or_another_text_is_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, factor: float, said: str
) -> None:
    """The worker is another process: only the experts in this one are wrong."""
    ffn = CpuBackend.ffn

    def bent(*arguments: Any) -> None:
        ffn(*arguments)
        arguments[-1][...] *= factor

    monkeypatch.setattr(CpuBackend, "ffn", bent)
    result = run("--json", "--tokens", "8")
    assert result.exit_code == 1
    assert msgspec.json.decode(result.stdout)["max_abs_logit_diff"] > 1e-3
    assert re.search(f"Error: the worker's logits are not right: .*{said}", result.stderr)


def test_rounded_activations_are_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESHM_WIRE_DTYPE", "bf16")
    result = run("--json", "--tokens", "4")
    assert result.exit_code == 1
    assert "MOESHM_WIRE_DTYPE=auto" in result.stderr


# --- --hot --------------------------------------------------------------------------------


@pytest.mark.usefixtures("_transport")
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_hot_experts_stay_here_and_the_text_is_the_same(fraction: float) -> None:
    printed = run_json("--tokens", "30", "--hot", str(fraction))
    assert printed["text"] == text_without_a_worker(DEFAULT_PROMPT, 30)
    assert printed["max_abs_logit_diff"] <= 1e-3
    assert (printed["fallback_calls"], printed["worker_restarts"]) == (0, 0)
    assert printed["hot_fraction"] == fraction
    assert printed["hot_share"] + printed["cold_share"] == pytest.approx(1)
    rows = (len(DEFAULT_PROMPT) + 29) * N_LAYERS
    if fraction == 0:
        assert (printed["hot_share"], printed["rows"]) == (0, rows)
        return
    # The most used are hot, so they have more than their part of the work; and some rows stay.
    assert printed["hot_share"] > fraction
    assert 0 < printed["rows"] < rows


def test_where_all_experts_are_hot_there_is_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeshm.demo.run.spawn_worker", None)
    result = run("--tokens", "10", "--hot", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        (DEFAULT_PROMPT.decode() + text_without_a_worker(DEFAULT_PROMPT, 10)) + "\n"
    )
    rows = (len(DEFAULT_PROMPT) + 9) * N_LAYERS
    for row in (
        "hot experts +16 of 16 in each layer",
        "hot share +100.0% of .* here, 0.0% by the worker ",
        rf"hot rows +{rows} of {rows} were not sent",
        rf"worker +none, as no expert is cold; this is process {os.getpid()}",
        "fallback calls +0 ",
    ):
        assert re.search(rf"^ {row}", result.stdout, re.MULTILINE), row
    assert not re.search(r"^ (transport|calls|bytes|µs)", result.stdout, re.MULTILINE)
    printed = run_json("--tokens", "10", "--hot", "1")
    assert (printed["hot_share"], printed["cold_share"], printed["calls"]) == (1, 0, 0)


def test_the_table_shows_the_shares() -> None:
    result = run("--tokens", "20", "--hot", "0.5")
    assert result.exit_code == 0, result.output
    found = re.search(r"^ hot rows +(\d+) of (\d+) were not sent", result.stdout, re.MULTILINE)
    assert found
    kept, total = map(int, found.groups())
    assert total == (len(DEFAULT_PROMPT) + 19) * N_LAYERS
    for row in (
        "hot experts +8 of 16 in each layer, those that a first run in this process used most",
        r"hot share +\d+\.\d% of \(token, expert\) pairs computed by hot experts here, \d+\.\d% by",
        "transport +shared",
        rf"rows +{total - kept} ",
    ):
        assert re.search(rf"^ {row}", result.stdout, re.MULTILINE), row


@pytest.mark.usefixtures("_transport")
def test_the_fallback_takes_the_cold_part_of_a_killed_worker() -> None:
    printed = run_json("--tokens", "30", "--hot", "0.5", "--kill-worker")
    assert printed["text"] == text_without_a_worker(DEFAULT_PROMPT, 30)
    assert printed["fallback_calls"] > 0
    assert 0 < printed["cold_share"] < 1 - printed["hot_share"]
    result = run("--tokens", "30", "--hot", "0.5", "--kill-worker")
    assert result.exit_code == 0, result.output
    for row in (
        r"hot share +.*, \d+\.\d% by the worker, \d+\.\d% by the fallback",
        r"fallback calls +\d+: the worker died",
        r"worker restarts +\d+: SIGKILL to process \d+ during token 1[5-9],",
    ):
        assert re.search(rf"^ {row}", result.stdout, re.MULTILINE), row


def test_a_worker_that_is_never_called_cannot_be_killed_with_a_call_on_its_way() -> None:
    """One token chooses four experts of each layer, and fifteen are hot."""
    result = run("--tokens", "1", "--prompt", "x", "--hot", "0.94", "--kill-worker")
    assert result.exit_code == 0, result.output
    assert re.search(r"^ calls +0,", result.stdout, re.MULTILINE)
    assert re.search("worker restarts +0: no SIGKILL, as no call was on its way", result.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hot", "1", "--kill-worker"], "keeps all 16 experts of a layer here"),
        (["--hot", "0.97", "--kill-worker"], "--hot 0.97 keeps all 16 experts"),
        (["--hot", "1.5"], "1.5 is not in the range 0<=x<=1"),
    ],
)
def test_what_cannot_be_hot_is_named(arguments: list[str], message: str) -> None:
    result = run("--tokens", "1", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_fraction_that_is_no_number_is_named() -> None:
    result = run("--tokens", "1", "--hot", "nan")
    assert isinstance(result.exception, SettingError)
    assert "it must lie in 0..1" in str(result.exception)
    assert result.stdout == ""


# --- what is measured ---------------------------------------------------------------------


def test_to_start_a_worker_anew_is_no_part_of_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's times are per call. A clock that jumps while a session is opened shows it."""
    jumped_ns = 0
    read_clock = time.perf_counter_ns
    call = (
        0,
        np.ones((1, 128), np.float32),
        np.zeros((1, 4), np.int32),
        np.ones((1, 4), np.float32),
    )
    with moeshm.spawn_worker(tiny_moe_path(), threads=1) as client:
        open_session = client._sessions._open_session

        def open_slowly(wish: SlabWish) -> Any:
            nonlocal jumped_ns
            jumped_ns += 10**15
            return open_session(wish)

        monkeypatch.setattr(client._sessions, "_open_session", open_slowly)
        monkeypatch.setattr(time, "perf_counter_ns", lambda: read_clock() + jumped_ns)
        os.kill(client.worker_pid, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            client.compute(*call)
        client.compute(*call)
        assert client.stats().worker_restarts == 1
        assert jumped_ns
        assert client.stats().pack_s < 10**5
