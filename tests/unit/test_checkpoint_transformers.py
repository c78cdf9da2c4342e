"""Checkpoints that transformers itself writes: the same experts, the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT_ATTENTION: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
QWEN = {"num_experts": 6, "moe_intermediate_size": 10, "intermediate_size": 40}
QWEN_NEXT = {**QWEN, "layer_types": ["full_attention"] * 3}
DEEPSEEK = {
    **LATENT_ATTENTION,
    "n_routed_experts": 6,
    "moe_intermediate_size": 10,
    "first_k_dense_replace": 1,
}
#: model_type: keys of its config, and its MoE layers.
MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "qwen2_moe": ({**QWEN, "decoder_sparse_step": 2}, (1,)),
    "qwen3_moe": ({**QWEN, "mlp_only_layers": [1]}, (0, 2)),
    "qwen3_next": (QWEN_NEXT, (0, 1, 2)),
    "qwen3_5_moe_text": (QWEN_NEXT, (0, 1, 2)),
    "mixtral": (
        {"num_local_experts": 6, "intermediate_size": 10, "hidden_act": "gelu"},
        (0, 1, 2),
    ),
    "deepseek_v2": (DEEPSEEK, (1, 2)),
    "deepseek_v3": ({**DEEPSEEK, "n_group": 2, "topk_group": 1}, (1, 2)),
    "olmoe": (
        {"num_experts": 6, "intermediate_size": 10, "hidden_act": "gelu_pytorch_tanh"},
        (0, 1, 2),
    ),
    "gpt_oss": ({"num_local_experts": 6, "intermediate_size": 10}, (0, 1, 2)),
}


def build(model_type: str) -> Any:
    """A small random model, with weights large enough to reach gpt-oss's clamp."""
    keys, _ = MODELS[model_type]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **keys})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("original_format", [True, False], ids=["as_published", "as_in_memory"])
def test_experts_compute_what_transformers_computes(
    tmp_path: Path, model_type: str, original_format: bool
) -> None:
    model = build(model_type)
    model.save_pretrained(tmp_path, save_original_format=original_format)
    checkpoint = load(tmp_path)
    assert tuple(checkpoint.layers) == MODELS[model_type][1]

    x = torch.randn(9, 24) * 3
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(9)])
    weights = torch.rand(9, 2)
    for number, layer in checkpoint.layers.items():
        experts = model.model.layers[number].mlp.experts
        with torch.no_grad():
            expected = experts(x, ids, weights).numpy()
        found = reference_ffn(layer, x.numpy(), ids.numpy().astype(np.int32), weights.numpy())
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 1e-6, f"layer {number}"


def test_the_text_model_inside_a_larger_one(tmp_path: Path) -> None:
    text = {**SIZES, **QWEN_NEXT}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = transformers.Qwen3_5MoeConfig(
        text_config=text,
        vision_config={**vision, "out_hidden_size": 24, "num_position_embeddings": 16},
    )
    model = transformers.Qwen3_5MoeForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    checkpoint = load(tmp_path)
    assert checkpoint.model_type == "qwen3_5_moe"
    for number, layer in checkpoint.layers.items():
        experts = model.model.language_model.layers[number].mlp.experts
        gate_up = experts.gate_up_proj.detach().float().numpy()
        np.testing.assert_array_equal(layer.expert(5).gate_proj, gate_up[5, :10])
        np.testing.assert_array_equal(layer.expert(5).up_proj, gate_up[5, 10:])
