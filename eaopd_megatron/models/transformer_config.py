"""A Hugging Face configuration → Megatron-Core's TransformerConfig and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from eaopd_megatron.config.parallel import ParallelLayout, Recompute
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.families import family_of


def transformer_config(
    hf: Any,
    layout: ParallelLayout,
    dtype: torch.dtype,
    recompute: Recompute = "none",
    *,
    engine: bool = False,
    layer_settings: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """Return Megatron-Core's configuration of a model at this layout; no dropout, losses summed per token.

    hf: transformers' configuration. engine: the layers are Transformer Engine's, with its grouped product of experts
    and its rotary kernel, which takes no attention factor. layer_settings: further fields, such as those of fp8. Fields
    that differ between families are in `Family.settings`.
    Raises UserError for an expert layout that gloo cannot run.
    """
    if min(layout.expert_parallel, layout.expert_tensor_parallel) > 1 and not torch.cuda.is_available():
        raise UserError(
            f"expert_parallel={layout.expert_parallel} with expert_tensor_parallel={layout.expert_tensor_parallel} "
            "needs CUDA: gloo cannot gather unequal numbers of tokens; set one to 1"
        )
    family = family_of(hf.architectures, "model")
    sizes, settings = family.sizes(hf), family.settings(hf)
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=sizes["head_dim"],
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
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths needs it in dense models too
        sequence_parallel=layout.sequence_parallel and layout.tensor_parallel > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # every parameter is loaded, which the import checks
        calculate_per_token_loss=True,  # before DDP is built, or gradients come out divided by the data-parallel size
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=torch.cuda.is_available(),  # keeps two tensors less of each MLP until backward
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=engine and _attention_factor(hf) == 1,
        moe_grouped_gemm=engine and family.has_experts,
        **settings,
        **(layer_settings or {}),
    )


def rotary_base(hf: Any) -> float:
    """Return the base of the frequencies; an int where it is integral, as Megatron-Core annotates it."""
    theta = float(hf.rope_parameters["rope_theta"])
    return int(theta) if theta.is_integer() else theta


def set_attention_factor(config: TransformerConfig, hf: Any) -> None:
    """Make Megatron-Core's attention scale cosines and sines by the attention factor of the rope type (yarn has one).

    Megatron-Core reads it from three attributes that are no fields of its configuration, as
    (0.1 · yarn_mscale · log(yarn_rotary_scaling_factor) + 1) / (0.1 · yarn_mscale_all_dim · log(…) + 1).
    """
    factor = _attention_factor(hf)
    if factor == 1:
        return
    extra: Any = config
    extra.yarn_rotary_scaling_factor = math.e
    extra.yarn_mscale = 10.0 * (factor - 1.0)
    extra.yarn_mscale_all_dim = 0.0


def set_frequencies(gpt: GPTModel, hf: Any) -> None:
    """Put transformers' frequencies into the model's rotary module, before its first forward pass."""
    if hf.rope_parameters["rope_type"] == "default":
        return
    frequencies, _ = _scaled(hf)
    rotary: Any = gpt.rotary_pos_emb
    if rotary.inv_freq.shape != frequencies.shape:
        raise ImportError("megatron-core changed RotaryEmbedding.inv_freq: adapt models/transformer_config.py")
    rotary.inv_freq = frequencies.to(rotary.inv_freq.device)


def _attention_factor(hf: Any) -> float:
    """Return what the rope type multiplies cosines and sines by."""
    return 1.0 if hf.rope_parameters["rope_type"] == "default" else _scaled(hf)[1]


def _scaled(hf: Any) -> tuple[Any, float]:
    """Return transformers' inverse frequencies [head_dim / 2] and attention factor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[hf.rope_parameters["rope_type"]](hf, "cpu")
