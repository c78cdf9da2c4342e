"""Train the bundled byte-level MoE language model on the standard library's sources.

    python tools/train_tiny_moe.py --out moeshm/demo/tiny_moe --device cuda --minutes 8

Needs torch >= 2.5 and safetensors. Writes a Hugging Face directory (Qwen3-MoE layout, bfloat16)
with a model card and `training.json`. The clock ends the run, so two runs with one seed differ.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import platform
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The model's sizes, under the names that Qwen3-MoE's config.json gives them."""

    vocab_size: int = 256
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 64
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-6


SHAPE = Shape()
ROPE_THETA = 10_000.0
#: Bytes of text in a training window.
CONTEXT = SHAPE.max_position_embeddings
WINDOWS_PER_STEP = {"cuda": 128, "cpu": 4}
LEARNING_RATE = 3e-3
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.1
#: Without it 8 MB of text are learnt by heart: after 13,000 steps on a GPU the held-out text cost
#: 1.94 bits per byte with 0 and 1.02 with 0.1.
DROPOUT = 0.1
#: Weight of the load-balancing loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4).
BALANCE = 0.01
#: Between files; a byte that Python source cannot hold.
SEPARATOR = b"\0"
#: Installed packages are not the standard library; the other two are generated tables.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
PROMPT = b'def read_lines(path, encoding="utf-8"):\n    """'


# --- text -------------------------------------------------------------------------------


def read_corpus(root: Path) -> tuple[bytes, bytes]:
    """The training and the held-out text: a file is held out when its path hashes to 0 of 20."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        text = path.read_bytes()
        if SKIPPED_FOLDERS & set(relative.parts) or SEPARATOR in text:
            continue
        held_out = hashlib.sha256(relative.as_posix().encode()).digest()[0] % 20 == 0
        parts[held_out].append(text)
    train, held = (SEPARATOR.join(texts) for texts in parts)
    if len(train) < CONTEXT * 100 or len(held) <= CONTEXT:
        raise SystemExit(f"{root} holds too little Python source: {len(train):,} bytes")
    return train, held


def on_device(text: bytes, device: str) -> Tensor:
    """The text as a uint8 tensor."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


# --- model ------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in Hugging Face's half-split convention."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Block(nn.Module):
    """One decoder layer; the experts are stacked, so that all are three matrix products."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, head = shape.hidden_size, shape.head_dim
        queries, keys = shape.num_attention_heads * head, shape.num_key_value_heads * head
        stacked = shape.num_experts * shape.moe_intermediate_size
        residual_std = 0.02 / math.sqrt(2 * shape.num_hidden_layers)

        def matrix(rows: int, columns: int, std: float = 0.02) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) * std)

        self.input_layernorm = nn.Parameter(torch.ones(hidden))
        self.post_attention_layernorm = nn.Parameter(torch.ones(hidden))
        self.q_norm = nn.Parameter(torch.ones(head))
        self.k_norm = nn.Parameter(torch.ones(head))
        self.q_proj = matrix(queries, hidden)
        self.k_proj = matrix(keys, hidden)
        self.v_proj = matrix(keys, hidden)
        self.o_proj = matrix(hidden, queries, residual_std)
        self.router = matrix(shape.num_experts, hidden)
        self.gate_proj = matrix(stacked, hidden)
        self.up_proj = matrix(stacked, hidden)
        self.down_proj = matrix(hidden, stacked, residual_std)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.shape.rms_norm_eps)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(weight: Tensor) -> Tensor:
            batch, length, _ = x.shape
            return F.linear(x, weight).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)

        q = rotate(self.norm(heads(self.q_proj), self.q_norm), cos, sin)
        k = rotate(self.norm(heads(self.k_proj), self.k_norm), cos, sin)
        v = heads(self.v_proj)
        mixed = F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True
        )
        return F.linear(mixed.transpose(1, 2).flatten(2), self.o_proj)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight of every expert [..., num_experts], zero if not in the top k; balance loss."""
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(x.float(), self.router).softmax(-1)
        top, ids = probabilities.topk(self.shape.num_experts_per_tok, dim=-1)
        weights = torch.zeros_like(probabilities).scatter(-1, ids, top / top.sum(-1, keepdim=True))
        share = (weights > 0).float().flatten(0, -2).mean(0) / self.shape.num_experts_per_tok
        balance = self.shape.num_experts * (share * probabilities.flatten(0, -2).mean(0)).sum()
        return weights, balance

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.attention(self.norm(x, self.input_layernorm), cos, sin)
        x = x + F.dropout(mixed, DROPOUT, self.training)
        y = self.norm(x, self.post_attention_layernorm)
        weights, balance = self.route(y)
        inner = F.silu(F.linear(y, self.gate_proj)) * F.linear(y, self.up_proj)
        inner = inner.view(*weights.shape, -1) * weights[..., None].to(inner)
        out = F.linear(inner.flatten(-2), self.down_proj)
        return x + F.dropout(out, DROPOUT, self.training), balance


