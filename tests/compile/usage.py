"""What a compiled kernel takes of a card, out of what its compiler says."""

from __future__ import annotations

import re
from typing import NamedTuple


class Usage(NamedTuple):
    """Of one kernel."""

    kernel: str
    #: Of a thread; vector registers on AMD's cards.
    registers: int
    #: Shared memory of a block, without what a launch asks for on top.
    shared_bytes: int
    #: Memory of a thread for what was spilled and for arrays that are not in registers.
    local_bytes: int


_PTXAS_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def of_ptxas_log(log: str) -> list[Usage]:
    """Of each kernel that ptxas reports on when it is verbose."""
    usages = []
    for found in _PTXAS_KERNEL.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        usages.append(
            Usage(
                found["name"],
                int(found["registers"]),
                int(shared[1]) if shared else 0,
                int(found["stack"]),
            )
        )
    return sorted(usages)


def of_amdgpu_notes(notes: str) -> list[Usage]:
    """Of each kernel in the metadata that `llvm-readelf --notes` prints of a code object."""
    usages = []
    kernels = notes.partition("amdhsa.kernels:\n")[2].partition("\namdhsa.")[0]
    for kernel in re.split(r"^  - ", kernels, flags=re.MULTILINE)[1:]:
        # What is further in belongs to the arguments.
        fields = dict(re.findall(r"^(?:    )?\.(\w+): +(\S+)$", kernel, re.MULTILINE))
        usages.append(
            Usage(
                fields["name"],
                int(fields["vgpr_count"]),
                int(fields["group_segment_fixed_size"]),
                int(fields["private_segment_fixed_size"]),
            )
        )
    return sorted(usages)
