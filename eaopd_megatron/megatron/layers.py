"""The transformer layer: Transformer Engine's on CUDA, else Megatron-Core's own with parts that run without it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from eaopd_megatron.megatron.attention import CoreAttention


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
    """This rank's (and virtual stage's) layers; `names.global_name` makes the names of both kinds' parameters the same.

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
