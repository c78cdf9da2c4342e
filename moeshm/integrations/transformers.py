"""Hugging Face transformers: a model whose routed experts are computed by a moeshm worker.

Importing this module registers `moeshm` with transformers' ExpertsInterface; `offload` gives the
model. UnsupportedPlatform on import: torch or transformers is missing or too old.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..backends.reference import activate
from ..client import ExpertClient
from ..connecting import connect
from ..device_arrays import ROW_VALUES
from ..errors import InvalidCall, SettingError, UnsupportedPlatform
from ..layers import LayerInfo
from ..supervisor import spawn_worker

_REMEDY = "this integration needs both, transformers 5 or later: pip install 'moeshm[transformers]'"
try:
    import torch
    import transformers
    from transformers import PreTrainedModel
    from transformers.integrations.moe import ExpertsInterface
except ImportError as error:
    raise UnsupportedPlatform(f"torch or transformers: {error}; {_REMEDY}") from error
if not transformers.utils.is_torch_available():
    raise UnsupportedPlatform(
        f"transformers {transformers.__version__} does not work with torch {torch.__version__}; "
        f"{_REMEDY}"
    )

__all__ = ["EXPERTS_IMPLEMENTATION", "offload"]

#: The name under which transformers knows experts that a moeshm worker computes.
EXPERTS_IMPLEMENTATION = "moeshm"

ModelOrPath: TypeAlias = PreTrainedModel | str | os.PathLike[str]


def offload(
    model_or_path: ModelOrPath,
    client_or_worker: ExpertClient | str,
    *,
    engine_device: str | None = None,
) -> PreTrainedModel:
    """A model whose `experts_implementation` is `moeshm` and that holds no expert weights.

    `model_or_path`: the directory of a checkpoint, whose expert tensors are not read, or a
    model, which is changed in place: its expert weights are dropped. `client_or_worker`: a
    client, which stays yours to close; `"unix:PATH"`, to connect to the worker there; or the
    name of a device such as `"cpu"`, to start a worker there on the model's directory.
    `engine_device`: as of `connect`, for a client that is opened here: a model on that GPU then
    passes activations from GPU to GPU.

    The client is `model.moeshm_client`. One that was opened here is closed when the model goes,
    or earlier by `model.moeshm_client.close()`.

    SettingError: the model cannot be offloaded, or the worker does not hold just its experts; a
    model that was passed in is then as it was. Also raises what `connect` and `spawn_worker`
    do. The forward pass raises what `ExpertClient.compute` does, and InvalidCall where a
    gradient is wanted.
    """
    if not isinstance(client_or_worker, str):
        return _offload(model_or_path, client_or_worker)
    client = _open(client_or_worker, model_or_path, engine_device)
    try:
        model = _offload(model_or_path, client)
    except BaseException:
        client.close()
        raise
    weakref.finalize(model, client.close)
    return model


def _open(worker: str, model_or_path: ModelOrPath, engine_device: str | None) -> ExpertClient:
    if worker.startswith("unix:"):
        return connect(worker, engine_device=engine_device)
    if isinstance(model_or_path, PreTrainedModel):
        model_or_path = model_or_path.name_or_path
    return spawn_worker(_directory(model_or_path), device=worker, engine_device=engine_device)


def _directory(path: str | os.PathLike[str]) -> Path:
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise SettingError(
            f"the model's path is {os.fspath(path)!r}, which is no directory with a config.json; "
            "save or download the checkpoint and pass its directory"
        )
    return directory


def _offload(model_or_path: ModelOrPath, client: ExpertClient) -> PreTrainedModel:
    if isinstance(model_or_path, PreTrainedModel):
        _attach(model_or_path, client)
        return model_or_path
    return _load_without_experts(_directory(model_or_path), client)


def _load_without_experts(directory: Path, client: ExpertClient) -> PreTrainedModel:
    """`from_pretrained` of the class that config.json names, with the experts' weights cut out
    between the model's construction, on the meta device, and its loading.

    transformers reads a tensor only if the model has a parameter for it, so it reads none of
    the experts'. All the rest (renames, tied weights, buffers, dtypes, the generation config)
    stays transformers' own work.
    """
    config = transformers.AutoConfig.from_pretrained(directory)
    _check_not_quantised(config)
    architecture = (config.architectures or ["no architecture"])[0]
    model_class: Any = getattr(transformers, architecture, None)
    if model_class is None:
        raise SettingError(
            f"{directory}: config.json names {architecture}, which is not in transformers "
            f"{transformers.__version__}; load the model yourself and pass it"
        )

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        _attach(self, client)

    known = model_class._keys_to_ignore_on_load_unexpected or ()
    body = {
        "__init__": __init__,
        # transformers knows a class by its name and module, and takes one of another module for
        # foreign code, to which its renames do not apply.
        "__module__": model_class.__module__,
        "_keys_to_ignore_on_load_unexpected": [*known, r"\.experts\."],
    }
    without_experts: Any = type(architecture, (model_class,), body)
    model: PreTrainedModel = without_experts.from_pretrained(directory, config=config)
    model.__class__ = model_class
    return model


# --- a model in memory --------------------------------------------------------------------


@dataclass(frozen=True)
class _Experts:
    """What stays of one module of experts: where it is in the model, and its sizes."""

    name: str
    layer: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    client: ExpertClient


def _attach(model: PreTrainedModel, client: ExpertClient) -> None:
    """Let the client compute the model's experts, and free their weights; all or nothing."""
    _check_not_quantised(model.config)
    modules = {
        name: module
        for name, module in model.named_modules()
        # What transformers' use_experts_implementation leaves in a class and in its instances.
        if hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    }
    if not modules:
        raise SettingError(
            f"{type(model).__name__} has no experts that transformers {transformers.__version__} "
            "lets others compute; use a MoE model whose experts_implementation can be chosen"
        )
    attached = {name: _describe(name, module, client) for name, module in modules.items()}
    _check_layers_differ(list(attached.values()))
    for name, experts in attached.items():
        _check_fits(modules[name], experts)
    for name, experts in attached.items():
        _take_over(modules[name], experts)
    # Not set_experts_implementation(), which knew no registered names in the first 5.x.
    model.config._experts_implementation = EXPERTS_IMPLEMENTATION
    model.moeshm_client = client


