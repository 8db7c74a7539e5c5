"""A Hugging Face configuration → Megatron-Core's TransformerConfig."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from eaopd_megatron.distributed.parallel_state import ParallelLayout
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.layers import FP8_SETTINGS as FP8
from eaopd_megatron.megatron.layers import uses_transformer_engine
from eaopd_megatron.models.mapping import head_dim
from eaopd_megatron.models.registry import family_of
from eaopd_megatron.models.rotary import check_rotary
from eaopd_megatron.models.shapes import padded_vocab_size as padded_vocab_size

Recompute = Literal["none", "selective", "full"]
"""Activations that backward makes again: none, core attention's, or whole layers' from their inputs."""


def check_supported(hf: Any, layout: ParallelLayout, folder: str) -> None:
    """Refuse, before anything is allocated, a model that this version or this layout cannot hold (UserError)."""
    family = family_of(hf.architectures, folder)
    for key, value in family.required.items():
        if getattr(hf, key, value) != value:
            raise UserError(
                f"{folder}: {key}={json.dumps(getattr(hf, key))} is not supported; "
                f"{family.architecture} is supported with {key}={json.dumps(value)}"
            )
    if hf.hidden_act != "silu":
        raise UserError(f"{folder}: hidden_act {hf.hidden_act!r} is not supported; supported: silu")
    check_rotary(hf, folder)
    experts = "experts" in family.sizes(hf)
    if experts:
        _check_experts(hf, layout, folder)
    elif layout.expert_parallel * layout.expert_tensor_parallel > 1:
        raise UserError(
            f"{folder}: {family.architecture} has no experts; set expert_parallel and expert_tensor_parallel to 1"
        )
    if layout.virtual_pipeline > 1 and layout.pipeline_parallel == 1:
        raise UserError(f"{folder}: virtual_pipeline={layout.virtual_pipeline} needs pipeline_parallel of 2 or more")
    heads = ["num_attention_heads", "num_key_value_heads"]
    for name in heads if experts else [*heads, "intermediate_size"]:
        _check_divides(layout, ("tensor_parallel",), hf, name, folder)
    _check_divides(layout, ("pipeline_parallel", "virtual_pipeline"), hf, "num_hidden_layers", folder)


def _check_experts(hf: Any, layout: ParallelLayout, folder: str) -> None:
    _check_divides(layout, ("expert_parallel",), hf, "num_experts", folder)
    _check_divides(layout, ("expert_tensor_parallel",), hf, "moe_intermediate_size", folder)
    if not 1 <= hf.num_experts_per_tok <= hf.num_experts:
        raise UserError(
            f"{folder}: num_experts_per_tok={hf.num_experts_per_tok} is not between 1 and num_experts={hf.num_experts}"
        )
    if hf.num_experts_per_tok == 1 and hf.norm_topk_prob:
        raise UserError(f"{folder}: num_experts_per_tok=1 with norm_topk_prob gives the router no gradient")
    if min(layout.expert_parallel, layout.expert_tensor_parallel) > 1 and not torch.cuda.is_available():
        raise UserError(
            f"{folder}: expert_parallel={layout.expert_parallel} with expert_tensor_parallel="
            f"{layout.expert_tensor_parallel} needs CUDA: gloo cannot gather unequal numbers of tokens; set one to 1"
        )
    if layout.tensor_parallel > 1 and not layout.sequence_parallel:
        raise UserError(
            f"{folder}: experts under tensor_parallel={layout.tensor_parallel} need sequence_parallel=true, "
            "or every rank would send the same tokens to them"
        )


def _check_divides(layout: ParallelLayout, divisors: tuple[str, ...], hf: Any, name: str, folder: str) -> None:
    parts = {divisor: getattr(layout, divisor) for divisor in divisors}
    if getattr(hf, name) % math.prod(parts.values()):
        product = " x ".join(f"{divisor}={size}" for divisor, size in parts.items() if size > 1)
        raise UserError(f"{folder}: {product} does not divide {name}={getattr(hf, name)}")


def transformer_config(
    hf: Any, layout: ParallelLayout, dtype: torch.dtype, recompute: Recompute = "none", *, fp8: bool = False
) -> TransformerConfig:
    """Megatron-Core's configuration of a model at this layout; no dropout, losses summed per token.

    fp8: the layers' weights, frozen. What differs from family to family is in `Family.settings`.
    """
    settings = family_of(hf.architectures, "model").settings(hf)
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=head_dim(hf),
        ffn_hidden_size=hf.intermediate_size,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor_parallel,
        variable_seq_lengths=layout.pipeline_parallel > 1,  # micro-batches differ in length
        # interleaved: on two stages a batched exchange would mix up the tensors of its two directions
        batch_p2p_comm=layout.virtual_pipeline == 1,
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # what variable_seq_lengths asks of dense models too
        sequence_parallel=layout.sequence_parallel and layout.tensor_parallel > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # every parameter is loaded; the import checks that none is left out
        calculate_per_token_loss=True,  # before DDP is built, or gradients come out divided by the data-parallel size
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        moe_grouped_gemm="num_moe_experts" in settings and uses_transformer_engine(),
        **settings,
        **(FP8 if fp8 else {}),
    )
