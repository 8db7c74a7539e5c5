"""Transformer Engine's DotProductAttention by torch, after its documentation. For its Python on a CPU."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F


def replace_forward(attention: Any) -> None:
    """Let the class compute by torch; arguments are bound to the signature of its own `forward`."""
    signature = inspect.signature(attention.forward)

    @functools.wraps(attention.forward)
    def forward(self: Any, *args: Any, **options: Any) -> torch.Tensor:
        bound = signature.bind(self, *args, **options)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if name not in _EMULATED:
                default = signature.parameters[name].default
                assert value is default or value == default, f"not emulated: {name}={value}"
        return _forward(**{name: bound.arguments[name] for name in _EMULATED})

    attention.forward = forward


def _forward(
    self: Any,
    query_layer: torch.Tensor,
    key_layer: torch.Tensor,
    value_layer: torch.Tensor,
    attention_mask: torch.Tensor | None,
    qkv_format: str | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_kv: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_kv: int | None,
    attn_mask_type: str | None,
) -> torch.Tensor:
    """What the documentation of the class says of these arguments."""
    from transformer_engine.pytorch.constants import AttnMaskTypes

    q, k, v = query_layer, key_layer, value_layer
    kind = (attn_mask_type or self.attn_mask_type).replace(",", "_")
    layout = qkv_format or self.qkv_format
    assert self.cp_group is None, "context parallelism is not emulated"
    assert kind in AttnMaskTypes, kind
    assert q.dtype == k.dtype == v.dtype, "queries, keys and values of one dtype"
    assert k.shape[:-1] == v.shape[:-1], (k.shape, v.shape)
    assert q.shape[-1] == k.shape[-1] == self.hidden_size_per_attention_head_k, q.shape
    assert k.shape[-2] == self.num_gqa_groups_per_partition, k.shape
    if layout == "thd":
        assert q.dim() == 3, "thd takes [tokens, heads, d]"
        assert "padding" in kind, f"thd takes padding masks, not {kind}"
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None, "thd takes cu_seqlens"
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32, "cu_seqlens are int32"
        assert torch.equal(cu_seqlens_q, cu_seqlens_kv), "packed cross attention is not emulated"
        assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_kv, int), "without lengths it reads them"
        lengths = cu_seqlens_q.diff().tolist()
        assert sum(lengths) == len(q) and max(lengths) <= min(max_seqlen_q, max_seqlen_kv), (lengths, q.shape)
        parts = zip(*(x[:, None].split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([_attend(one, two, three, None, kind) for one, two, three in parts]).flatten(1)
    assert layout == "sbhd" and q.dim() == 4, (layout, q.shape)
    used = "padding" in kind or kind == "arbitrary"  # other types ignore the mask
    return _attend(q, k, v, attention_mask if used else None, kind).flatten(2)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, kind: str
) -> torch.Tensor:
    """[s, b, heads, d]; causal types align the diagonal at the top left, unless they say `bottom_right`."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    s, t = q.shape[2], k.shape[2]
    visible = torch.ones(s, t, dtype=torch.bool)
    if "causal" in kind:
        visible = visible.tril(t - s if "bottom_right" in kind else 0)
    if mask is not None:
        visible = visible & ~mask
    grouped = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3).contiguous()


_EMULATED = tuple(inspect.signature(_forward).parameters)
