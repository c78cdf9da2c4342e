"""How the cold part of a forward travels: transport, wire dtype and slices, by measured costs."""

from __future__ import annotations

from .chooser import Chooser, ChooserStats
from .model import LocalCost
from .rules import SLABS, Choice, Path, Policy, Shape, Times, Verdict, Work, may_take

__all__ = [
    "SLABS",
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
    "may_take",
]
