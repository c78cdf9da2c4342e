"""Every kernel compiles for every card it is for, with nothing spilled, and the page says so.

Compilers that are not here are skipped; CONTRIBUTING.md says how to get them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moeshm.kernels
from moeshm.layers import Activation

from .cases import CASES, FILES, TARGETS, Case, Target, cases_of
from .compilers import CompileError, CompilerMissing
from .page import (
    PAGE,
    Outcome,
    cells_of,
    columns_of,
    compile_all,
    read_cells,
    read_versions,
)
from .usage import Usage

#: Bytes of a thread that are spilled once a tile, outside of the loop that multiplies.
KNOWN_SPILLS: dict[tuple[str, Activation | None, str], int] = {
    ("prefill_wgmma.cu", Activation.GEGLU, "sm_90 by CUDA 13"): 8
}
#: Of any `resident`: decode_gate_up and decode_down need all registers that there are, and it has
#: some more to keep.
RESIDENT_SPILLS = 24
#: The first test waits for all.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> dict[Case, Outcome]:
    """Of every case that the tests to run ask for, compiled side by side."""
    wanted: dict[Case, None] = {}
    for item in request.session.items:
        parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        if isinstance(case := parameters.get("case"), Case):
            wanted[case] = None
        if isinstance(file := parameters.get("page_of"), str):
            wanted.update(dict.fromkeys(cases_of(file)))
    return compile_all(wanted)


def test_every_file_is_compiled() -> None:
    folder = Path(str(moeshm.kernels.__file__)).parent
    assert sorted(FILES) == sorted(path.name for path in folder.glob("*.cu"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_compiles_and_spills_nothing(case: Case, outcomes: dict[Case, Outcome]) -> None:
    outcome = outcomes[case]
    if isinstance(outcome, CompilerMissing):
        pytest.skip(str(outcome))
    if isinstance(outcome, CompileError):
        pytest.fail(str(outcome), pytrace=False)
    assert outcome, "no kernel in it"
    activation = None if case.shape is None else case.shape.activation
    allowed = KNOWN_SPILLS.get((case.file, activation, case.target.name), 0)
    if case.file == "resident.cu":
        allowed = RESIDENT_SPILLS
    assert [usage for usage in outcome if usage.local_bytes > allowed] == []
    if case.file == "prefill_wgmma.cu":
        # Its groups give and take of what they start with; where that is less, they wait for ever.
        assert {usage.registers for usage in outcome} == {168}


@pytest.mark.parametrize("page_of", FILES)
def test_the_page_has_the_figures(page_of: str, outcomes: dict[Case, Outcome]) -> None:
    text = PAGE.read_text()
    written = read_cells(text, page_of)
    found = cells_of({case: outcomes[case] for case in cases_of(page_of)})
    versions = read_versions(text)
    same = [target for target in columns_of(page_of) if _is_of_the_page(target, versions)]
    if not same:
        pytest.skip("no compiler of the page's figures is here")
    for target in same:
        hint = f"{target.name}; `make kernel-page` brings the page up to date"
        assert _column(found, target) == _column(written, target), hint


def _is_of_the_page(target: Target, versions: dict[str, str]) -> bool:
    try:
        return target.find().version == versions.get(target.name)
    except CompilerMissing:
        return False


def _column(cells: dict[tuple[str, str], dict[str, str]], target: Target) -> dict[str, str]:
    return {
        " ".join(row): figures[target.name]
        for row, figures in cells.items()
        if figures.get(target.name)
    }


# --- what could make the tests above pass without a reason -------------------------------

#: hipcc knows no __global__ before its header.
_INCLUDE = """
#if defined(__HIP__) && !defined(__HIPCC_RTC__)
#include <hip/hip_runtime.h>
#endif
"""

# So many values cannot be in registers when a block has so many threads.
_SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(float* x, int n) {
    __shared__ float shared[1024];
    float value[300];
#pragma unroll
    for (int i = 0; i < 300; ++i) value[i] = x[i * n + threadIdx.x];
    shared[threadIdx.x] = value[0];
    __syncthreads();
    for (int j = 0; j < n; ++j)
#pragma unroll
        for (int i = 0; i < 300; ++i) value[i] = value[i] * value[(i * 7 + 1) % 300] + shared[j];
#pragma unroll
    for (int i = 0; i < 300; ++i) x[i * n + threadIdx.x] = value[i];
}
extern "C" __global__ void plain(float* x) { x[threadIdx.x] = 0; }
"""


#: Cards of one compiler differ in no option but their name, and in nothing that is read here.
_ONE_OF_EACH = tuple({target.find: target for target in reversed(TARGETS)}.values())
each_compiler = pytest.mark.parametrize("target", _ONE_OF_EACH, ids=lambda target: target.name)


@each_compiler
def test_figures_are_told_of_each_kernel(target: Target) -> None:
    plain, spilling = _compile(target, _SPILLING)
    assert (plain.kernel, plain.shared_bytes, plain.local_bytes) == ("plain", 0, 0)
    assert (spilling.kernel, spilling.shared_bytes) == ("spilling", 4096)
    assert plain.registers < spilling.registers
    assert spilling.local_bytes > 0


@each_compiler
def test_a_mistake_and_a_warning_are_errors(target: Target) -> None:
    with pytest.raises(CompileError, match="undeclared_name"):
        _compile(target, 'extern "C" __global__ void kernel(int* x) { *x = undeclared_name; }')
    with pytest.raises(CompileError, match="planted"):
        _compile(target, '#warning planted\nextern "C" __global__ void kernel() {}')


def _compile(target: Target, text: str) -> list[Usage]:
    try:
        compiler = target.find()
    except CompilerMissing as missing:
        pytest.skip(str(missing))
    return compiler.compile(_INCLUDE + text, {}, target.arch)
