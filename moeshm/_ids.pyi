"""Types of the extension; the behaviour is documented in `_ids.pyx`."""

import numpy as np
import numpy.typing as npt

def inspect_ids(ids: npt.NDArray[np.int32], limit: int) -> tuple[int, int | None]: ...
