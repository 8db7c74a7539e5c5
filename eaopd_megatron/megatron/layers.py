"""The transformer layer: Megatron-Core's own, with two parts that run without CUDA, Transformer Engine and Apex."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm under sequence parallelism: its weight's gradient is summed over the tensor-parallel group.

    Megatron-Core's own wrapper of torch's norm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CoreAttention(MegatronModule):
    """Scaled-dot-product attention with grouped queries through torch, causal or under a given mask."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **unused: Any
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError("CoreAttention has no context parallelism")

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """query [s, b, heads, d]; key, value [t, b, groups, d]; attention_mask [b, 1, s, t], True = hidden. Returns
        [s, b, heads·d].

        Without a mask a query sees the keys up to its own position; the s queries are the last s of the t positions.
        """
        s, b, heads, d = query.shape
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if attention_mask is not None:
            visible: torch.Tensor | None = ~attention_mask
        elif s == 1 or s == k.shape[2]:
            visible = None
        else:
            visible = torch.ones(s, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - s)
        causal = visible is None and s > 1
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=k.shape[1] != heads
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)


def layer_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """`config.num_layers` Megatron-Core layers with the parts above. Parameter names are those of Megatron's local
    spec."""
    layer = copy.deepcopy(get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm"))
    parts = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    parts.self_attention.submodules.core_attention = CoreAttention
    if config.qk_layernorm:
        parts.self_attention.submodules.q_layernorm = RMSNorm
        parts.self_attention.submodules.k_layernorm = RMSNorm
    assert isinstance(layer, ModuleSpec) and layer.module is TransformerLayer
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=RMSNorm)
