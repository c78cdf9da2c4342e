"""Small random experts and model directories in every layout that moeshm reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeshm.checkpoint import ExpertLayer, ExpertWeights
from moeshm.dtypes import Array, DType, dtype_of, narrow
from moeshm.layers import Activation, LayerInfo

#: How the projections of an expert lie in memory.
STORAGES = ("separate", "stacked", "gpt_oss")

HIDDEN_SIZE = 24
INTERMEDIATE_SIZE = 10
NUM_EXPERTS = 6
TOP_K = 2
NUM_LAYERS = 3

_SAFETENSORS_NAMES = {DType.F32: "F32", DType.F16: "F16", DType.BF16: "BF16"}
#: model_type to the keys of config.json whose names differ between families.
_CONFIG: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {"num_experts": NUM_EXPERTS, "moe_intermediate_size": INTERMEDIATE_SIZE},
    "qwen3_moe": {"num_local_experts": NUM_EXPERTS, "moe_intermediate_size": INTERMEDIATE_SIZE},
    "qwen3_next": {"num_experts": NUM_EXPERTS, "moe_intermediate_size": INTERMEDIATE_SIZE},
    "qwen3_5_moe": {"num_experts": NUM_EXPERTS, "moe_intermediate_size": INTERMEDIATE_SIZE},
    "deepseek_v2": {"n_routed_experts": NUM_EXPERTS, "moe_intermediate_size": INTERMEDIATE_SIZE},
    "deepseek_v3": {"n_routed_experts": NUM_EXPERTS, "moe_intermediate_size": INTERMEDIATE_SIZE},
    "olmoe": {"num_experts": NUM_EXPERTS, "intermediate_size": INTERMEDIATE_SIZE},
    "mixtral": {"num_local_experts": NUM_EXPERTS, "intermediate_size": INTERMEDIATE_SIZE},
    "gpt_oss": {"num_local_experts": NUM_EXPERTS, "intermediate_size": INTERMEDIATE_SIZE},
}
MODEL_TYPES = tuple(_CONFIG)


def random_layer(
    seed: int,
    *,
    hidden_size: int = HIDDEN_SIZE,
    intermediate_size: int = INTERMEDIATE_SIZE,
    num_experts: int = NUM_EXPERTS,
    top_k: int = TOP_K,
    activation: Activation = Activation.SWIGLU,
    weight_dtype: DType = DType.F32,
    storage: str = "separate",
    has_bias: bool = False,
) -> ExpertLayer:
    """A layer whose outputs are about as large as its inputs, biases included."""
    rng = np.random.default_rng(seed)
    hidden, inner = hidden_size, intermediate_size

    def draw(*shape: int, scale: float = 1.0) -> Array:
        values = rng.standard_normal(shape) * scale
        return narrow(values.astype(np.float32), weight_dtype)

    gate_up = draw(num_experts, 2, inner, hidden, scale=2 / math.sqrt(hidden))
    down = draw(num_experts, hidden, inner, scale=2 / math.sqrt(inner))
    biases = [
        {"gate_bias": draw(inner), "up_bias": draw(inner), "down_bias": draw(hidden)}
        if has_bias
        else {}
        for _ in range(num_experts)
    ]
    if storage == "gpt_oss":
        gate_up = np.ascontiguousarray(gate_up.transpose(0, 3, 2, 1)).transpose(0, 3, 2, 1)
        down = np.ascontiguousarray(down.transpose(0, 2, 1)).transpose(0, 2, 1)
    gates, ups = gate_up[:, 0], gate_up[:, 1]
    if storage == "separate":
        gates, ups = gates.copy(), ups.copy()
    info = LayerInfo(
        hidden_size=hidden,
        intermediate_size=inner,
        num_experts=num_experts,
        top_k=top_k,
        experts=tuple(range(num_experts)),
        activation=activation,
        weight_dtype=weight_dtype,
    )
    return ExpertLayer(
        info,
        [ExpertWeights(gates[i], ups[i], down[i], **biases[i]) for i in range(num_experts)],
    )


def write_model(
    path: Path,
    model_type: str,
    *,
    stacked: bool = False,
    weight_dtype: DType = DType.BF16,
    moe_layers: Sequence[int] = tuple(range(NUM_LAYERS)),
    config: Mapping[str, Any] | None = None,
    shards: int = 0,
    seed: int = 0,
) -> dict[int, ExpertLayer]:
    """Write a model directory (experts, routers and a few tensors that are not ours) and return
    what its experts are.

    `stacked`: one tensor for all experts instead of one for each (always so for gpt_oss).
    `config`: more keys of config.json. `shards`: 0 writes model.safetensors, otherwise that
    many files and an index.
    """
    is_gpt_oss = model_type == "gpt_oss"
    layers = {
        number: random_layer(
            seed + number,
            activation=Activation.SWIGLU_CLAMPED if is_gpt_oss else Activation.SWIGLU,
            weight_dtype=weight_dtype,
            has_bias=is_gpt_oss,
        )
        for number in moe_layers
    }
    tensors: dict[str, Array] = {"model.embed_tokens.weight": np.zeros((8, HIDDEN_SIZE), "f4")}
    root = "model.language_model" if model_type == "qwen3_5_moe" else "model"
    for number, layer in layers.items():
        module = f"{root}.layers.{number}.mlp"
        tensors[f"{module}.gate.weight"] = np.zeros((NUM_EXPERTS, HIDDEN_SIZE), "f4")
        tensors[f"{module}.shared_experts.gate_proj.weight"] = np.zeros((3, HIDDEN_SIZE), "f4")
        if is_gpt_oss:
            tensors.update(_gpt_oss_tensors(f"{module}.experts", layer))
        elif stacked:
            tensors.update(_stacked_tensors(f"{module}.experts", layer))
        elif model_type == "mixtral":
            module = module.replace("mlp", "block_sparse_moe")
            tensors.update(_tensors_of_each(f"{module}.experts", layer, ("w1", "w3", "w2")))
        else:
            names = ("gate_proj", "up_proj", "down_proj")
            tensors.update(_tensors_of_each(f"{module}.experts", layer, names))
    path.mkdir(parents=True, exist_ok=True)
    write_config(path, model_type, config)
    if shards:
        write_shards(path, tensors, shards)
    else:
        save_safetensors(path / "model.safetensors", tensors)
    return layers


def write_config(path: Path, model_type: str, config: Mapping[str, Any] | None = None) -> None:
    """config.json of a model that `write_model` writes, with more keys or other values."""
    content = {
        "hidden_size": HIDDEN_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_experts_per_tok": TOP_K,
        "hidden_act": "silu",
        **_CONFIG[model_type],
        **(config or {}),
    }
    if model_type == "qwen3_5_moe":
        content = {"text_config": content}
    (path / "config.json").write_text(json.dumps({"model_type": model_type, **content}))


def write_shards(path: Path, tensors: Mapping[str, Array], shards: int) -> None:
    """The tensors dealt out to files, with their index."""
    file_of = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file_name in set(file_of.values()):
        part = {name: array for name, array in tensors.items() if file_of[name] == file_name}
        save_safetensors(path / file_name, part)
    index = {"metadata": {}, "weight_map": file_of}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def save_safetensors(
    path: Path, tensors: Mapping[str, Array], dtypes: Mapping[str, str] | None = None
) -> None:
    """A safetensors file; uint16 is written as BF16, `dtypes` names others by tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        dtype = (dtypes or {}).get(name) or _SAFETENSORS_NAMES[dtype_of(array)]
        end = offset + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensors.values())
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def _tensors_of_each(
    module: str, layer: ExpertLayer, names: tuple[str, str, str]
) -> dict[str, Array]:
    tensors = {}
    for number in range(len(layer)):
        weights = layer.expert(number)
        arrays = (weights.gate_proj, weights.up_proj, weights.down_proj)
        for name, array in zip(names, arrays, strict=True):
            tensors[f"{module}.{number}.{name}.weight"] = array
    return tensors


