"""Core attention through torch: where CUDA and Transformer Engine are not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from eaopd_megatron.data.packing import context_part


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron-Core's description of packed sequences, with the indices that `CoreAttention` needs, made once a
    micro-batch. Transformer Engine's attention reads the inherited fields alone."""

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, longest: int) -> PackedSequences:
        """cu_seqlens [b + 1] int32: 0 and the ends of the sequences; longest: length of the longest."""
        return cls(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    @cached_property
    def lengths(self) -> torch.Tensor:
        """[b]"""
        return self.cu_seqlens_q.long().diff()

    @cached_property
    def places(self) -> torch.Tensor:
        """Where each of the T packed tokens is in [b · longest]."""
        starts = self.cu_seqlens_q.long()[:-1]
        sequence = torch.arange(len(starts), device=starts.device).repeat_interleave(self.lengths)
        token = torch.arange(len(sequence), device=starts.device)
        return sequence * self.max_seqlen_q + token - starts[sequence]

    def parts(self, size: int) -> list[torch.Tensor]:
        """The packed positions of every context-parallel rank, each in its order."""
        if size not in self._parts:
            self._parts[size] = [context_part(self.cu_seqlens_q.long(), size, rank) for rank in range(size)]
        return self._parts[size]

    @cached_property
    def _parts(self) -> dict[int, list[torch.Tensor]]:
        return {}


class CoreAttention(MegatronModule):
    """Scaled-dot-product attention with grouped queries through torch: packed sequences, at any context-parallel
    size, or a batch of equal lengths, causal or under a given mask, without context parallelism (decoding)."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **unused: Any
    ) -> None:
        super().__init__(config=config)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: PackedSequences | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """query [s, b, heads, d]; key, value [t, b, groups, d]; attention_mask [b, 1, s, t], True = hidden. Returns
        [s, b, heads·d].

        Without a mask a query sees the keys up to its own position; the s queries are the last s of the t positions.
        Packed: query [T, heads, d]; key, value [T, groups, d], this context-parallel rank's tokens. Returns
        [T, heads·d]. A query sees its own sequence up to its own position.
        """
        if packed_seq_params is not None:
            size = self.config.context_parallel_size
            attend = _packed if size == 1 else _packed_over_ranks
            return attend(query, key, value, packed_seq_params).flatten(1)
        s, b, heads, d = query.shape
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if attention_mask is not None:
            visible: torch.Tensor | None = ~attention_mask
        elif s == 1 or s == k.shape[2]:
            visible = None
        else:
            visible = torch.ones(s, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - s)
        out = _attention(q, k, v, visible, causal=visible is None and s > 1)
        return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)


def _packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
    b, longest = len(packed.lengths), packed.max_seqlen_q
    q, k, v = (_unpack(x, packed.places, b, longest) for x in (query, key, value))
    return _pack(_attention(q, k, v, None, causal=True), packed.places)


def _packed_over_ranks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences
) -> torch.Tensor:
    """Keys and values are gathered over the context-parallel group (in backward their gradients are summed and
    scattered) and put into the order of the sequences; the mask goes by position."""
    group = parallel_state.get_context_parallel_group()
    size, rank = group.size(), group.rank()
    parts, b, longest = packed.parts(size), len(packed.lengths), packed.max_seqlen_q
    places = packed.places[torch.cat(parts)]
    k, v = (
        _unpack(gather_from_sequence_parallel_region(x.contiguous(), group=group), places, b, longest)
        for x in (key, value)
    )
    mine = packed.places[parts[rank]]
    sequence, position = mine // longest, mine % longest
    width = longest // size
    before = (packed.cu_seqlens_q.long()[:-1] // size)[sequence]
    local = sequence * width + torch.arange(len(mine), device=mine.device) - before
    # a row of padding sees the first key: one that sees nothing would be NaN
    upto = torch.zeros(b * width, dtype=torch.long, device=mine.device).index_copy(0, local, position)
    visible = torch.arange(longest, device=mine.device) <= upto.view(b, 1, width, 1)
    return _pack(_attention(_unpack(query, local, b, width), k, v, visible, causal=False), local)


def _unpack(packed: torch.Tensor, places: torch.Tensor, b: int, length: int) -> torch.Tensor:
    """[T, heads, d] → [b, heads, length, d], zeros where no token is."""
    padded = packed.new_zeros(b * length, *packed.shape[1:]).index_copy(0, places, packed)
    return padded.view(b, length, *packed.shape[1:]).transpose(1, 2)


def _pack(padded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[b, heads, length, d] → [T, heads, d]."""
    return padded.transpose(1, 2).flatten(0, 1).index_select(0, places)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, *, causal: bool
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1]
    )
