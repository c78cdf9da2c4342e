"""Types of the extension; the behaviour is documented in `_wire.pyx`."""

import numpy as np
import numpy.typing as npt

from ._ring import Record, Reservation, RingProducer
from .dtypes import Array

#: The longest time in the backend that a reply can tell of: `choice.MAX_TIMEOUT_S`.
MAX_COMPUTE_NS: int

def write_call(
    ring: RingProducer,
    call_id: int,
    layer: int,
    hidden_states: Array,
    topk_ids: Array,
    topk_weights: Array,
    dtype: int,
    deadline_ns: int,
    view: int = 0,
    rows: npt.NDArray[np.int64] | None = None,
) -> int: ...
def read_plain_call(
    record: Record,
    shapes: dict[int, tuple[int, int, int, npt.NDArray[np.int32] | None]],
    max_tokens: int,
) -> tuple[int, int, Array, npt.NDArray[np.int32], npt.NDArray[np.float32], int, int] | None: ...
def fill_reply(
    reply: Reservation,
    call_id: int,
    n_tokens: int,
    hidden_size: int,
    dtype: int,
    compute_ns: int,
) -> None: ...
def take_plain_reply(record: Record, call_id: int, into: Array, dtype: int) -> int: ...
