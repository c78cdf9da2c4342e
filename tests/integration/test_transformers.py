"""transformers models whose experts a worker computes: the same logits, the same text."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import msgspec
import pytest

import moeshm
from moeshm.demo import tiny_moe_path
from moeshm.errors import ClientClosed, InvalidCall, SettingError, UnsupportedPlatform
from moeshm.layers import Activation, LayerInfo

torch = pytest.importorskip("torch", reason="the integration is with torch models")
transformers = pytest.importorskip(
    "transformers", minversion="5", reason="ExpertsInterface came with transformers 5"
)

from safetensors.torch import load_file, save_file  # noqa: E402

import moeshm.integrations.transformers as integration  # noqa: E402
from moeshm.integrations.transformers import offload  # noqa: E402

PROMPT = b"\0import os\n\n\ndef main("
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
QWEN = {"num_experts": 6, "moe_intermediate_size": 10, "intermediate_size": 40}
DEEPSEEK = {
    "n_routed_experts": 6,
    "moe_intermediate_size": 10,
    "intermediate_size": 40,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
LOCAL = {"num_local_experts": 6, "intermediate_size": 10}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**QWEN, "mlp_only_layers": [1], "tie_word_embeddings": True},
    "mixtral": {**LOCAL, "hidden_act": "gelu"},
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": LOCAL,
}


class Layers:
    """A client as far as `offload` looks at it before the first call."""

    def __init__(self, layers: dict[int, LayerInfo]) -> None:
        self.layers = layers


def build(model_type: str) -> Any:
    """A small random model, with weights large enough to reach gpt-oss's clamp."""
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES[model_type]})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    enlarge_experts(model)
    return model


def enlarge_experts(model: Any) -> None:
    model.eval().set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            torch.nn.init.normal_(parameter, std=0.5)


def random_ids() -> Any:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(7))


def prompt() -> Any:
    return torch.tensor([list(PROMPT)])


def logits(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        return model(ids).logits.float()


def text(model: Any, ids: Any, tokens: int) -> list[list[int]]:
    """Greedy decoding, the end of text ignored."""
    mask = torch.ones_like(ids)
    generated = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )
    return generated.tolist()  # type: ignore[no-any-return]


def relative_error(found: Any, expected: Any) -> float:
    return float((found - expected).norm() / expected.norm())


def expert_parameters(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".experts." in name]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def worker() -> Iterator[Any]:
    """A client of a worker that holds the bundled model's experts."""
    with moeshm.spawn_worker(tiny_moe_path(), threads=1) as client:
        yield client


