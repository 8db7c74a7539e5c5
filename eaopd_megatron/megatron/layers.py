"""Transformer layers: Transformer Engine's with CUDA, else Megatron-Core's with torch's attention and norms."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
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
from eaopd_megatron.megatron.varlen_attention import VarlenSegments, varlen_attention, varlen_refusal


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron-Core's packed sequences with the indices that `CoreAttention` needs, computed once per micro-batch.

    The inherited `cu_seqlens_q` and `cu_seqlens_kv` are set for the fused rotary kernel alone. Megatron-Core's other
    rotary code would read them on the host four times a layer, each a wait for the GPU; without them it takes the
    angles of `rotate_by_position` as they are.
    """

    cu_seqlens: torch.Tensor = None  # type: ignore[assignment]

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor, longest: int, *, fused_rotary: bool = False) -> PackedSequences:
        """cu_seqlens: [b + 1] int32, 0 and the end of each sequence; longest: the maximum length."""
        packed = cls(qkv_format="thd", max_seqlen_q=longest, max_seqlen_kv=longest, cu_seqlens=cu_seqlens)
        if fused_rotary:
            packed.cu_seqlens_q = packed.cu_seqlens_kv = cu_seqlens
        return packed

    @cached_property
    def for_engine(self) -> PackedSeqParams:
        """What Transformer Engine's attention reads."""
        ends, longest = self.cu_seqlens, self.max_seqlen_q
        return PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Length of each sequence, [b]."""
        return self.cu_seqlens.long().diff()

    @cached_property
    def places(self) -> torch.Tensor:
        """Index of each of the T packed tokens in the padded [b * longest] layout."""
        starts = self.cu_seqlens.long()[:-1]
        sequence = torch.arange(len(starts), device=starts.device).repeat_interleave(self.lengths)
        token = torch.arange(len(sequence), device=starts.device)
        return sequence * self.max_seqlen_q + token - starts[sequence]

    def parts(self, size: int) -> list[torch.Tensor]:
        """Return the packed positions of every context-parallel rank, each in the rank's order."""
        if size not in self._parts:
            self._parts[size] = [cp_shard_indices(self.cu_seqlens.long(), size, rank) for rank in range(size)]
        return self._parts[size]

    def segments(self, size: int, rank: int) -> VarlenSegments:
        """Return what the queries of context-parallel rank `rank` of `size` attend to."""
        if size not in self._segments:
            ends, longest = self.cu_seqlens, self.max_seqlen_q
            self._segments[size] = (
                VarlenSegments(ends, ends, longest, longest)
                if size == 1
                else VarlenSegments.of_context_rank(ends, longest, size, rank, torch.cat(self.parts(size)))
            )
        return self._segments[size]

    @cached_property
    def _parts(self) -> dict[int, list[torch.Tensor]]:
        return {}

    @cached_property
    def _segments(self) -> dict[int, VarlenSegments]:
        return {}


@contextlib.contextmanager
def rotate_by_position(gpt: GPTModel, positions: torch.Tensor) -> Iterator[None]:
    """Give Megatron-Core the rotary angles of each of the T packed tokens; positions: [T], in the token's sequence."""

    def angles(module: torch.nn.Module, args: Any, by_position: torch.Tensor) -> torch.Tensor:
        return by_position.squeeze(1).index_select(0, positions)  # [longest, 1, 1, d] to [T, 1, d]

    hook = gpt.rotary_pos_emb.register_forward_hook(angles)
    try:
        yield
    finally:
        hook.remove()


class CoreAttention(MegatronModule):
    """Grouped-query attention by torch: of packed sequences its variable-length attention where that runs.

    Elsewhere, and in decoding, scaled_dot_product_attention; packed sequences are then padded to the longest. Takes
    packed sequences at any context-parallel size, or (decoding, without context parallelism) a batch of equal lengths,
    causal or with a mask.
    """

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
        """Return [s, b, heads * d] for query [s, b, heads, d] and key, value [t, b, groups, d]; packed: [T, heads * d].

        attention_mask: [b, 1, s, t], True where masked; None: causal, the s queries being the last of the t positions.
        Packed: query [T, heads, d] and key, value [T, groups, d] of this context-parallel rank, causal per sequence.
        """
        if packed_seq_params is not None:
            size = self.config.context_parallel_size
            if varlen_refusal(query.device, query.dtype, query.shape[-1]) is None:
                return _unpadded(query, key, value, packed_seq_params, size).flatten(1)
            attend = _packed if size == 1 else _packed_over_ranks
            return attend(query, key, value, packed_seq_params).flatten(1)
        return _decoding_attention(query, key, value, attention_mask)


