"""Model directories: every layout is read right, and what is wrong says so by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moeshm.checkpoint import (
    ExpertLayer,
    ExpertWeights,
    TensorDirectory,
    load,
    read_experts_file,
)
from moeshm.dtypes import Array, DType
from moeshm.errors import CheckpointError, SettingError
from moeshm.layers import Activation
from tests import checkpoints as ck

PARTS = ("gate_proj", "up_proj", "down_proj", "gate_bias", "up_bias", "down_bias")


def assert_same_experts(
    found: ExpertLayer, written: ExpertLayer, experts: Sequence[int] = range(ck.NUM_EXPERTS)
) -> None:
    assert found.info.experts == tuple(experts)
    assert len(found) == len(experts)
    for local_id, expert in enumerate(experts):
        for part in PARTS:
            expected: Array | None = getattr(written.expert(expert), part)
            actual: Array | None = getattr(found.expert(local_id), part)
            if expected is None:
                assert actual is None
            else:
                assert actual is not None
                np.testing.assert_array_equal(actual, expected, err_msg=f"{expert} {part}")


# --- layouts ----------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ck.MODEL_TYPES)
@pytest.mark.parametrize("stacked", [False, True])
def test_each_layout_gives_back_the_experts_that_were_written(
    tmp_path: Path, model_type: str, stacked: bool
) -> None:
    written = ck.write_model(tmp_path, model_type, stacked=stacked)
    checkpoint = load(tmp_path)
    assert checkpoint.model_type == model_type
    assert checkpoint.config["model_type"] == model_type
    assert list(checkpoint.layers) == [0, 1, 2]
    for number, layer in checkpoint.layers.items():
        assert layer.info.hidden_size == ck.HIDDEN_SIZE
        assert layer.info.intermediate_size == ck.INTERMEDIATE_SIZE
        assert layer.info.num_experts == ck.NUM_EXPERTS
        assert layer.info.top_k == ck.TOP_K
        assert layer.info.weight_dtype is DType.BF16
        assert_same_experts(layer, written[number])


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_every_dtype_and_sharding(tmp_path: Path, dtype: DType, shards: int) -> None:
    written = ck.write_model(tmp_path, "qwen3_moe", weight_dtype=dtype, shards=shards)
    for number, layer in load(tmp_path).layers.items():
        assert layer.info.weight_dtype is dtype
        assert_same_experts(layer, written[number])


@pytest.mark.parametrize(
    ("model_type", "config", "moe_layers"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 2}, (1,)),
        ("qwen3_moe", {"mlp_only_layers": [1]}, (0, 2)),
        ("deepseek_v2", {"first_k_dense_replace": 1}, (1, 2)),
        ("deepseek_v3", {"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2,)),
    ],
)
def test_dense_layers_are_left_out(
    tmp_path: Path, model_type: str, config: dict[str, object], moe_layers: tuple[int, ...]
) -> None:
    ck.write_model(tmp_path, model_type, moe_layers=moe_layers, config=config)
    assert tuple(load(tmp_path).layers) == moe_layers


@pytest.mark.parametrize(
    ("hidden_act", "activation"),
    [
        ("silu", Activation.SWIGLU),
        ("gelu", Activation.GEGLU),
        ("gelu_pytorch_tanh", Activation.GEGLU_TANH),
    ],
)
def test_hidden_act(tmp_path: Path, hidden_act: str, activation: Activation) -> None:
    ck.write_model(tmp_path, "mixtral", config={"hidden_act": hidden_act})
    assert load(tmp_path).layers[0].info.activation is activation


def test_gpt_oss_clamp_comes_from_the_config(tmp_path: Path) -> None:
    ck.write_model(tmp_path, "gpt_oss", config={"swiglu_limit": 5.0, "swiglu_alpha": 1.5})
    info = load(tmp_path).layers[0].info
    assert info.activation is Activation.SWIGLU_CLAMPED
    assert (info.activation_limit, info.activation_alpha) == (5.0, 1.5)


def test_gpt_oss_clamp_defaults(tmp_path: Path) -> None:
    ck.write_model(tmp_path, "gpt_oss")
    info = load(tmp_path).layers[0].info
    assert (info.activation_limit, info.activation_alpha) == (7.0, 1.702)


# --- which layers and experts -----------------------------------------------------------


@pytest.mark.parametrize(("model_type", "stacked"), [("qwen3_moe", False), ("gpt_oss", True)])
def test_experts_come_in_the_order_asked_for(
    tmp_path: Path, model_type: str, stacked: bool
) -> None:
    written = ck.write_model(tmp_path, model_type, stacked=stacked)
    loaded = load(tmp_path, experts={1: [4, 0, 5]}).layers
    assert list(loaded) == [1]
    assert_same_experts(loaded[1], written[1], [4, 0, 5])
    assert not loaded[1].info.holds_all_experts


def test_layers_without_a_list_are_whole(tmp_path: Path) -> None:
    written = ck.write_model(tmp_path, "olmoe")
    loaded = load(tmp_path, layers=[2, 0], experts={0: [3], 1: [0]}).layers
    assert list(loaded) == [0, 2]
    assert_same_experts(loaded[0], written[0], [3])
    assert_same_experts(loaded[2], written[2])


def test_only_the_experts_asked_for_are_touched(tmp_path: Path) -> None:
    """Another expert's tensor is missing, a third one's is misshapen: expert 2 still loads."""
    written = ck.write_model(tmp_path, "qwen3_moe")
    directory = TensorDirectory(tmp_path)
    tensors = {name: directory.tensor(name) for name in directory.names()}
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    tensors["model.layers.1.mlp.experts.4.down_proj.weight"] = np.zeros((5, 5), np.float32)
    broken = tmp_path / "broken"
    broken.mkdir()
    ck.write_config(broken, "qwen3_moe")
    ck.save_safetensors(broken / "model.safetensors", tensors)

    loaded = load(broken, experts={1: [2]})
    assert_same_experts(loaded.layers[1], written[1], [2])
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.3\.up_proj\.weight"):
        load(broken, experts={1: [2, 3]})
    with pytest.raises(CheckpointError, match=r"experts\.4\.down_proj.*\[5, 5\].*\[24, 10\]"):
        load(broken, experts={1: [4]})


def test_a_shard_that_nobody_asked_for_may_be_missing(tmp_path: Path) -> None:
    written = ck.write_model(tmp_path, "qwen3_moe", shards=40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if "layers.0.mlp.experts.1." in name}
    for file in set(index.values()) - needed:
        (tmp_path / file).unlink()
    assert_same_experts(load(tmp_path, experts={0: [1]}).layers[0], written[0], [1])
    with pytest.raises(CheckpointError, match=r"model-\d+-of-00040\.safetensors is missing"):
        load(tmp_path, experts={0: [2]})


@pytest.mark.parametrize("layers", [[1], [0, 7], [-1]])
def test_a_layer_that_is_no_moe_layer(tmp_path: Path, layers: list[int]) -> None:
    ck.write_model(tmp_path, "qwen3_moe", moe_layers=(0, 2), config={"mlp_only_layers": [1]})
    wrong = layers[-1]
    with pytest.raises(CheckpointError, match=f"layer {wrong} .*MoE layers .* are 0, 2"):
        load(tmp_path, layers=layers)
    with pytest.raises(CheckpointError, match=f"layer {wrong} .*MoE layers .* are 0, 2"):
        load(tmp_path, experts={wrong: [0]})


def test_the_moe_layers_are_named_in_ranges(tmp_path: Path) -> None:
    ck.write_model(tmp_path, "mixtral")
    with pytest.raises(CheckpointError, match=r"layers 4, 9 cannot.* are 0-2$"):
        load(tmp_path, layers=[9, 4])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 6], "layer 1 has no expert 6; its experts are 0-5"),
        ([-1], "layer 1 has no expert -1"),
        ([2, 2], "twice"),
        ([], "leave the layer out"),
    ],
)
def test_expert_ids_that_cannot_be(tmp_path: Path, ids: list[int], message: str) -> None:
    ck.write_model(tmp_path, "qwen3_moe")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, experts={1: ids})


# --- what is wrong with a model ---------------------------------------------------------


@pytest.mark.parametrize(("model_type", "stacked"), [("qwen3_moe", True), ("gpt_oss", True)])
def test_misshapen_stacked_tensors_name_both_shapes(
    tmp_path: Path, model_type: str, stacked: bool
) -> None:
    ck.write_model(tmp_path, model_type, stacked=stacked)
    size = {"qwen3_moe": "moe_intermediate_size", "gpt_oss": "intermediate_size"}[model_type]
    ck.write_config(tmp_path, model_type, {size: 11})
    shapes = {"qwen3_moe": r"\[6, 20, 24\].*\[6, 22, 24\]", "gpt_oss": r"\[6, 24, 20\].*24, 22\]"}
    with pytest.raises(CheckpointError, match=rf"gate_up_proj' has shape {shapes[model_type]}"):
        load(tmp_path)


def test_a_layer_without_expert_tensors(tmp_path: Path) -> None:
    ck.write_model(tmp_path, "qwen3_moe", moe_layers=(0, 1))
    with pytest.raises(CheckpointError, match=r"layer 2 .*no expert tensors.*layers\.2\.mlp\.exp"):
        load(tmp_path)


def test_two_weight_dtypes_in_a_layer(tmp_path: Path) -> None:
    ck.write_model(tmp_path, "qwen3_moe")
    directory = TensorDirectory(tmp_path)
    tensors = {name: directory.tensor(name) for name in directory.names()}
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    ck.save_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="up_proj of expert 3 is f32, but the layer is bf16"):
        load(tmp_path, layers=[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama' is not known; moeshm reads qwen2_moe, "),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not known; moeshm computes silu, gelu"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_local_experts": None}, "no num_experts or num_local_experts"),
        ({"num_experts_per_tok": "2"}, "num_experts_per_tok='2'; it must be a positive integer"),
    ],
)
def test_config_that_does_not_do(tmp_path: Path, change: dict[str, object], message: str) -> None:
    ck.write_model(tmp_path, "qwen3_moe")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_config_missing_or_no_json(tmp_path: Path) -> None:
    ck.write_model(tmp_path, "qwen3_moe")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_fp8_is_refused_by_name_with_the_remedy(tmp_path: Path, dtype: str) -> None:
    ck.write_model(tmp_path, "deepseek_v3")
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    halved = np.zeros((ck.INTERMEDIATE_SIZE, ck.HIDDEN_SIZE // 2), np.uint16)
    ck.save_safetensors(tmp_path / "model.safetensors", {name: halved})
    raw = (tmp_path / "model.safetensors").read_bytes()
    as_fp8 = raw.replace(b'"BF16", "shape": [10, 12]', f'"{dtype}", "shape": [10, 24]'.encode())
    length = int.from_bytes(raw[:8], "little") + len(as_fp8) - len(raw)
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + as_fp8[8:])
    with pytest.raises(CheckpointError, match=rf"{name}.* is {dtype}; .*dequantize=True"):
        load(tmp_path, experts={0: [0]})


def test_mxfp4_is_refused_by_name_with_the_remedy(tmp_path: Path) -> None:
    ck.write_model(tmp_path, "gpt_oss")
    directory = TensorDirectory(tmp_path)
    tensors = {
        name.replace("gate_up_proj", "gate_up_proj_blocks"): directory.tensor(name)
        for name in directory.names()
    }
    ck.save_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"gate_up_proj'; .*MXFP4.*dequantize=True"):
        load(tmp_path)


def test_a_hand_made_layer_is_checked() -> None:
    layer = ck.random_layer(0)
    good = [layer.expert(i) for i in range(ck.NUM_EXPERTS)]
    with pytest.raises(CheckpointError, match="5 experts for 6 ids"):
        ExpertLayer(layer.info, good[:-1])
    bad = ExpertWeights(good[0].gate_proj, good[0].up_proj.T, good[0].down_proj)
    with pytest.raises(CheckpointError, match=r"up_proj of expert 5 has shape \[24, 10\]"):
        ExpertLayer(layer.info, [*good[:-1], bad])


def test_nbytes_counts_projections_and_biases() -> None:
    expert = ck.random_layer(0, weight_dtype=DType.F16, has_bias=True).expert(0)
    assert expert.nbytes == 2 * (3 * 24 * 10 + 10 + 10 + 24)


# --- experts file -----------------------------------------------------------------------


def test_experts_file(tmp_path: Path) -> None:
    path = tmp_path / "experts.json"
    path.write_text('{"3": "0-2,7", "4": [5, 1]}')
    assert read_experts_file(path) == {3: (0, 1, 2, 7), 4: (5, 1)}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"x": "0"}', '{"3": 4}', '{"3": "4-"}', '{"3": ["4"]}', '{"3": "7-4"}']
)
def test_experts_file_that_does_not_parse(tmp_path: Path, text: str) -> None:
    path = tmp_path / "experts.json"
    path.write_text(text)
    with pytest.raises(SettingError, match=r"experts file .*experts\.json: "):
        read_experts_file(path)


def test_experts_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="No such file"):
        read_experts_file(tmp_path / "experts.json")


def test_a_model_without_moe_layers_is_refused(tmp_path: Path) -> None:
    ck.write_model(tmp_path, "qwen3_moe", config={"mlp_only_layers": list(range(ck.NUM_LAYERS))})
    with pytest.raises(CheckpointError, match="this qwen3_moe has no MoE layers"):
        load(tmp_path)


@pytest.mark.parametrize("model_type", ck.MODEL_TYPES)
def test_an_expert_can_be_touched(tmp_path: Path, model_type: str) -> None:
    number, layer = next(iter(ck.write_model(tmp_path, model_type, moe_layers=[2]).items()))
    expert = load(tmp_path, [number]).layers[number].expert(0)
    expert.touch()
    np.testing.assert_array_equal(expert.down_proj, layer.expert(0).down_proj)
