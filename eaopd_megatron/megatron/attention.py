"""Core attention through torch: where CUDA and Transformer Engine are not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


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
