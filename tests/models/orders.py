"""What each operation of the model stands for in C: a function of moeshm/_atomics.h, and its memory
order."""

from __future__ import annotations

import re
from typing import NamedTuple

from .source import ATOMICS, MODEL, code_of

_TAGGED = re.compile(r"([^;]*?);?\s*/\* \[(\d+)\] \*/")
#: What comes before a statement, since the `;` of the last one.
_BEFORE = re.compile(r".*(?:->|[{}]|\*/|^#[^\n]*$)", re.DOTALL | re.MULTILINE)
_CALL = re.compile(r"\s*(\w+)\(\w+, (\w+)")
_FUNCTION = re.compile(r"^static inline [\w ]+?(moeshm_\w+)\([^)]*\) \{\n(.*?)^\}", re.M | re.S)
_ATOMIC = re.compile(r"__atomic_\w+\(|__sync_\w+\(|\bFUTEX_")
_ORDER = re.compile(r"__ATOMIC_([A-Z_]+)|\b(FUTEX_[A-Z_]+)")


class Operation(NamedTuple):
    """`function`: of _atomics.h; empty where the code needs none. `order`: as the model has it, in
    C's words; of an exchange that may fail, with that for failing."""

    function: str
    order: str


#: By inline of memory.pml, as ring.pml uses it where nothing is BROKEN.
MEANT = {
    "load": Operation("", "plain"),
    "store": Operation("", "plain"),
    "load_relaxed": Operation("moeshm_load_relaxed", "relaxed"),
    "load_acquire": Operation("moeshm_load_acquire", "acquire"),
    "store_release": Operation("moeshm_store_release", "release"),
    "exchange_as": Operation("moeshm_exchange", "acq_rel"),
    "compare_exchange_as": Operation("moeshm_compare_exchange", "acq_rel, acquire"),
    "fetch_and": Operation("moeshm_clear_bits", "acq_rel"),
    # In the kernel, with a barrier before.
    "futex_wait": Operation("moeshm_futex_wait", "futex_wait"),
    "futex_wake": Operation("moeshm_futex_wake", "futex_wake"),
}

#: Atomics that the ring does not use: words that GPUs read and set, too, beside the data that they
#: tell of.
OF_OTHERS = {
    "moeshm_load_word": "acquire",
    "moeshm_store_word": "release",
    "moeshm_replace_word": "acq_rel, acquire",
}


def operations() -> dict[int, str]:
    """By step, what ring.pml does there, as MEANT has it; steps that are none of these are left
    out."""
    found = {}
    for match in _TAGGED.finditer(MODEL.read_text()):
        call = _CALL.match(_BEFORE.sub("", match[1]))
        if call and call[1] in MEANT:
            is_data = call[2] in ("header_at", "payload_at")
            name = "load_relaxed" if call[1] == "load" and not is_data else call[1]
            found[int(match[2])] = name
    return found


def orders() -> dict[str, str]:
    """By function of _atomics.h that has one, its memory order, or what it asks of the kernel."""
    found = {}
    for name, body in _FUNCTION.findall(code_of(ATOMICS)):
        if _ATOMIC.search(body):
            words = [order or call for order, call in _ORDER.findall(body)]
            found[name] = ", ".join(word.lower() for word in words)
    return found
