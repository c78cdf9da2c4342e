"""Types of the extension; the behaviour is documented in `_inputs.pyx`."""

from typing import Any

import numpy as np
import numpy.typing as npt

def inspect_ids(ids: npt.NDArray[np.int32], limit: int) -> tuple[int, int | None]: ...
def count_empty_rows(
    hidden_states: Any,
    topk_ids: Any,
    topk_weights: Any,
    hidden_size: int,
    top_k: int,
    limit: int,
) -> int | None: ...
def used_rows(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]: ...
def count_ids(ids: npt.NDArray[Any], counts: npt.NDArray[np.float64]) -> int | None: ...
def route(
    ids: npt.NDArray[np.int32], table: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int32], int, int, int]: ...