class TinyMoe(nn.Module):
    """The language model; `forward` takes tokens [batch, length] and gives logits."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) * 0.02)
        self.norm = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        exponents = torch.arange(0, shape.head_dim, 2) / shape.head_dim
        angles = torch.outer(torch.arange(CONTEXT).float(), ROPE_THETA**-exponents).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [batch, length, vocab_size] and the mean balance loss of the layers."""
        x = F.embedding(tokens, self.embed_tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        balance = torch.zeros((), device=x.device)
        for layer in self.layers:
            x, layer_balance = layer(x, cos, sin)
            balance = balance + layer_balance / len(self.layers)
        x = F.rms_norm(x, self.norm.shape, self.norm, self.eps)
        return F.linear(x, self.embed_tokens), balance


# --- checkpoint -------------------------------------------------------------------------


def hf_views(model: TinyMoe) -> dict[str, Tensor]:
    """Hugging Face's Qwen3-MoE tensor names, each with the part of a parameter it stands for."""
    views = {
        "model.embed_tokens.weight": model.embed_tokens.data,
        "model.norm.weight": model.norm.data,
    }
    for number, block in enumerate(model.layers):
        assert isinstance(block, Block)
        prefix = f"model.layers.{number}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            views[f"{prefix}{name}.weight"] = getattr(block, name).data
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            views[f"{prefix}self_attn.{name}.weight"] = getattr(block, name).data
        views[f"{prefix}mlp.gate.weight"] = block.router.data
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            experts = getattr(block, name).data.chunk(block.shape.num_experts, dim)
            for expert, weight in enumerate(experts):
                views[f"{prefix}mlp.experts.{expert}.{name}.weight"] = weight
    return views


def save_checkpoint(model: TinyMoe, shape: Shape, out: Path) -> None:
    """Write config.json and model.safetensors, rounded to bfloat16."""
    config = asdict(shape) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": SEPARATOR[0],
        "eos_token_id": SEPARATOR[0],
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        # The width of dense layers, of which this model has none.
        "intermediate_size": shape.num_experts_per_tok * shape.moe_intermediate_size,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "output_router_logits": False,
        "rope_parameters": {"rope_theta": ROPE_THETA, "rope_type": "default"},
        "router_aux_loss_coef": BALANCE,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {
        name: view.to("cpu", torch.bfloat16).contiguous() for name, view in hf_views(model).items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def load_checkpoint(model: TinyMoe, out: Path) -> None:
    """Overwrite the parameters with the saved, rounded ones."""
    tensors = load_file(out / "model.safetensors")
    for name, view in hf_views(model).items():
        view.copy_(tensors[name])


# --- training ---------------------------------------------------------------------------


def random_windows(text: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, [count, CONTEXT] each."""
    starts = torch.randint(len(text) - CONTEXT, (count, 1), device=text.device)
    windows = text[starts + torch.arange(CONTEXT + 1, device=text.device)].long()
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def bits_per_byte(model: TinyMoe, text: Tensor) -> float:
    """Mean cost of a byte of `text` after the first, in float32.

    Windows overlap by half, so that every byte but the first CONTEXT is predicted from at least
    CONTEXT / 2 bytes before it.
    """
    model.eval()
    half = CONTEXT // 2
    total, counted = 0.0, 0
    for start in range(0, len(text) - 1, half):
        window = text[start : start + CONTEXT + 1].long()
        logits, _ = model(window[None, :-1])
        fresh = 0 if start == 0 else half
        costs = F.cross_entropy(logits[0, fresh:], window[1 + fresh :], reduction="sum")
        total, counted = total + costs.item(), counted + len(window) - 1 - fresh
        if start + CONTEXT + 1 >= len(text):
            break
    model.train()
    return total / counted / math.log(2)


def optimizer_of(model: TinyMoe) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms alone."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))


def train(model: TinyMoe, train_text: Tensor, held_out: Tensor, minutes: float) -> dict[str, Any]:
    """Train until the clock says stop, the learning rate a cosine of the time; gives figures."""
    device = train_text.device.type
    optimizer = optimizer_of(model)
    compiled = torch.compile(model) if device == "cuda" else model
    autocast = (
        torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
    )
    started = time.monotonic()
    step, progress, next_report = 0, 0.0, 0.1
    losses: list[float] = []
    while progress < 1:
        rate = LEARNING_RATE * min(1, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        inputs, targets = random_windows(train_text, WINDOWS_PER_STEP[device])
        with autocast:
            logits, balance = compiled(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 1:
            # Reading the loss waits for the device, so the clock below is that of finished work.
            losses.append(loss.item() / math.log(2))
        progress = (time.monotonic() - started) / (minutes * 60)
        if progress >= next_report:
            held = bits_per_byte(model, held_out[: 64 * CONTEXT])
            print(
                f"{progress:4.0%}  step {step}  training {losses[-1]:.3f} bits/byte"
                f"  held out {held:.3f}  balance {balance.item():.3f}",
                flush=True,
            )
            next_report += 0.1
    return {
        "steps": step,
        "bytes_seen": step * WINDOWS_PER_STEP[device] * CONTEXT,
        "train_seconds": round(time.monotonic() - started, 1),
        "train_bits_per_byte": round(sum(losses[-20:]) / len(losses[-20:]), 4),
    }


@torch.no_grad()
def expert_shares(model: TinyMoe, text: Tensor) -> list[tuple[float, float]]:
    """Per layer, the smallest and the largest share of the token slots that one expert gets."""
    shares: list[tuple[float, float]] = []

    def record(block: Block, inputs: tuple[Tensor, ...], _: Any) -> None:
        x, cos, sin = inputs
        x = x + block.attention(block.norm(x, block.input_layernorm), cos, sin)
        weights, _balance = block.route(block.norm(x, block.post_attention_layernorm))
        used = (weights > 0).float().flatten(0, -2).mean(0) / block.shape.num_experts_per_tok
        shares.append((round(used.min().item(), 4), round(used.max().item(), 4)))

    hooks = [layer.register_forward_hook(record) for layer in model.layers]
    count = min(32, len(text) // CONTEXT)
    model.eval()(text[: count * CONTEXT].long().view(count, CONTEXT))
    for hook in hooks:
        hook.remove()
    return shares


@torch.no_grad()
def sample(model: TinyMoe, prompt: bytes, count: int, temperature: float) -> str:
    """The prompt and `count` more bytes drawn from the model."""
    tokens = torch.tensor([list(prompt)], device=model.norm.device)
    model.eval()
    for _ in range(count):
        logits, _ = model(tokens[:, -CONTEXT:])
        probabilities = (logits[0, -1] / temperature).softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(probabilities, 1)[None]), dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


# --- report -----------------------------------------------------------------------------

CARD = """---
license: apache-2.0
library_name: transformers
tags: [moe, byte-level, python]
---
# tiny_moe

A byte-level Mixture-of-Experts language model in the Qwen3-MoE layout: {parameters:,} parameters,
{num_hidden_layers} layers of hidden size {hidden_size}, each with {num_experts} experts of width
{moe_intermediate_size}, top-{num_experts_per_tok}; {num_attention_heads} query and
{num_key_value_heads} key/value heads of {head_dim}; context {max_position_embeddings}.
A token is a byte: ids 0 to 255, no tokenizer. Byte 0 stands between files.

It exists so that moeshm's demo and tests run a real model, trained, with a router that uses its
experts. It is good for nothing else: the text looks like Python and means nothing.

| | |
| --- | --- |
| trained on | the `.py` files of Python {python}'s standard library ({train_bytes:,} bytes) |
| held out | every file whose path hashes to 0 of 20 ({held_out_bytes:,} bytes) |
| **held-out bits per byte** | **{held_out_bits_per_byte:.3f}** (the saved weights, in float32) |
| training bits per byte | {train_bits_per_byte:.3f} (mean of the last steps that were logged) |
| steps | {steps:,} ({bytes_seen:,} bytes seen) |
| time | {train_seconds:.0f} s on {device} |
| an expert's share of its layer | {share_min:.1%} to {share_max:.1%}; even is {even:.1%} |

`encodings/` and `pydoc_data/` are generated tables and were left out. Files of one library resemble
each other, so source from elsewhere costs more than the held-out files; and the dropout rate was
chosen, between two, by those files. Made by `tools/train_tiny_moe.py`; `training.json` has the
figures for programs.

A sample at temperature 0.5 (the prompt ends with the first three quotes):

````python
{sample}
````

## Licence

The weights are under Apache-2.0. The text they were trained on is Python's standard library,
under the PSF License Agreement (https://docs.python.org/3/license.html); none of it is included.
"""


def card(figures: dict[str, Any], text: str) -> str:
    """The model card; `text` is the sample."""
    shares = figures["expert_shares"]
    return CARD.format(
        **asdict(SHAPE),
        **figures,
        share_min=min(low for low, _ in shares),
        share_max=max(high for _, high in shares),
        even=1 / SHAPE.num_experts,
        sample="\n".join(line.rstrip() for line in text.splitlines()),
    )


def main() -> None:
    """Parse the command line, train, save, evaluate what was saved, and write the card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--device", choices=sorted(WINDOWS_PER_STEP), default="cpu")
    parser.add_argument("--minutes", type=float, default=30.0, help="time to train for")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    texts = read_corpus(Path(sysconfig.get_path("stdlib")))
    train_text, held_out = (on_device(text, options.device) for text in texts)
    model = TinyMoe(SHAPE).to(options.device)
    print(f"{len(train_text):,} bytes to train on, {len(held_out):,} held out", flush=True)
    figures = train(model, train_text, held_out, options.minutes)

    options.out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, SHAPE, options.out)
    load_checkpoint(model, options.out)
    torch.set_float32_matmul_precision("highest")
    on_gpu = options.device == "cuda"
    figures |= {
        "held_out_bits_per_byte": round(bits_per_byte(model, held_out), 4),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_bytes": len(train_text),
        "held_out_bytes": len(held_out),
        "expert_shares": expert_shares(model, held_out),
        "seed": options.seed,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    (options.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    text = sample(model, PROMPT, 600, temperature=0.5)
    (options.out / "README.md").write_text(card(figures, text))
    print(json.dumps(figures, indent=2), text, sep="\n")


if __name__ == "__main__":
    main()
