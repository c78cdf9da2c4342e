"""How the shim compiles kernels for the host."""

from __future__ import annotations

import ctypes
import shutil

import pytest

from moeshm.backends.gpu.abi import Call
from tests import simt
from tests.simt import KernelError
from tests.simt.module import UNUSED, assembly

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")

#: A layer that differs in everything from what is compiled instead.
ANOTHER = {"WEIGHT": "bf16", "HIDDEN": 1000, "INNER": 1408, "ACTIVATION": 3, "HAS_BIAS": 1}


@pytest.mark.parametrize("file", UNUSED)
def test_what_is_compiled_once_for_all_shapes_is_the_same_for_each(file: str) -> None:
    unused = UNUSED[file]
    macros = {**ANOTHER, "PARTIAL": "WEIGHT", "TILE_ROWS": 16}
    assert assembly(file, macros) == assembly(file, {**macros, **unused})
    used = {"HIDDEN": 16} if "HIDDEN" not in unused else {"TILE_ROWS": 32}
    assert assembly(file, macros) != assembly(file, {**macros, **used})


def test_what_does_not_compile_is_an_error_with_the_compilers_words() -> None:
    with pytest.raises(KernelError, match=r"broken does not compile: .*not_declared"):
        simt.compile_text("int value = not_declared;", {}, name="broken.cu")


def test_the_structs_of_python_and_of_the_kernels_are_compared() -> None:
    text = 'struct Call { int n; }; struct Route {};\nextern "C" __global__ void f(Call, Route) {}'
    module = simt.compile_text(text, {})
    with pytest.raises(KernelError, match=f"{ctypes.sizeof(Call)} and .* bytes in Python, 4 and"):
        module.launch("f", 1, 1, 0, Call())
