"""Types of the extension; the behaviour is documented in `_device_arrays.pyx`."""

from typing import Any

from .dtypes import DType

def look(
    hidden_states: Any,
    topk_ids: Any,
    topk_weights: Any,
    out: Any,
    stream: Any,
    hidden_size: int,
    top_k: int,
    device_type: int,
    device_index: int,
) -> (
    tuple[
        tuple[int, int, int, int, int, int, DType, int, DType, tuple[Any, Any, Any], int],
        int | None,
        int | None,
        bool,
    ]
    | None
): ...
