"""Hugging Face layouts: which layers are MoE layers, and where their experts' tensors are.

Names and shapes follow transformers (the `modeling_*.py` and `conversion_mapping.py` of 5.x).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..dtypes import Array, dtype_of
from ..errors import CheckpointError
from ..layers import Activation, LayerInfo
from .layer import ExpertLayer, ExpertWeights
from .safetensors_dir import TensorDirectory

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """What the model types of one family share."""

    is_moe_layer: Callable[[Config, int], bool]
    #: The key of config.json with the number of routed experts: the first that is there.
    num_experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    intermediate_size_key: str = "moe_intermediate_size"
    #: Names of gate, up and down in per-expert tensors.
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    #: gpt-oss: stacked [E, in, out] with gate and up interleaved, and biases.
    is_gpt_oss: bool = False


def _every_layer(_config: Config, _layer: int) -> bool:
    return True


def _qwen(config: Config, layer: int) -> bool:
    if layer in (config.get("mlp_only_layers") or ()):
        return False
    return (layer + 1) % int(config.get("decoder_sparse_step") or 1) == 0


def _deepseek(config: Config, layer: int) -> bool:
    first = int(config.get("first_k_dense_replace") or 0)
    return layer >= first and layer % int(config.get("moe_layer_freq") or 1) == 0


_QWEN = Family(_qwen)
_QWEN_3_5 = Family(_every_layer)
_DEEPSEEK = Family(_deepseek, num_experts_keys=("n_routed_experts",))

FAMILIES: Mapping[str, Family] = {
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "qwen3_next": _QWEN,
    "qwen3_5_moe": _QWEN_3_5,
    "qwen3_5_moe_text": _QWEN_3_5,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "olmoe": Family(_every_layer, intermediate_size_key="intermediate_size"),
    "mixtral": Family(
        _every_layer,
        intermediate_size_key="intermediate_size",
        projections=("w1", "w3", "w2"),
    ),
    "gpt_oss": Family(_every_layer, intermediate_size_key="intermediate_size", is_gpt_oss=True),
}

_ACTIVATIONS = {
    "silu": Activation.SWIGLU,
    "gelu": Activation.GEGLU,
    "gelu_pytorch_tanh": Activation.GEGLU_TANH,
}

#: Where a model's `layers.N` are: in a language model, and in the text half of a larger one.
_ROOTS = ("model", "model.language_model", "language_model.model")
_MLPS = ("mlp", "block_sparse_moe")


class Layout:
    """The MoE layers of one checkpoint, built on demand.

    CheckpointError: config.json lacks a key or names a model type that is not in FAMILIES.
    """

    def __init__(self, directory: TensorDirectory, config: Config) -> None:
        self.model_type = str(config.get("model_type"))
        try:
            self._family = FAMILIES[self.model_type]
        except KeyError:
            raise CheckpointError(
                f"{directory.path}: model_type {self.model_type!r} is not known; "
                f"moeshm reads {', '.join(FAMILIES)}"
            ) from None
        self._directory = directory
        self._config: Config = config.get("text_config") or config
        self.hidden_size = self._number("hidden_size")
        self.intermediate_size = self._number(self._family.intermediate_size_key)
        self.num_experts = self._number(*self._family.num_experts_keys)
        self.top_k = self._number("num_experts_per_tok")
        self.activation = self._activation()
        self.moe_layers = tuple(
            layer
            for layer in range(self._number("num_hidden_layers"))
            if self._family.is_moe_layer(self._config, layer)
        )
        self._modules = _expert_modules(directory.names())

    def layer(self, layer: int, experts: Sequence[int]) -> ExpertLayer:
        """The given experts (at least one) of an MoE layer, in that order; only their tensors
        are looked at.

        CheckpointError: a tensor is missing or has another shape than config.json implies.
        """
        module = self._module(layer)
        if self._family.is_gpt_oss:
            weights = self._gpt_oss(module, experts)
        elif "gate_up_proj" in self._modules[module]:
            weights = self._stacked(module, experts)
        else:
            weights = [self._expert(f"{module}.{expert}") for expert in experts]
        info = LayerInfo(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_experts=self.num_experts,
            top_k=self.top_k,
            experts=tuple(experts),
            activation=self.activation,
            weight_dtype=dtype_of(weights[0].gate_proj),
            **self._clamp(),
        )
        try:
            return ExpertLayer(info, weights)
        except CheckpointError as error:
            raise CheckpointError(f"{self._directory.path}: {module}: {error}") from error

    # --- tensors --------------------------------------------------------------------------

    def _module(self, layer: int) -> str:
        """The name of the layer's experts, up to the number or name of a tensor."""
        candidates = [f"{root}.layers.{layer}.{mlp}.experts" for root in _ROOTS for mlp in _MLPS]
        for module in candidates:
            if module in self._modules:
                return module
        raise CheckpointError(
            f"{self._directory.path}: layer {layer} of this {self.model_type} has no expert "
            f"tensors; looked for {', '.join(f'{module}.*' for module in candidates)}"
        )

    def _expert(self, prefix: str) -> ExpertWeights:
        """One expert in tensors of its own."""
        rows = (self.intermediate_size, self.hidden_size)
        gate, up, down = self._family.projections
        return ExpertWeights(
            gate_proj=self._tensor(f"{prefix}.{gate}.weight", rows),
            up_proj=self._tensor(f"{prefix}.{up}.weight", rows),
            down_proj=self._tensor(f"{prefix}.{down}.weight", rows[::-1]),
        )

    def _stacked(self, module: str, experts: Sequence[int]) -> list[ExpertWeights]:
        """`gate_up_proj` [E, 2 I, H], gate first, and `down_proj` [E, H, I]."""
        count, inner, hidden = self.num_experts, self.intermediate_size, self.hidden_size
        gate_up = self._tensor(f"{module}.gate_up_proj", (count, 2 * inner, hidden))
        down = self._tensor(f"{module}.down_proj", (count, hidden, inner))
        return [
            ExpertWeights(
                gate_proj=gate_up[expert, :inner],
                up_proj=gate_up[expert, inner:],
                down_proj=down[expert],
            )
            for expert in experts
        ]

    def _gpt_oss(self, module: str, experts: Sequence[int]) -> list[ExpertWeights]:
        """`gate_up_proj` [E, H, 2 I], even columns gate and odd ones up, `down_proj` [E, I, H],
        both applied as `x @ proj`, and biases in the same order."""
        count, inner, hidden = self.num_experts, self.intermediate_size, self.hidden_size
        gate_up = self._tensor(f"{module}.gate_up_proj", (count, hidden, 2 * inner))
        gate_up_bias = self._tensor(f"{module}.gate_up_proj_bias", (count, 2 * inner))
        down = self._tensor(f"{module}.down_proj", (count, inner, hidden))
        down_bias = self._tensor(f"{module}.down_proj_bias", (count, hidden))
        return [
            ExpertWeights(
                gate_proj=gate_up[expert, :, 0::2].T,
                up_proj=gate_up[expert, :, 1::2].T,
                down_proj=down[expert].T,
                gate_bias=gate_up_bias[expert, 0::2],
                up_bias=gate_up_bias[expert, 1::2],
                down_bias=down_bias[expert],
            )
            for expert in experts
        ]

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Array:
        found = self._directory.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{self._directory.path}: tensor {name!r} has shape {list(found)}; "
                f"config.json implies {list(shape)}"
            )
        return self._directory.tensor(name)

    # --- config.json ----------------------------------------------------------------------

    def _number(self, *keys: str) -> int:
        """The first of the keys that is there, as a positive integer."""
        for key in keys:
            value = self._config.get(key)
            if isinstance(value, int) and value > 0:
                return value
            if value is not None:
                raise CheckpointError(
                    f"{self._directory.path}: config.json has {key}={value!r}; "
                    "it must be a positive integer"
                )
        raise CheckpointError(f"{self._directory.path}: config.json has no {' or '.join(keys)}")

    def _activation(self) -> Activation:
        if self._family.is_gpt_oss:
            return Activation.SWIGLU_CLAMPED
        name = self._config.get("hidden_act", "silu")
        try:
            return _ACTIVATIONS[name]
        except (KeyError, TypeError):
            raise CheckpointError(
                f"{self._directory.path}: hidden_act {name!r} is not known; "
                f"moeshm computes {', '.join(_ACTIVATIONS)}"
            ) from None

    def _clamp(self) -> dict[str, float]:
        names = {"swiglu_alpha": "activation_alpha", "swiglu_limit": "activation_limit"}
        return {
            field: float(self._config[key])
            for key, field in names.items()
            if self._family.is_gpt_oss and self._config.get(key) is not None
        }


def _expert_modules(names: Sequence[str]) -> Mapping[str, set[str]]:
    """For every `….experts` in the names, what comes right after it: expert numbers, or the
    names of stacked tensors."""
    modules: dict[str, set[str]] = {}
    for name in names:
        module, found, rest = name.partition(".experts.")
        if found:
            modules.setdefault(f"{module}.experts", set()).add(rest.partition(".")[0])
    return modules
