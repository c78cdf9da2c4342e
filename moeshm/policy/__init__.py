"""How the cold part of a forward travels: transport, wire dtype and slices, by measured costs."""

from __future__ import annotations

from .chooser import Chooser, ChooserStats
from .model import LocalCost
from .rules import Choice, Path, Policy, Shape, Times, Verdict, Work

__all__ = [
    "Choice",
    "Chooser",
    "ChooserStats",
    "LocalCost",
    "Path",
    "Policy",
    "Shape",
    "Times",
    "Verdict",
    "Work",
]
