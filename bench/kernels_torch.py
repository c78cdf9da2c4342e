"""PyTorch as a contender: sort by expert, two `_grouped_mm`, the activation, and the sum."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from moeshm.dtypes import Array, DType
from moeshm.layers import Activation

from .kernels_contender import Gpu, Prepared
from .kernels_work import Cell, Work


def absence(work: Work) -> str | None:
    """Why `TorchGrouped` cannot compute it."""
    if work.info.weight_dtype is not DType.BF16:
        return "torch._grouped_mm takes bfloat16 only"
    return peer_absence(work, "torch")


def peer_absence(work: Work, module: str) -> str | None:
    """Why a peer that needs a module and computes plain SwiGLU cannot compute it."""
    if work.info.activation is not Activation.SWIGLU or work.has_bias:
        return f"written for swiglu without biases; this layer has {work.info.activation}"
    for name in ("torch", module):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return f"{error}; install {name} to measure it"
    return None


def to_device(array: Array, device: str = "cuda") -> Any:
    """A tensor with the array's values; uint16 holds bfloat16."""
    import torch

    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


@functools.cache
def experts_on_device(work: Work, device: str = "cuda") -> Any:
    """The matrices of all experts, [num_experts, 3 * intermediate_size * hidden_size], which every
    peer of a process uses."""
    import torch

    first = to_device(work.matrices(0), "cpu")
    experts = torch.empty((work.info.num_experts, len(first)), dtype=first.dtype, device=device)
    for expert in range(work.info.num_experts):
        experts[expert].copy_(to_device(work.matrices(expert), "cpu"))
    return experts


class TorchGrouped:
    """The layer as one would write it with `torch._grouped_mm`; nothing waits for the host."""

    def __init__(self, gpu: Gpu, work: Work, kernels: str) -> None:
        del kernels
        self._gpu = gpu
        self._forward = Forward(work)

    def prepare(self, cell: Cell) -> Prepared:
        """One graph of all calls."""
        hidden_states = to_device(cell.hidden_states)
        routings = [tuple(map(to_device, routing)) for routing in cell.routings]

        def compute_all() -> Any:
            for ids, weights in routings:
                out = self._forward(hidden_states, ids, weights)
            return out

        graph = TorchGraph(self._gpu, compute_all)
        plan = "sort, 2 _grouped_mm, sum"
        return Prepared(graph.launch, graph.result.data_ptr(), plan, graph.close)


class Forward:
    """One call on tensors; also on the CPU."""

    def __init__(self, work: Work, device: str = "cuda") -> None:
        import torch

        info = work.info
        n, hidden, inner = info.num_experts, info.hidden_size, info.intermediate_size
        experts = experts_on_device(work, device)
        step = experts.stride(0)
        # Transposed views of what is stored: [num_experts, in, out].
        self._gate_up = experts.as_strided((n, hidden, 2 * inner), (step, 1, hidden))
        first = 2 * inner * hidden
        self._down = experts.as_strided((n, inner, hidden), (step, 1, inner), first)
        self._numbers = torch.arange(n, dtype=torch.int32, device=device)

    def __call__(self, hidden_states: Any, ids: Any, weights: Any) -> Any:
        """`hidden_states`: bfloat16 [n_tokens, hidden_size]; `ids`, `weights`: [n_tokens, top_k],
        int32 and float32. The weighted sums, bfloat16."""
        import torch

        top_k = ids.shape[1]
        in_order, order = ids.flatten().sort()
        ends = torch.searchsorted(in_order, self._numbers, right=True, out_int32=True)
        rows = hidden_states.index_select(0, order // top_k)
        gate, up = torch._grouped_mm(rows, self._gate_up, offs=ends).chunk(2, dim=1)
        inner = torch.nn.functional.silu(gate).mul_(up)
        # The fewest values are here; the sum that follows is linear in them.
        inner.mul_(weights.flatten()[order].unsqueeze(1))
        outputs = torch._grouped_mm(inner, self._down, offs=ends)
        by_slot = torch.empty_like(outputs).index_copy_(0, order, outputs)
        return by_slot.view(*ids.shape, -1).sum(1)


class TorchGraph:
    """What PyTorch enqueues when `compute` is called, recorded once."""

    def __init__(self, gpu: Gpu, compute: Callable[[], Any]) -> None:
        import torch

        # Libraries make their handles and workspaces before, on a stream like the one of the
        # capture; Triton compiles.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compute()
        torch.cuda.synchronize()
        # The graph knows addresses only: what they hold has to stay.
        self._compute: Callable[[], Any] | None = compute
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            #: What `compute` returned: its memory is written by each launch.
            self.result = compute()
        self._stream = torch.cuda.ExternalStream(gpu.stream_handle)

    def launch(self) -> None:
        """Enqueue it on the stream that is timed."""
        import torch

        with torch.cuda.stream(self._stream):
            self._graph.replay()

    def close(self) -> None:
        """Give back its memory."""
        import torch

        self.result = self._compute = None
        self._graph.reset()
        torch.cuda.empty_cache()
