"""The version of this moeshm, as it was installed."""

from __future__ import annotations

import importlib.metadata

try:
    VERSION = importlib.metadata.version("moeshm")
except importlib.metadata.PackageNotFoundError:
    VERSION = "0+source"