@pytest.fixture(scope="module")
def eager() -> Any:
    """The bundled model with its experts, in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        tiny_moe_path(), experts_implementation="eager", dtype=torch.float32
    )


@pytest.fixture
def load_report() -> Iterator[BufferingHandler]:
    """What transformers logs, warnings and up."""
    handler = BufferingHandler(capacity=1000)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


# --- the bundled checkpoint ---------------------------------------------------------------


def test_bundled_model_from_its_directory(worker: Any, eager: Any) -> None:
    model = offload(tiny_moe_path(), worker)
    assert model.config._experts_implementation == "moeshm"
    assert type(model) is type(eager)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.generation_config.to_dict() == eager.generation_config.to_dict()
    assert expert_parameters(model) == []
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}

    model.float()
    calls = worker.stats().calls
    assert relative_error(logits(model, prompt()), logits(eager, prompt())) < 1e-5
    assert worker.stats().calls - calls == 4
    assert text(model, prompt(), 24) == text(eager, prompt(), 24)


def test_bfloat16_strays_no_further_from_float32_than_eager_does(worker: Any, eager: Any) -> None:
    eager_bf16 = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_moe_path(), experts_implementation="eager"
    )
    model = offload(tiny_moe_path(), worker)
    exact = logits(eager, prompt())
    tolerance = 1.5 * relative_error(logits(eager_bf16, prompt()), exact)
    assert relative_error(logits(model, prompt()), exact) < tolerance < 0.1
    assert text(model, prompt(), 24) == text(eager_bf16, prompt(), 24)


def test_a_batch_a_cache_and_inference_mode(worker: Any, eager: Any) -> None:
    model = offload(tiny_moe_path(), worker).float()
    ids = torch.stack([prompt()[0], prompt()[0].flip(0)])
    # As transformers calls it from 5.24 on, and before.
    names = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :-1], use_cache=True, **{name: cache})
        last = model(ids[:, -1:], **{name: cache}).logits[:, -1]
    assert relative_error(last, logits(eager, ids)[:, -1]) < 1e-5


def test_a_compiled_model_calls_the_worker_too(worker: Any, eager: Any) -> None:
    model = offload(tiny_moe_path(), worker).float()
    compiled = torch.compile(model, backend="eager")
    calls = worker.stats().calls
    assert relative_error(logits(compiled, prompt()), logits(eager, prompt())) < 1e-5
    assert worker.stats().calls - calls == 4


def test_loading_reads_no_expert_and_reports_nothing(
    tmp_path: Path, worker: Any, eager: Any, load_report: BufferingHandler
) -> None:
    """What is not in the directory cannot be read; what is there unread is no news."""
    tensors = load_file(tiny_moe_path() / "model.safetensors")
    dense = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    assert len(dense) < len(tensors)
    save_file(dense, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny_moe_path() / "config.json").read_bytes())
    model = offload(tmp_path, worker).float()
    assert relative_error(logits(model, prompt()), logits(eager, prompt())) < 1e-5

    offload(tiny_moe_path(), worker)
    assert [record.getMessage() for record in load_report.buffer] == []


# --- small random models ------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_random_model_of_each_family(tmp_path: Path, model_type: str) -> None:
    model = build(model_type)
    model.save_pretrained(tmp_path)
    expected, expected_text = logits(model, random_ids()), text(model, random_ids(), 8)

    loaded = offload(tmp_path, "cpu")
    with loaded.moeshm_client as client:
        assert expert_parameters(loaded) == []
        assert relative_error(logits(loaded, random_ids()), expected) < 1e-5
        assert text(loaded, random_ids(), 8) == expected_text

        assert expert_parameters(model)
        assert offload(model, client) is model
        assert expert_parameters(model) == []
        assert relative_error(logits(model, random_ids()), expected) < 1e-5


@pytest.mark.skipif(
    not hasattr(transformers, "Qwen3_5MoeConfig"), reason="this transformers has no Qwen3.5"
)
def test_the_text_model_inside_a_larger_one(tmp_path: Path) -> None:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    config = transformers.Qwen3_5MoeConfig(
        text_config={**SIZES, **QWEN, "layer_types": ["full_attention"] * 3},
        vision_config={**vision, "out_hidden_size": 24, "num_position_embeddings": 16},
    )
    torch.manual_seed(7)
    model = transformers.Qwen3_5MoeForConditionalGeneration(config)
    enlarge_experts(model)
    model.save_pretrained(tmp_path)
    expected = logits(model, random_ids())
    loaded = offload(tmp_path, "cpu")
    with loaded.moeshm_client:
        assert type(loaded) is type(model)
        assert loaded.config._experts_implementation == "moeshm"
        assert expert_parameters(loaded) == []
        assert relative_error(logits(loaded, random_ids()), expected) < 1e-5


def test_a_model_without_its_head(tmp_path: Path) -> None:
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["MixtralModel"]}))
    loaded = offload(tmp_path, "cpu")
    with loaded.moeshm_client, torch.no_grad():
        found = loaded(random_ids()).last_hidden_state
        assert relative_error(found, model.model(random_ids()).last_hidden_state) < 1e-5


def test_modules_with_a_config_of_their_own(tmp_path: Path) -> None:
    """Some models give copies of their config to their parts."""
    model = build("mixtral")
    model.save_pretrained(tmp_path)
    expected = logits(model, random_ids())
    for layer in model.model.layers:
        layer.mlp.experts.config = copy.deepcopy(model.config)
    with moeshm.spawn_worker(tmp_path) as client:
        offload(model, client)
        assert relative_error(logits(model, random_ids()), expected) < 1e-5


# --- whose client it is -------------------------------------------------------------------


def test_a_worker_of_its_own_ends_with_the_model() -> None:
    model = offload(tiny_moe_path(), "cpu")
    pid = model.moeshm_client.worker_pid
    assert is_running(pid)
    del model
    gc.collect()
    assert not is_running(pid)


def test_an_address_connects_to_the_worker_there(tmp_path: Path, eager: Any) -> None:
    address = f"unix:{tmp_path / 'worker.sock'}"
    command = [sys.executable, "-m", "moeshm", "worker", "--threads", "1"]
    command += ["--model", str(tiny_moe_path()), "--listen", address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert any("listening at" in line for line in process.stderr)
            model = offload(tiny_moe_path(), address).float()
            client = model.moeshm_client
            assert client.worker_pid == process.pid
            assert relative_error(logits(model, prompt()), logits(eager, prompt())) < 1e-5
            del model
            gc.collect()
            with pytest.raises(ClientClosed):
                client.compute(0, torch.zeros(1, 128), torch.zeros(1, 4).int(), torch.zeros(1, 4))
        finally:
            process.terminate()


def test_a_model_in_memory_starts_a_worker_on_its_directory(eager: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_moe_path(), dtype="float32")
    offload(model, "cpu")
    with model.moeshm_client:
        assert relative_error(logits(model, prompt()), logits(eager, prompt())) < 1e-5


def test_a_client_that_was_passed_stays_open(worker: Any) -> None:
    model = offload(tiny_moe_path(), worker)
    assert model.moeshm_client is worker
    del model
    gc.collect()
    logits(offload(tiny_moe_path(), worker), prompt())


def test_another_client_can_take_over(worker: Any, eager: Any) -> None:
    model = offload(tiny_moe_path(), "cpu").float()
    model.moeshm_client.close()
    with pytest.raises(ClientClosed):
        logits(model, prompt())
    offload(model, worker)
    assert relative_error(logits(model, prompt()), logits(eager, prompt())) < 1e-5


def test_a_worker_started_for_a_model_that_it_does_not_fit_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pids = []

    def spawn(*args: Any, **kwargs: Any) -> Any:
        client = moeshm.spawn_worker(*args, **kwargs)
        pids.append(client.worker_pid)
        return client

    monkeypatch.setattr(integration, "spawn_worker", spawn)
    model = build("qwen3_moe")
    model.name_or_path = str(tiny_moe_path())
    with pytest.raises(SettingError, match="hidden_size=24 in the model and 128 at the worker"):
        offload(model, "cpu")
    assert [is_running(pid) for pid in pids] == [False]


# --- what is refused ----------------------------------------------------------------------


def layers_of(model_type: str, **changes: Any) -> Any:
    """What a worker for `build(model_type)` holds, with changes to its last layer."""
    activation = {"mixtral": Activation.GEGLU, "gpt_oss": Activation.SWIGLU_CLAMPED}
    info = LayerInfo(
        hidden_size=24,
        intermediate_size=10,
        num_experts=6,
        top_k=2,
        experts=tuple(range(6)),
        activation=activation.get(model_type, Activation.SWIGLU),
    )
    moe_layers = {"qwen3_moe": (0, 2), "deepseek_v3": (1, 2)}.get(model_type, (0, 1, 2))
    layers = dict.fromkeys(moe_layers, info)
    layers[2] = msgspec.structs.replace(info, **changes)
    return Layers(layers)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3_moe", {"hidden_size": 32}, "layer 2 has hidden_size=24 in the model and 32 at"),
        ("qwen3_moe", {"intermediate_size": 8}, "layer 2 has intermediate_size=10 in .* and 8 at"),
        ("qwen3_moe", {"num_experts": 8}, "layer 2 has num_experts=6 in the model and 8 at"),
        ("qwen3_moe", {"top_k": 1}, "layer 2 has top_k=2 in the model and 1 at"),
        ("qwen3_moe", {"experts": (0, 1, 4)}, "layer 2: the worker holds 3 chosen experts of 6"),
        ("qwen3_moe", {"activation": Activation.GEGLU}, "layer 2: the worker's .* is geglu"),
        ("mixtral", {"activation": Activation.GEGLU_TANH}, "layer 2: .* is geglu_tanh"),
        ("gpt_oss", {"activation": Activation.SWIGLU}, "layer 2: .* is swiglu, and GptOssExperts"),
        ("gpt_oss", {"activation_alpha": 1.7}, "layer 2: .* is swiglu_clamped"),
        ("gpt_oss", {"activation_limit": 10.0}, "layer 2: .* is swiglu_clamped"),
        ("gpt_oss", {"intermediate_size": 24}, "layer 2 has intermediate_size=10"),
    ],
)
def test_a_worker_of_another_model_is_refused(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    model = build(model_type)
    expected = logits(model, random_ids())
    with pytest.raises(SettingError, match=message):
        offload(model, layers_of(model_type, **changes))
    assert torch.equal(logits(model, random_ids()), expected)
    offload(model, layers_of(model_type))
    assert expert_parameters(model) == []


def test_a_layer_that_the_worker_lacks_is_refused(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    client = layers_of("qwen3_moe")
    del client.layers[2]
    with pytest.raises(SettingError, match=r"layer 2 is not at the worker, .* layers \[0\]"):
        offload(model, client)
    model.save_pretrained(tmp_path)
    with pytest.raises(SettingError, match="layer 2 is not at the worker"):
        offload(tmp_path, client)


def test_two_layers_of_one_number_are_refused() -> None:
    model = build("mixtral")
    model.twin = copy.deepcopy(model.model.layers)
    with pytest.raises(SettingError, match=r"model\.layers\.0.* and twin\.0.* are both layer 0"):
        offload(model, layers_of("mixtral"))


def test_a_model_without_experts_is_refused() -> None:
    config = transformers.LlamaConfig(**SIZES, intermediate_size=40)
    with pytest.raises(SettingError, match="LlamaForCausalLM has no experts"):
        offload(transformers.LlamaForCausalLM(config), layers_of("mixtral"))


def test_experts_of_another_kind_are_refused() -> None:
    model = build("qwen3_moe")
    model.model.layers[0].mlp.experts.has_post_expert_norm = True
    with pytest.raises(SettingError, match=r"layers\.0\.mlp\.experts: Qwen3MoeExperts has not"):
        offload(model, layers_of("qwen3_moe"))


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    model = build("gpt_oss")
    model.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(SettingError, match=r"quantised \(mxfp4\)"):
        offload(model, layers_of("gpt_oss"))
    model.config.save_pretrained(tmp_path)
    with pytest.raises(SettingError, match=r"quantised \(mxfp4\)"):
        offload(tmp_path, layers_of("gpt_oss"))


def test_a_directory_that_names_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"is no directory with a config\.json"):
        offload(tmp_path, "cpu")
    with pytest.raises(SettingError, match="the model's path is '', which is no directory"):
        offload(build("mixtral"), "cpu")
    config = json.loads((tiny_moe_path() / "config.json").read_text())
    config["architectures"] = ["Qwen9ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match="names Qwen9ForCausalLM, which is not in transformers"):
        offload(tmp_path, layers_of("qwen3_moe"))


def test_a_gradient_is_refused(worker: Any) -> None:
    model = offload(tiny_moe_path(), worker)
    with pytest.raises(InvalidCall, match=r"layer 0: a gradient is wanted.*no_grad"):
        model(prompt())


def test_the_name_without_offload_is_refused() -> None:
    model = build("mixtral")
    model.config._experts_implementation = "moeshm"
    with pytest.raises(InvalidCall, match="that has no worker; call moeshm"):
        logits(model, random_ids())


@pytest.mark.parametrize("absent", ["torch", "transformers", "transformers.integrations.moe"])
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.delitem(sys.modules, integration.__name__)
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(UnsupportedPlatform, match=rf"{absent}.*pip install 'moeshm\[transf"):
        importlib.import_module(integration.__name__)


def test_a_torch_that_transformers_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, integration.__name__)
    monkeypatch.setattr(transformers.utils, "is_torch_available", lambda: False)
    with pytest.raises(UnsupportedPlatform, match=rf"torch {re.escape(torch.__version__)}; "):
        importlib.import_module(integration.__name__)
