"""Experts' weights from disk: a model directory in, one `ExpertLayer` per MoE layer out."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..errors import CheckpointError, SettingError
from ..layers import format_ranges, parse_ranges
from .layer import ExpertLayer, ExpertWeights
from .layouts import Layout
from .safetensors_dir import TensorDirectory

__all__ = [
    "Checkpoint",
    "ExpertLayer",
    "ExpertWeights",
    "ModelDirectory",
    "TensorDirectory",
    "load",
    "read_experts_file",
]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The loaded MoE layers of a model; the weights stay in the mapped files."""

    layers: dict[int, ExpertLayer]
    model_type: str
    #: config.json as it is.
    config: dict[str, Any]


class ModelDirectory:
    """A Hugging Face model directory, whose headers are read once, however often experts are
    loaded from it; by one thread at a time. What is loaded later comes from the same files, or is
    refused.

    CheckpointError: an unknown model type, no MoE layer, a damaged file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        directory = self._directory = TensorDirectory(path)
        self.path = directory.path
        self._config = _read_config(directory.path / "config.json")
        self._layout = Layout(directory, self._config)
        if not self._layout.moe_layers:
            raise CheckpointError(
                f"{directory.path}: this {self._layout.model_type} has no MoE layers; "
                "there is nothing for a worker to do"
            )

    def load(
        self,
        layers: Collection[int] | None = None,
        experts: Mapping[int, Sequence[int]] | None = None,
    ) -> Checkpoint:
        """As `load`, which see; CheckpointError also when a file was changed meanwhile."""
        self._directory.check_unchanged()
        layout = self._layout
        experts = {} if experts is None else experts
        if layers is None:
            layers = experts or layout.moe_layers
        _check_layers(layout, {*layers, *experts})
        chosen = {layer: experts.get(layer, range(layout.num_experts)) for layer in sorted(layers)}
        for layer, ids in chosen.items():
            _check_ids(layout, layer, ids)
        return Checkpoint(
            layers={layer: layout.layer(layer, ids) for layer, ids in chosen.items()},
            model_type=layout.model_type,
            config=self._config,
        )


def load(
    path: str | os.PathLike[str],
    layers: Collection[int] | None = None,
    experts: Mapping[int, Sequence[int]] | None = None,
) -> Checkpoint:
    """The routed experts of a Hugging Face model directory.

    `layers`: the MoE layers to load; by default those that `experts` names, else all.
    `experts`: for some layers, the global ids to hold, in local order; all of them elsewhere.
    Only tensors of these experts are looked at. CheckpointError: an unknown model type, a layer
    that is no MoE layer, an id that the model lacks, a missing or misshapen tensor.
    """
    return ModelDirectory(path).load(layers, experts)


def read_experts_file(path: str | os.PathLike[str]) -> dict[int, tuple[int, ...]]:
    """The global expert ids that a JSON file like `{"3": "0-7,12", "4": [0, 1, 2]}` lists.

    Keys are layers; a value is a text of ranges or a list of ids. SettingError: the file cannot
    be read or has another form.
    """
    try:
        content = msgspec.json.decode(Path(path).read_bytes(), type=dict[int, str | list[int]])
    except (OSError, msgspec.MsgspecError) as error:
        raise SettingError(
            f'experts file {path}: {error}; write it like {{"3": "0-7,12", "4": [0, 1, 2]}}'
        ) from error
    ids: dict[int, tuple[int, ...]] = {}
    for layer, value in content.items():
        try:
            ids[layer] = parse_ranges(value) if isinstance(value, str) else tuple(value)
        except ValueError as error:
            raise SettingError(f"experts file {path}: layer {layer}: {error}") from None
    return ids


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a model directory has one") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _check_layers(layout: Layout, layers: set[int]) -> None:
    wrong = sorted(layers.difference(layout.moe_layers))
    if wrong:
        raise CheckpointError(
            f"{_numbers('layer', wrong)} cannot be loaded; the MoE layers of this "
            f"{layout.model_type} are {format_ranges(layout.moe_layers)}"
        )


def _check_ids(layout: Layout, layer: int, ids: Sequence[int]) -> None:
    wrong = [expert for expert in ids if not 0 <= expert < layout.num_experts]
    if wrong:
        raise CheckpointError(
            f"layer {layer} has no {_numbers('expert', wrong)}; "
            f"its experts are 0-{layout.num_experts - 1}"
        )
    if len(set(ids)) != len(ids):
        raise CheckpointError(f"layer {layer}: an expert is asked for twice in {list(ids)}")
    if not ids:
        raise CheckpointError(f"layer {layer}: no expert is asked for; leave the layer out")


def _numbers(noun: str, numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers))
    return f"{noun} {listed}" if len(numbers) == 1 else f"{noun}s {listed}"
