"""Qwen3 in fp32 on tensors by their Hugging Face names, without the seconds that transformers takes to be imported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional


class Qwen3:
    """A dense Qwen3 with plain rotary embeddings. `weights`: name → tensor."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.architecture, self.vocab_size = config["architectures"][0], config["vocab_size"]
        self.eos_id = config["eos_token_id"]
        self._layers, self._eps, self._head_dim = (
            config["num_hidden_layers"],
            config["rms_norm_eps"],
            config["head_dim"],
        )
        self._tied = config["tie_word_embeddings"]
        theta = (config.get("rope_parameters") or config)["rope_theta"]
        self._frequencies = theta ** (-torch.arange(0, self._head_dim, 2) / self._head_dim)
        self.weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies new values over the weights of these names. Raises ValueError for one that does not fit."""
        for name, tensor in tensors.items():
            if name not in self.weights or self.weights[name].shape != tensor.shape:
                raise ValueError(f"{name} {list(tensor.shape)} is no weight of the student")
            self.weights[name].copy_(tensor)

    @torch.inference_mode()
    def next_logprobs(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Log-probs [b, V] of the token after each of b sequences. What pads a shorter one comes after it, unseen."""
        lengths = torch.tensor([len(ids) for ids in sequences])
        padded = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
        for row, ids in zip(padded, sequences, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        hidden = functional.embedding(padded, self.weights["model.embed_tokens.weight"])  # [b, s, h]
        angles = torch.outer(torch.arange(padded.shape[1]), self._frequencies).repeat(1, 2)  # [s, d]
        for number in range(self._layers):
            hidden = self._layer(f"model.layers.{number}.", hidden, angles.cos(), angles.sin())
        last = self._norm("model.norm", hidden[torch.arange(len(sequences)), lengths - 1])
        return functional.linear(
            last, self.weights["model.embed_tokens.weight" if self._tied else "lm_head.weight"]
        ).log_softmax(-1)

    def _layer(self, prefix: str, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attention = f"{prefix}self_attn."
        x = self._norm(f"{prefix}input_layernorm", hidden)
        query, key, value = (
            self._linear(f"{attention}{name}_proj", x).unflatten(-1, (-1, self._head_dim)) for name in "qkv"
        )  # [b, s, heads, d]
        query, key = self._norm(f"{attention}q_norm", query), self._norm(f"{attention}k_norm", key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = functional.scaled_dot_product_attention(
            _rotated(query, cos, sin), _rotated(key, cos, sin), value, is_causal=True, enable_gqa=True
        )
        hidden = hidden + self._linear(f"{attention}o_proj", mixed.transpose(1, 2).flatten(2))
        x = self._norm(f"{prefix}post_attention_layernorm", hidden)
        gated = functional.silu(self._linear(f"{prefix}mlp.gate_proj", x)) * self._linear(f"{prefix}mlp.up_proj", x)
        return hidden + self._linear(f"{prefix}mlp.down_proj", gated)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self._eps)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