def _describe(name: str, module: Any, client: ExpertClient) -> _Experts:
    former: _Experts | None = getattr(module, "moeshm_experts", None)
    if former is not None:
        return replace(former, client=client)
    down_proj = getattr(module, "down_proj", None)
    has_gate = getattr(module, "gate_up_proj", None) is not None
    if down_proj is None or not has_gate or getattr(module, "has_post_expert_norm", False):
        raise SettingError(
            f"{name}: {type(module).__name__} has not just gate, up and down projections, and "
            "workers compute nothing else; use another experts_implementation"
        )
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise SettingError(
            f"{name}: the module's name has no layer number to ask a worker for; pass the model "
            "that this module is a layer of"
        )
    num_experts, *sizes = down_proj.shape
    hidden_size, intermediate_size = reversed(sizes) if module.is_transposed else sizes
    return _Experts(
        name=name,
        layer=numbers[-1],
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        client=client,
    )


def _take_over(module: Any, experts: _Experts) -> None:
    """Leave the module without weights, in a state that transformers takes for initialised."""
    for name, _ in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, None)
    module._is_hf_initialized = True
    module.config._experts_implementation = EXPERTS_IMPLEMENTATION
    module.moeshm_experts = experts


# --- does the worker hold what the model needs? -------------------------------------------


