"""The question: how fast are the experts on a GPU, against its limits and against others?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import msgspec

from moeshm.errors import UnsupportedPlatform, WorkerFailed

from . import harness
from .harness import Plan
from .kernels_program import Began, FoundGpu, Line, Measured, Refused, Setup
from .kernels_shapes import KERNEL_SHAPES
from .schema import GpuInfo, KernelReport, KernelRow

#: Compiling and measuring one shape in one format.
_LIMIT_S = 1200.0
#: What the two ratios of a row are taken over.
_PEERS = {"grouped_ratio": "torch-grouped", "triton_ratio": "triton"}


class Asked(msgspec.Struct, frozen=True):
    """What is to be measured."""

    shapes: list[str]
    #: None: each shape's own.
    tokens: list[int] | None
    dtypes: list[str]
    contenders: list[str]
    #: As MOESHM_KERNELS.
    kernels: str = "auto"

    def setups(self, plan: Plan) -> list[Setup]:
        """One for each shape and format."""
        return [
            Setup(
                shape=shape,
                dtype=dtype,
                cells=[
                    (n_tokens, list(self.contenders))
                    for n_tokens in self.tokens or KERNEL_SHAPES[shape].tokens
                ],
                kernels=self.kernels,
                repeats=plan.repeats,
                seed=plan.seed,
            )
            for shape in self.shapes
            for dtype in self.dtypes
        ]


def measure(asked: Asked, plan: Plan, on_step: Callable[[str], None]) -> KernelReport:
    """Measure every shape and format, each in a process of its own; `on_step` hears of each.

    UnsupportedPlatform: there is no GPU that can be used; WorkerFailed: it could not be examined.
    """
    meta = harness.metadata("kernels", plan)
    gpu: GpuInfo | None = None
    rows: list[KernelRow] = []
    for setup in asked.setups(plan):
        found, measured = run(setup)
        gpu = gpu or found
        rows += measured
        on_step(f"{setup.shape} {setup.dtype}")
    assert gpu is not None
    add_ratios(rows)
    return KernelReport(meta=meta, gpu=gpu, results=rows)


def run(setup: Setup) -> tuple[GpuInfo, list[KernelRow]]:
    """Measure one shape and format: again without the contender that broke the device, as long as
    there is one."""
    order = [(n_tokens, name) for n_tokens, names in setup.cells for name in names]
    rows: dict[tuple[int, str], KernelRow] = {}
    while True:
        output, problem = harness.run_program(_command(setup), _LIMIT_S)
        lines: list[Line] = list(harness.decode_lines(output, Line))
        gpu = _gpu_of(lines, problem)
        for line in lines:
            if isinstance(line, Measured):
                rows[line.row.n_tokens, line.row.contender] = line.row
        missing = [key for key in order if key not in rows]
        if not missing:
            return gpu, [rows[key] for key in order]
        culprit = next((line.contender for line in lines[::-1] if isinstance(line, Began)), None)
        blamed = [key for key in missing if key[1] == culprit]
        if not blamed:
            raise WorkerFailed(f"{setup.shape} {setup.dtype} was not measured: {problem}")
        rows |= {key: _failed(setup, *key, problem) for key in blamed}
        setup = msgspec.structs.replace(setup, cells=_cells(set(missing) - set(blamed), order))


def _cells(
    wanted: Collection[tuple[int, str]], order: Sequence[tuple[int, str]]
) -> list[tuple[int, list[str]]]:
    cells: dict[int, list[str]] = {}
    for n_tokens, name in order:
        if (n_tokens, name) in wanted:
            cells.setdefault(n_tokens, []).append(name)
    return list(cells.items())


def _command(setup: Setup) -> list[str]:
    program = harness.python_program("kernels_program", msgspec.json.encode(setup).decode())
    return program()


def _gpu_of(lines: Sequence[Line], problem: str | None) -> GpuInfo:
    for line in lines:
        if isinstance(line, FoundGpu):
            return line.gpu
        if isinstance(line, Refused):
            raise UnsupportedPlatform(line.why)
    raise WorkerFailed(f"the GPU could not be examined: {problem}")


def _failed(setup: Setup, n_tokens: int, contender: str, problem: str | None) -> KernelRow:
    return KernelRow(
        contender=contender,
        shape=setup.shape,
        dtype=setup.dtype,
        n_tokens=n_tokens,
        repeats=setup.repeats,
        error=f"it ended the process: {problem}",
    )


def add_ratios(rows: Sequence[KernelRow]) -> None:
    """Hold each row's time against those of the peers in the same cell."""
    by_key = {(row.contender, row.shape, row.dtype, row.n_tokens): row for row in rows}
    for row in rows:
        for field, peer in _PEERS.items():
            if row.contender != peer:
                other = by_key.get((peer, row.shape, row.dtype, row.n_tokens))
                setattr(row, field, harness.ratio(row, other))
