"""Types of the extension; the behaviour is documented in `_descriptors.pyx`."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ._ring import Record

_Slots = npt.NDArray[np.int32] | None
_Known = Mapping[int, tuple[int, int, int, _Slots]]

def read_plain_descriptor(
    record: Record, known: tuple[_Known, _Known], max_tokens: int, data_bytes: int
) -> (
    tuple[int, int, int, int, int, tuple[int, int, int, int, int], int, int, _Slots, int, int]
    | None
): ...