def _check_not_quantised(config: Any) -> None:
    """Quantised experts are modules of other classes, out of reach of ExpertsInterface."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        method = dict(quantisation).get("quant_method", quantisation)
        raise SettingError(
            f"the model is quantised ({method}); offload one that is stored as float32, float16 "
            "or bfloat16"
        )


def _check_layers_differ(attached: list[_Experts]) -> None:
    names: dict[int, str] = {}
    for experts in attached:
        other = names.setdefault(experts.layer, experts.name)
        if other != experts.name:
            raise SettingError(
                f"{other} and {experts.name} are both layer {experts.layer}, and a worker has one "
                "layer of a number; offload the part of the model that has one of them"
            )


def _check_fits(module: Any, experts: _Experts) -> None:
    """SettingError: the worker would compute something else than the module, or nothing."""
    layer, held = experts.layer, experts.client.layers
    info = held.get(layer)
    if info is None:
        raise SettingError(
            f"layer {layer} is not at the worker, which holds layers {sorted(held)}; start it with "
            "all MoE layers of this model"
        )
    top_k = getattr(module.config, "num_experts_per_tok", info.top_k)
    for name, wanted, found in (
        ("hidden_size", experts.hidden_size, info.hidden_size),
        ("intermediate_size", experts.intermediate_size, info.intermediate_size),
        ("num_experts", experts.num_experts, info.num_experts),
        # A call may choose fewer.
        ("top_k", max(top_k, info.top_k), info.top_k),
    ):
        if wanted != found:
            raise SettingError(
                f"layer {layer} has {name}={wanted} in the model and {found} at the worker; start "
                "the worker with this model's checkpoint"
            )
    if not info.holds_all_experts:
        raise SettingError(
            f"layer {layer}: the worker holds {len(info.experts)} chosen experts of "
            f"{info.num_experts}; start it with all of them, in the model's order"
        )
    if not _activates_alike(module, info):
        raise SettingError(
            f"layer {layer}: the worker's activation is {info.activation}, and "
            f"{type(module).__name__} computes another; start the worker with this model's "
            "checkpoint"
        )


def _activates_alike(module: Any, info: LayerInfo) -> bool:
    """True if the module's own gate gives what the worker's activation does.

    Tried out, because models name activations, limits and factors in many ways. The values go
    beyond gpt-oss's limits. How gate and up rows lie in the weights is the checkpoint's affair:
    side by side or interleaved, either will do.
    """
    values = np.linspace(-20, 20, 81)
    gate, up = (axis.ravel() for axis in np.meshgrid(values, values[::10]))
    expected = activate(info, gate, up)
    for rows in (np.concatenate([gate, up]), np.stack([gate, up], axis=1).ravel()):
        # Explicitly on the CPU: the model may be under construction on the meta device.
        probe = torch.tensor(rows[None], dtype=torch.float32, device="cpu")
        with torch.no_grad():
            found = module._apply_gate(probe)[0].numpy()
        if np.allclose(found, expected, rtol=1e-5, atol=1e-4):
            return True
    return False


# --- the forward pass ---------------------------------------------------------------------


def _forward(module: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """The experts' forward that transformers dispatches to: [n_tokens, hidden_size], twice
    [n_tokens, top_k] to [n_tokens, hidden_size], on the device and in the dtype of the first."""
    experts: _Experts | None = getattr(module, "moeshm_experts", None)
    if experts is None:
        raise InvalidCall(
            "experts_implementation='moeshm' on a model that has no worker; "
            "call moeshm.integrations.transformers.offload(model, ...)"
        )
    if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
        raise InvalidCall(
            f"layer {experts.layer}: a gradient is wanted, and experts at a worker have none; "
            "run the model under torch.no_grad() or torch.inference_mode()"
        )
    given = hidden_states, top_k_index, top_k_weights
    if _stays_on_gpu(experts.client, hidden_states):
        # Waits for the result: a lost worker must be heard of before it is used.
        return experts.client.compute(experts.layer, *(each.contiguous() for each in given))
    output = experts.client.compute(experts.layer, *(each.cpu() for each in given))
    return output.to(hidden_states.device)


def _stays_on_gpu(client: ExpertClient, hidden_states: Any) -> bool:
    """Whether the client takes such activations as they are."""
    if not hidden_states.is_cuda or client.engine_device is None:
        return False
    # torch says "cuda" of ROCm's GPUs, too.
    is_there = client.engine_device.endswith(f":{hidden_states.device.index}")
    return is_there and hidden_states.shape[1] % ROW_VALUES == 0


# Left out of compiled graphs: torch.compile would trace the client's NumPy code as its own.
ExpertsInterface.register(EXPERTS_IMPLEMENTATION, torch.compiler.disable(_forward))
