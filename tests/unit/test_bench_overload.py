"""`moeshm bench overload`: what its clients do, phases, rows, and clients that fail."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import msgspec
import pytest
from click.testing import CliRunner

from moeshm.backends import MemoryUser, SteppingBackend
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.bench import harness, overload
from moeshm.bench.harness import Plan
from moeshm.bench.overload import DECODE, PREFILL, Asked
from moeshm.bench.overload_worker import WorkerSetup, _backend, unstepped
from moeshm.bench.replay_model import SHAPES, Computed
from moeshm.bench.schema import OverloadReport
from moeshm.cli.bench import bench
from moeshm.dtypes import DType
from moeshm.errors import WorkerFailed
from tests.checkpoints import random_layer
from tests.simt.device import IdleDevice

TINY = SHAPES["tiny"]


def asked(**changed: object) -> Asked:
    """A decode and a prefill client of the smallest layer."""
    usual = Asked(
        shape=TINY,
        device="cpu",
        weight_dtype=DType.BF16,
        decode_clients=1,
        prefill_clients=1,
        prefill_tokens=64,
        deadline_s=5.0,
    )
    return msgspec.structs.replace(usual, **changed)


def test_a_decodes_batch_is_as_long_as_it_is_asked_for() -> None:
    assert asked().clients(DECODE) == (1, 1)
    assert asked(decode_tokens=9).clients(DECODE) == (1, 9)
    assert asked(decode_tokens=9).clients(PREFILL) == (1, 64)


def test_only_one_of_the_workers_computes_in_steps() -> None:
    computed = Computed(is_null=False, seed=0, weight_dtype=DType.BF16)
    backend = _backend(WorkerSetup(shape=TINY, computed=computed, steps=True))
    assert isinstance(backend, SteppingBackend)
    plain = unstepped(backend)
    assert not isinstance(plain, SteppingBackend | MemoryUser)
    assert plain.layers is backend.layers


def test_a_gpus_backend_without_steps_still_copies_from_registered_memory() -> None:
    """Or it would be slower for another reason than that which is measured."""
    backend = GpuBackend({0: random_layer(1)}, IdleDevice())
    plain = unstepped(backend)
    assert not isinstance(plain, SteppingBackend)
    assert isinstance(plain, MemoryUser)
    memory = memoryview(bytearray(1 << 16))
    with contextlib.closing(plain.use_memory(memory)):
        assert backend.memory_stats != GpuBackend({}, IdleDevice()).memory_stats


def test_every_phase_is_a_row_for_each_kind_of_client() -> None:
    result = CliRunner().invoke(
        bench,
        [
            *("overload", "--shape", "tiny", "--decode", "1", "--prefill", "1", "--tokens", "64"),
            *("--seconds", "0.2", "--repeats", "1", "--deadline-ms", "5000", "--json"),
        ],
    )
    assert result.exit_code == 0, result.output
    report = msgspec.json.decode(result.stdout, type=OverloadReport)
    assert report.meta.benchmark == "overload"
    assert [(row.kind, row.phase) for row in report.results] == [
        ("decode", "alone"),
        ("decode", "steps"),
        ("decode", "no-steps"),
        ("prefill", "alone"),
        ("prefill", "alone-no-steps"),
        ("prefill", "steps"),
        ("prefill", "no-steps"),
    ]
    for row in report.results:
        assert row.error is None
        assert row.n > 0
        assert row.n_tokens == (1 if row.kind == "decode" else 64)
        assert row.max_us is not None
        assert (row.tokens_per_s or 0) > 0
        assert row.missed == row.reconnects == 0


def test_clients_that_fail_are_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all: an error; of some: a row that says so."""
    plan = Plan(0, 0, 1, 0.1, None, 0)
    monkeypatch.setattr(overload, "_PHASES", overload._PHASES[:2])
    programs = iter([["-c", "pass"]])
    real = harness.python_program

    def program(module: str, *words: str) -> Callable[[], list[str]]:
        broken = next(programs, None)
        return real(module, *words) if broken is None else lambda: [sys.executable, *broken]

    monkeypatch.setattr(harness, "python_program", program)
    rows = overload.measure(asked(), plan, lambda _phase: None).results
    assert sorted(row.error or "" for row in rows) == ["", "a client ended without a result"]
    for row in rows:
        assert (row.error is None) == (row.n > 0) == (row.tokens_per_s is not None)
    programs = iter([["-c", "pass"]] * 2)
    with pytest.raises(WorkerFailed, match="nothing was measured: a client ended without"):
        overload.measure(asked(), plan, lambda _phase: None)
