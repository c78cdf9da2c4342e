"""Triton as a contender: the kernels of `triton_moe`, in the best configuration of a sweep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeshm.backends import Ids
from moeshm.dtypes import DType
from moeshm.errors import UnsupportedPlatform

from .kernels_contender import Gpu, Prepared
from .kernels_torch import TorchGraph, experts_on_device, peer_absence, to_device
from .kernels_work import Cell, Work

#: Calls that a configuration is tried with.
_TRIED_CALLS = 4
_TRIALS = 3
_COMBINE_COLUMNS = 1024


class Tiling(NamedTuple):
    """How one kernel is compiled: the tile of a program and what its loop has on its way."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        sizes = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{sizes} group {self.group_m} warps {self.num_warps} stages {self.num_stages}"

    def options(self) -> dict[str, int]:
        """For a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


#: By rows of a block. A configuration that needs more shared memory than there is is left out when
#: it is tried.
_TILINGS = (
    Tiling(16, 16, 256, 1, 4, 4),
    Tiling(16, 32, 128, 1, 4, 5),
    Tiling(16, 32, 256, 1, 4, 3),
    Tiling(16, 64, 128, 1, 4, 4),
    Tiling(16, 64, 256, 1, 4, 3),
    Tiling(16, 128, 64, 1, 4, 4),
    Tiling(16, 128, 128, 1, 4, 3),
    Tiling(32, 64, 64, 8, 4, 4),
    Tiling(32, 64, 128, 8, 4, 3),
    Tiling(32, 128, 64, 8, 4, 4),
    Tiling(64, 64, 64, 8, 4, 4),
    Tiling(64, 64, 128, 8, 4, 3),
    Tiling(64, 128, 64, 8, 4, 4),
    Tiling(64, 128, 64, 8, 8, 4),
    Tiling(64, 256, 64, 8, 8, 3),
    Tiling(128, 64, 64, 8, 4, 4),
    Tiling(128, 128, 64, 8, 8, 4),
    Tiling(128, 128, 64, 16, 8, 3),
    Tiling(128, 256, 64, 8, 8, 3),
)


def tilings_for(pairs_of_expert: float, out: int, inner: int) -> list[Tiling]:
    """Those to try where experts have so many pairs, for [out, inner] matrices: the blocks'
    rows that are nearest to it, from 16 to 128, and the next ones."""
    sizes = sorted({tiling.block_m for tiling in _TILINGS})
    nearest = next((i for i, size in enumerate(sizes) if size >= pairs_of_expert), len(sizes) - 1)
    tried = sizes[max(0, nearest - 1) : nearest + 2]
    return [
        tiling
        for tiling in _TILINGS
        if tiling.block_m in tried and out % tiling.block_n == 0 and inner % tiling.block_k == 0
    ]


class Blocks(NamedTuple):
    """The pairs of a call, sorted by expert, in blocks of one expert."""

    #: int32 [n_blocks * block_m]; the number of pairs where there is none.
    pairs: npt.NDArray[np.int32]
    #: int32 [n_blocks].
    experts: npt.NDArray[np.int32]


def sort_pairs(ids: Ids, block_m: int) -> Blocks:
    """What the kernels take; made on the host, since the sort is left out of their time."""
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable").astype(np.int32)
    experts, counts = np.unique(flat, return_counts=True)
    n_blocks = -(-counts // block_m)
    pairs = np.full(int(n_blocks.sum()) * block_m, flat.size, np.int32)
    starts = np.cumsum(n_blocks * block_m) - n_blocks * block_m
    within = np.arange(flat.size) - np.repeat(np.cumsum(counts) - counts, counts)
    pairs[np.repeat(starts, counts) + within] = order
    return Blocks(pairs, np.repeat(experts, n_blocks).astype(np.int32))


def absence(work: Work) -> str | None:
    """Why `TritonMoe` cannot compute it."""
    if work.info.weight_dtype is DType.F32:
        return "written for 16-bit floats"
    return peer_absence(work, "triton")


class TritonMoe:
    """Two kernels and a sum, their configurations the best of a sweep for each cell."""

    def __init__(self, gpu: Gpu, work: Work, kernels: str) -> None:
        del kernels
        self._gpu = gpu
        self._work = work
        self._experts = experts_on_device(work)

    def prepare(self, cell: Cell) -> Prepared:
        """Sweep, then one graph of all calls."""
        calls = Calls(self._work, self._experts, cell)
        gate_up, down = self._best(calls, cell)
        sorted_pairs = calls.sorted_by(gate_up.block_m)

        def compute_all() -> None:
            for number, blocks in enumerate(sorted_pairs):
                calls.gate_up(blocks, gate_up)
                calls.down(number, blocks, down)
                calls.combine()

        graph = TorchGraph(self._gpu, compute_all)
        plan = f"gate_up {gate_up}; down {down}"
        return Prepared(graph.launch, calls.out.data_ptr(), plan, graph.close)

    def _best(self, calls: Calls, cell: Cell) -> tuple[Tiling, Tiling]:
        """The fastest of each kernel among those of equal block_m; the pair that is fastest."""
        info = self._work.info
        pairs_of_expert = cell.n_tokens * info.top_k / cell.n_distinct
        hidden, inner = info.hidden_size, info.intermediate_size
        gate_ups = tilings_for(pairs_of_expert, inner, hidden)
        downs = tilings_for(pairs_of_expert, hidden, inner)
        found: list[tuple[float, Tiling, Tiling]] = []
        for block_m in sorted({tiling.block_m for tiling in gate_ups}):
            blocks = calls.sorted_by(block_m)[:_TRIED_CALLS]

            def run_gate_up(tiling: Tiling, blocks: Any = blocks) -> None:
                for each in blocks:
                    calls.gate_up(each, tiling)

            def run_down(tiling: Tiling, blocks: Any = blocks) -> None:
                for number, each in enumerate(blocks):
                    calls.down(number, each, tiling)

            first = self._fastest(gate_ups, block_m, run_gate_up)
            second = self._fastest(downs, block_m, run_down)
            if first and second:
                found.append((first[0] + second[0], first[1], second[1]))
        if not found:
            raise UnsupportedPlatform("no configuration of the Triton kernels runs on this device")
        return min(found)[1:]

    def _fastest(
        self, tilings: Sequence[Tiling], block_m: int, run: Callable[[Tiling], None]
    ) -> tuple[float, Tiling] | None:
        import triton

        times = []
        for tiling in tilings:
            if tiling.block_m != block_m:
                continue
            try:
                graph = TorchGraph(self._gpu, functools.partial(run, tiling))
            except triton.OutOfResources:
                continue
            times.append((min(self._gpu.time_us(graph.launch, 2) for _ in range(_TRIALS)), tiling))
            graph.close()
        return min(times, default=None)


class Calls:
    """The tensors of a cell's calls, and the launches on them."""

    def __init__(self, work: Work, experts: Any, cell: Cell, device: str = "cuda") -> None:
        import torch

        info = work.info
        self._device = device
        self._sizes = (experts.shape[1], info.hidden_size, info.intermediate_size)
        self._top_k = info.top_k
        self._experts = experts
        self._hidden_states = to_device(cell.hidden_states, device)
        self._ids = [routing.ids for routing in cell.routings]
        self._weights = [to_device(routing.weights, device) for routing in cell.routings]
        self._n_pairs = cell.n_tokens * info.top_k

        def empty(rows: int, columns: int) -> Any:
            return torch.empty((rows, columns), dtype=experts.dtype, device=device)

        self._inner = empty(self._n_pairs, info.intermediate_size)
        self._partial = empty(self._n_pairs, info.hidden_size)
        self.out = empty(cell.n_tokens, info.hidden_size)

    def sorted_by(self, block_m: int) -> list[tuple[Any, Any]]:
        """The pairs of each call, and the experts of their blocks, on the device."""
        return [
            (to_device(blocks.pairs, self._device), to_device(blocks.experts, self._device))
            for blocks in (sort_pairs(ids, block_m) for ids in self._ids)
        ]

    def gate_up(self, blocks: tuple[Any, Any], tiling: Tiling) -> None:
        """Of one call, whose pairs are sorted."""
        from . import triton_moe

        pairs, experts = blocks
        grid = (len(experts) * (self._sizes[2] // tiling.block_n),)
        triton_moe.gate_up[grid](
            *(self._hidden_states, self._experts, self._inner, pairs, experts),
            *(self._n_pairs, self._top_k, *self._sizes),
            **tiling.options(),
        )

    def down(self, number: int, blocks: tuple[Any, Any], tiling: Tiling) -> None:
        """Of the call with that number."""
        from . import triton_moe

        pairs, experts = blocks
        grid = (len(experts) * (self._sizes[1] // tiling.block_n),)
        triton_moe.down[grid](
            *(self._inner, self._experts, self._weights[number], self._partial, pairs, experts),
            *(self._n_pairs, *self._sizes),
            **tiling.options(),
        )

    def combine(self) -> None:
        """The sum over each token's slots, into `out`."""
        from . import triton_moe

        n_tokens, hidden_size = self.out.shape
        grid = (n_tokens, -(-hidden_size // _COMBINE_COLUMNS))
        triton_moe.combine[grid](
            *(self._partial, self.out, self._top_k, hidden_size), BLOCK=_COMBINE_COLUMNS
        )
