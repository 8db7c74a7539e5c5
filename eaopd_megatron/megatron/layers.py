"""Core attention through torch: where CUDA and Transformer Engine are not."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fp8_utils import prepare_model_for_fp8_inference
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from eaopd_megatron.data.packing import cp_shard_indices
from eaopd_megatron.errors import UserError


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron-Core's description of packed sequences, with the indices that `CoreAttention` needs, made once a
    micro-batch. Transformer Engine's attention reads the inherited fields alone."""

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor, longest: int) -> PackedSequences:
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
            self._parts[size] = [cp_shard_indices(self.cu_seqlens_q.long(), size, rank) for rank in range(size)]
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


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm under sequence parallelism: its weight's gradient is summed over the tensor-parallel group.

    Megatron-Core's own wrapper of torch's norm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def uses_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's: where CUDA is present and Megatron-Core has found the package."""
    return torch.cuda.is_available() and gpt_layer_specs.HAVE_TE


def layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the specs of this rank's (and virtual stage's) layers.

    Parameters of local and Transformer Engine layers have the same `model.global_param_name`.

    Transformer Engine's layers have been built on no machine yet: they need CUDA.
    """
    layer, norm = _engine_layer(config) if uses_transformer_engine() else _local_layer(config)
    assert layer.module is TransformerLayer
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def _engine_layer(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    return layer, gpt_layer_specs.TENorm


def _local_layer(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """Megatron-Core's layer with the norms and the attention that need neither CUDA nor Apex."""
    layer = copy.deepcopy(
        gpt_layer_specs.get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
    )
    parts = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    parts.self_attention.submodules.core_attention = CoreAttention
    if config.qk_layernorm:
        parts.self_attention.submodules.q_layernorm = RMSNorm
        parts.self_attention.submodules.k_layernorm = RMSNorm
    if config.num_moe_experts:
        # names in checkpoints are Transformer Engine's, which fuses this norm into a dense MLP, but not into experts
        del parts.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        _complete_router()
    return layer, RMSNorm


def _complete_router() -> None:
    """Megatron-Core's router asks whether `te_general_gemm` is None, a name that only Transformer Engine's import
    defines."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


FP8_SETTINGS: dict[str, Any] = {"fp8": "e4m3", "fp8_recipe": "tensorwise", "fp8_param": True}
"""Of Megatron-Core's TransformerConfig."""


def require_fp8_support(key: str) -> None:
    """Raises UserError, which names the recipe's key, where Transformer Engine cannot run."""
    if not uses_transformer_engine():
        raise UserError(f"{key}=fp8 needs CUDA and Transformer Engine, which are not here; bf16 needs neither")


def pad_fp8_inputs(gpt: GPTModel) -> None:
    """fp8 products want a multiple of 16 tokens: linear layers pad what they are given, and cut it off again."""
    prepare_model_for_fp8_inference(gpt)
