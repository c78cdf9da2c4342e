"""The peers of `moeshm bench kernels`, as far as they can be tried without a GPU."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from moeshm.bench import kernels_torch as peer
from moeshm.bench.kernels_program import CONTENDERS
from moeshm.bench.kernels_triton import sort_pairs, tilings_for
from moeshm.bench.kernels_work import Work, judge
from moeshm.dtypes import DType

from .bench_gpus import BIASED, TINY


@pytest.mark.parametrize("block_m", [16, 64])
def test_pairs_come_sorted_in_blocks_of_one_expert(block_m: int) -> None:
    (ids, _), *_ = Work(TINY, DType.BF16, seed=1).cell(70).routings
    blocks = sort_pairs(ids, block_m)
    rows = blocks.pairs.reshape(-1, block_m)
    assert len(rows) == len(blocks.experts)
    for expert, row in zip(blocks.experts, rows, strict=True):
        pairs = row[row < ids.size]
        assert len(pairs) > 0
        assert set(ids.ravel()[pairs]) == {expert}
        assert (row[len(pairs) :] == ids.size).all()
    assert sorted(blocks.pairs[blocks.pairs < ids.size]) == list(range(ids.size))


def test_tilings_are_near_the_pairs_of_an_expert_and_fit_the_matrices() -> None:
    assert {tiling.block_m for tiling in tilings_for(1, 768, 2048)} == {16, 32}
    assert {tiling.block_m for tiling in tilings_for(40, 768, 2048)} == {32, 64, 128}
    assert {tiling.block_m for tiling in tilings_for(300, 768, 2048)} == {64, 128}
    for tiling in tilings_for(8, 192, 128):
        assert 192 % tiling.block_n == 0
        assert 128 % tiling.block_k == 0


def test_peers_say_why_they_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    absences = [entry.absence for entry in list(CONTENDERS.values())[1:]]
    for work, words in (
        (Work(TINY, DType.F32, 0), ("takes bfloat16 only", "written for 16-bit floats")),
        (Work(BIASED, DType.BF16, 0), ("swiglu without biases",) * 2),
        (Work(TINY, DType.BF16, 0), ("install torch to measure it",) * 2),
    ):
        for absence, word in zip(absences, words, strict=True):
            assert word in (absence(work) or "")


def test_torch_grouped_computes_the_layer() -> None:
    torch = pytest.importorskip("torch")
    work = Work(TINY, DType.BF16, seed=11)
    cell = work.cell(37)
    forward = peer.Forward(work, "cpu")
    arguments = [peer.to_device(each, "cpu") for each in (cell.hidden_states, *cell.routings[-1])]
    output = forward(*arguments).view(torch.int16).numpy().view(np.uint16)
    assert judge(output, output, cell).relative_error < 1e-2
