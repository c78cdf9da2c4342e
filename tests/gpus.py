"""Whether tests that are marked `gpu` can run here."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def why_none() -> str | None:
    """Why no GPU can be used, as a reason to skip; None where one can.

    CuPy is imported only here and in tests that use it: its first call to a driver is costly, and a
    process that has made one cannot fork children that use the GPU.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from cupy.cuda import runtime
    except ImportError as error:
        return f"no CuPy ({error}); `make test-gpu EXTRAS=dev,cuda13` brings it"
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return f"no GPU ({error})"
    return None if count else "no GPU that CuPy sees"