@cache
def _engine_attention() -> type:
    """Return Transformer Engine's attention for packed sequences, and torch's for decoding.

    Transformer Engine ignores the mask of Megatron-Core's decoding, whose mask types are `causal` and `no_mask`. It
    reads masks of type `padding` as padding on the right, and those of type `arbitrary` without a fused kernel.
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class EngineAttention(TEDotProductAttention):
        def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            *options: Any,
            packed_seq_params: PackedSequences | None = None,
            **more: Any,
        ) -> torch.Tensor:
            """Take and return what `CoreAttention.forward` does."""
            if packed_seq_params is None:
                return _decoding_attention(query, key, value, attention_mask)
            packed = packed_seq_params.for_engine
            return super().forward(query, key, value, attention_mask, *options, packed_seq_params=packed, **more)

    return EngineAttention


def _decoding_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Attend as `CoreAttention.forward` describes for sequences that are not packed."""
    s, b, heads, d = query.shape
    t, groups = key.shape[0], key.shape[2]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    if attention_mask is not None:
        # The heads of a group as further queries: no fused CUDA kernel takes both a mask and fewer heads of keys.
        q = q.reshape(b, groups, -1, d)
        visible = (~attention_mask).expand(b, heads // groups, s, t).reshape(b, 1, -1, t)
        out = _attention(q, k, v, visible, causal=False).reshape(b, heads, s, d)
    elif s == 1 or s == t:
        out = _attention(q, k, v, None, causal=s > 1)
    else:
        visible = torch.ones(s, t, dtype=torch.bool, device=q.device).tril(t - s)
        out = _attention(q, k, v, visible, causal=False)
    return out.permute(2, 0, 1, 3).reshape(s, b, heads * d)


def _unpadded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences, size: int
) -> torch.Tensor:
    rank = 0
    if size > 1:
        group = parallel_state.get_context_parallel_group()
        rank = group.rank()
        key, value = (gather_from_sequence_parallel_region(x.contiguous(), group=group) for x in (key, value))
    return varlen_attention(query, key, value, packed.segments(size, rank))


def _packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
    b, longest = len(packed.lengths), packed.max_seqlen_q
    q, k, v = (_unpack(x, packed.places, b, longest) for x in (query, key, value))
    return _pack(_attention(q, k, v, None, causal=True), packed.places)


def _packed_over_ranks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSequences
) -> torch.Tensor:
    """Attend to keys and values gathered over the context-parallel group, masked by position.

    Backward reduce-scatters their gradients.
    """
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
    before = (packed.cu_seqlens.long()[:-1] // size)[sequence]
    local = sequence * width + torch.arange(len(mine), device=mine.device) - before
    # rows of padding attend to the first key: a fully masked row would be NaN
    upto = torch.zeros(b * width, dtype=torch.long, device=mine.device).index_copy(0, local, position)
    visible = torch.arange(longest, device=mine.device) <= upto.view(b, 1, width, 1)
    return _pack(_attention(_unpack(query, local, b, width), k, v, visible, causal=False), local)


def _unpack(packed: torch.Tensor, places: torch.Tensor, b: int, length: int) -> torch.Tensor:
    """Pad [T, heads, d] to [b, heads, length, d] with zeros."""
    padded = packed.new_zeros(b * length, *packed.shape[1:]).index_copy(0, places, packed)
    return padded.view(b, length, *packed.shape[1:]).transpose(1, 2)


def _pack(padded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Drop the padding of [b, heads, length, d]: [T, heads, d]."""
    return padded.transpose(1, 2).flatten(0, 1).index_select(0, places)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, *, causal: bool
) -> torch.Tensor:
    grouped = k.shape[1] != q.shape[1]
    if grouped and q.is_cuda and (visible is not None or q.dtype == torch.float32):
        # flash attention takes no mask and no fp32, and the memory-efficient kernel no groups: all scores would be kept
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=grouped)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm for sequence parallelism, which sums its weight's gradient over the tensor-parallel group.

    Megatron-Core's wrapper of torch's norm does not support sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def uses_transformer_engine() -> bool:
    """Return whether layers are Transformer Engine's: CUDA is available and Megatron-Core imported the package."""
    return torch.cuda.is_available() and gpt_layer_specs.HAVE_TE


def attention_in_use(config: TransformerConfig) -> str:
    """Return one line for a run's log: which attention the layers of such a model use for packed sequences here."""
    if uses_transformer_engine():
        return "attention: Transformer Engine's"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refusal = varlen_refusal(device, config.params_dtype, config.kv_channels)
    if refusal is None:
        return "attention: torch's varlen_attn, without padding; norms and MLPs are torch's, not Transformer Engine's"
    return (
        "attention: torch's scaled_dot_product_attention, which pads the sequences of a micro-batch to its longest "
        f"(varlen_attn does not run: {refusal})"
    )


def layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Return the specs of this rank's (and virtual stage's) layers.

    Parameters of local and Transformer Engine layers have the same `model.global_param_name`.
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
    layer.submodules.self_attention.submodules.core_attention = _engine_attention()
    return layer, gpt_layer_specs.TENorm


def _local_layer(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """Return Megatron-Core's local layer with norms and attention that need neither CUDA nor Apex, and the norm."""
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
        # checkpoint names are Transformer Engine's, which fuses this norm into a dense MLP but not into experts
        del parts.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        _complete_router()
    return layer, RMSNorm


def _complete_router() -> None:
    """Define `te_general_gemm`, which Megatron-Core's router reads even without Transformer Engine."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


FP8_SETTINGS: dict[str, Any] = {"fp8": "e4m3", "fp8_recipe": "tensorwise", "fp8_param": True}
"""Fields of TransformerConfig for fp8 weights."""


def require_fp8_support(key: str) -> None:
    """Raise UserError, naming the recipe's key, if fp8 layers cannot run here."""
    if not uses_transformer_engine():
        raise UserError(f"{key}=fp8 needs CUDA and Transformer Engine, which are not here; bf16 needs neither")


def pad_fp8_inputs(gpt: GPTModel) -> None:
    """Let linear layers pad their inputs to the multiple of 16 tokens that fp8 matrix products need."""
    prepare_model_for_fp8_inference(gpt)
