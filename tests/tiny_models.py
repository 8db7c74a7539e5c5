"""Tiny random models of every family as Hugging Face folders, with transformers' outputs as expected values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

NEW_TOKENS = 6
LENGTH = 12
"""Tokens of a sequence: more than the 8 of the scaled models' original context."""

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,  # not hidden_size / heads
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}
SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 12345.5, "factor": 4.0},
    "yarn": {**SCALED, "rope_type": "yarn"},
    "llama3": {**SCALED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {"vocab_size": 112, "tie_word_embeddings": True}),
    "qwen3_untied": ("qwen3", {"vocab_size": 300, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"vocab_size": 112, "tie_word_embeddings": True, "rope_parameters": ROPE["linear"]}),
    "qwen2_yarn": (
        "qwen2",
        {"vocab_size": 300, "tie_word_embeddings": False, "rope_parameters": ROPE["yarn"], "num_hidden_layers": 4},
    ),
    "llama3": ("llama", {"vocab_size": 300, "tie_word_embeddings": False, "rope_parameters": ROPE["llama3"]}),
    "llama_tied": ("llama", {"vocab_size": 112, "tie_word_embeddings": True, "head_dim": None}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "vocab_size": 300, "tie_word_embeddings": False, "norm_topk_prob": True}),
    "qwen3_moe_tied": (
        "qwen3_moe",
        {**EXPERTS, "vocab_size": 112, "tie_word_embeddings": True, "rope_parameters": ROPE["yarn"]},
    ),
}
"""Name → transformers' model type, and what differs from SHAPE. norm_topk_prob is false where it is not given.

With 112 ids and 128 padded rows a rank, three of four tensor-parallel ranks have no valid row; with 300 ids one has
some valid rows and one none.
"""


def build(name: str, **changes: Any) -> Any:
    """Return the transformers model in fp32, the same at every call. changes: keys of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = MODELS[name]
    shape = {**SHAPE, "rope_parameters": ROPE["default"], **own, **changes}
    if kind == "qwen2":
        del shape["head_dim"]  # its configurations have none
    torch.manual_seed(shape["vocab_size"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)  # norms of one and biases of zero would hide that they are not loaded
            else:
                parameter.mul_(3)  # or a tied model says its last token again and again
        model.model.norm.weight.uniform_(0.5, 1.5)
    return model


def write(name: str, folder: Path, *, max_shard_size: str = "10GB") -> Any:
    """Save the model with a tokenizer, and `expected/values.safetensors`; returns the model."""
    from eaopd_megatron.data import countdown

    model = build(name)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    countdown.countdown_tokenizer().save_pretrained(folder)
    (folder / "expected").mkdir()
    save_file(_expected(model), folder / "expected" / "values.safetensors")
    return model


def _expected(model: Any) -> dict[str, torch.Tensor]:
    vocab = model.config.vocab_size
    tokens = torch.randint(vocab, (3, LENGTH))
    weight = torch.randn(3, LENGTH, vocab) * 0.002
    logits = model(tokens).logits
    (weight * logits**2 / 2).sum().backward()
    gradients = on_disk((f"grad.{name}", parameter.grad.clone()) for name, parameter in model.named_parameters())
    lengths = torch.tensor([LENGTH, 5, 8])
    padded = torch.zeros_like(tokens)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        padded[row, LENGTH - length :] = tokens[row, :length]
        mask[row, LENGTH - length :] = 1
    generated = model.generate(padded, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    values = {"tokens": tokens, "weight": weight, "logits": logits.detach(), "lengths": lengths}
    return {**values, "generated": generated[:, LENGTH:].contiguous(), **gradients}


def on_disk(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a transformers model's tensors by their names on disk, where each expert has tensors of its own."""
    found = {}
    for name, tensor in tensors:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found[name] = tensor
            continue
        prefix, _, kind = name.rpartition(".")
        for expert, part in enumerate(tensor):
            if kind == "down_proj":
                found[f"{prefix}.{expert}.down_proj.weight"] = part.clone()
            else:
                for half, rows in zip(("gate_proj", "up_proj"), part.chunk(2), strict=True):
                    found[f"{prefix}.{expert}.{half}.weight"] = rows.clone()
    return found
