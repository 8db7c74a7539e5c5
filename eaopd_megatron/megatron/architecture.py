"""A Hugging Face configuration → Megatron-Core's TransformerConfig."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.groups import Layout

VOCAB_DIVISOR = 128


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the embedding over all ranks: the next multiple of 128 · tensor_parallel (Megatron's rule).

    151,936 stays at tensor_parallel 1 and becomes 152,064 at 2 and 152,064 at 4.
    """
    multiple = VOCAB_DIVISOR * tensor_parallel
    return (vocab_size + multiple - 1) // multiple * multiple


def check_config(hf: Any, layout: Layout, folder: str) -> None:
    """Refuse, before anything is allocated, a model that this version or this layout cannot hold (UserError)."""
    rope = getattr(hf, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{folder}: rope_type {rope['rope_type']!r} is not supported; supported: default")
    if getattr(hf, "use_sliding_window", False):
        raise UserError(f"{folder}: sliding-window attention is not supported; set use_sliding_window to false")
    if getattr(hf, "attention_bias", False):
        raise UserError(f"{folder}: attention_bias is not supported")
    if hf.hidden_act != "silu":
        raise UserError(f"{folder}: hidden_act {hf.hidden_act!r} is not supported; supported: silu")
    tp = layout.tensor_parallel
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(hf, name) % tp:
            raise UserError(f"{folder}: tensor_parallel={tp} does not divide {name}={getattr(hf, name)}")


def transformer_config(hf: Any, layout: Layout, dtype: torch.dtype) -> TransformerConfig:
    """Megatron-Core's configuration of a Qwen3 model at this layout; no dropout, losses summed per token."""
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        ffn_hidden_size=hf.intermediate_size,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        qk_layernorm=True,
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
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
