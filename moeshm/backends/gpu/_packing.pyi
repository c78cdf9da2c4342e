"""Types of the extension; the behaviour is documented in `_packing.pyx`."""

from typing import Any

def fill_tiles(target: Any, rows: Any) -> None: ...
