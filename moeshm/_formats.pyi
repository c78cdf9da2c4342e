"""Types of the extension; the behaviour is documented in `_formats.pyx`."""

from typing import Any

import numpy as np
import numpy.typing as npt

def convert(source: npt.NDArray[Any], target: npt.NDArray[Any]) -> None: ...
def add_rows(
    total: npt.NDArray[np.float32], rows: npt.NDArray[np.int64] | None, part: npt.NDArray[Any]
) -> None: ...
