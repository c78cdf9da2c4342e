"""A small trained model that ships with moeshm, and what runs its dense part."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def tiny_moe_path() -> Path:
    """The directory of the bundled checkpoint: config.json, model.safetensors, model card."""
    return Path(str(files(__name__) / "tiny_moe"))
