"""Programs in the place of those that a benchmark starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import msgspec
import pytest


def scripted(
    monkeypatch: pytest.MonkeyPatch,
    benchmark: ModuleType,
    *outputs: tuple[Sequence[msgspec.Struct], int],
) -> list[Any]:
    """Processes that print these lines and end with that status; what each was asked."""
    asked: list[Any] = []
    left = list(outputs)

    def command(setup: Any) -> list[str]:
        asked.append(setup)
        lines, status = left.pop(0)
        text = "\n".join(msgspec.json.encode(line).decode() for line in lines)
        program = f"import sys; print({text!r}); sys.stderr.write('lost\\n'); sys.exit({status})"
        return [sys.executable, "-c", program]

    monkeypatch.setattr(benchmark, "_command", command)
    return asked
