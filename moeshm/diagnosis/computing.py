"""What the CPU backend computes with, and the settings that moeshm runs under."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from .. import settings
from ..errors import SettingError
from .finding import Finding

THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "OMP_NUM_THREADS",
)


def check_blas() -> Finding:
    """What multiplies matrices under NumPy, and the variables that set its threads."""
    blas = _numpy_config().get("Build Dependencies", {}).get("blas", {})
    if not blas.get("found"):
        return Finding(
            "blas",
            "degraded",
            "NumPy was built without one: the CPU backend is slow",
            "pip install --force-reinstall --only-binary numpy numpy",
        )
    chosen = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if name in os.environ]
    threads = ", ".join(chosen) or "threads: its own default"
    return Finding("blas", "ok", f"{blas.get('name')} {blas.get('version')}, {threads}")


def check_simd() -> Finding:
    """CPU features that NumPy uses: those it was built for, and more that it found here."""
    simd = _numpy_config().get("SIMD Extensions", {})
    baseline, found = (" ".join(simd.get(key, ())) or "none" for key in ("baseline", "found"))
    return Finding("simd", "ok", f"baseline {baseline}; found {found}")


def check_settings() -> Finding:
    """The MOESHM_* variables in force."""
    try:
        current = settings.current()
    except SettingError as error:
        return Finding("settings", "missing", str(error), "correct or unset the variable")
    values = msgspec.structs.asdict(current)
    return Finding("settings", "ok", " ".join(f"{name}={value}" for name, value in values.items()))


def _numpy_config() -> dict[str, Any]:
    import numpy as np

    return dict(np.show_config(mode="dicts"))