def _stacked_tensors(module: str, layer: ExpertLayer) -> dict[str, Array]:
    experts = [layer.expert(number) for number in range(len(layer))]
    gate_up = [np.concatenate([each.gate_proj, each.up_proj]) for each in experts]
    return {
        f"{module}.gate_up_proj": np.stack(gate_up),
        f"{module}.down_proj": np.stack([each.down_proj for each in experts]),
    }


def _gpt_oss_tensors(module: str, layer: ExpertLayer) -> dict[str, Array]:
    experts = [layer.expert(number) for number in range(len(layer))]
    gate_up = np.stack([np.stack([each.gate_proj, each.up_proj], 1) for each in experts])
    gates, ups = _biases(experts, "gate_bias"), _biases(experts, "up_bias")
    count = len(experts)
    return {
        f"{module}.gate_up_proj": gate_up.reshape(count, -1, HIDDEN_SIZE).swapaxes(1, 2),
        f"{module}.gate_up_proj_bias": np.stack([gates, ups], 2).reshape(count, -1),
        f"{module}.down_proj": np.stack([each.down_proj.T for each in experts]),
        f"{module}.down_proj_bias": _biases(experts, "down_bias"),
    }


def _biases(experts: Sequence[ExpertWeights], name: str) -> Array:
    return np.stack([getattr(each, name) for each in experts])
