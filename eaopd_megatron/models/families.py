"""Families of models as tables of mapping rules. A new architecture is a `Family` in FAMILIES."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eaopd_megatron.errors import UserError
from eaopd_megatron.models.mapping import (
    EMBEDDING,
    GATED_MLP,
    OUTPUT,
    QKV,
    REPLICATED,
    ROW,
    VOCAB,
    Family,
    MappingRule,
    ParamMapping,
)


def _layer(mapping: ParamMapping, megatron_name: str, *hf_tensors: tuple[str, str]) -> MappingRule:
    tensors = (("model.layers.{layer}." + name, shape) for name, shape in hf_tensors)
    return MappingRule(mapping, "decoder.layers.{layer}." + megatron_name, *tensors)


def _qkv(kind: str, *shapes: str) -> MappingRule:
    tensors = ((f"self_attn.{part}_proj.{kind}", shape) for part, shape in zip("qkv", shapes, strict=True))
    return _layer(QKV, f"self_attention.linear_qkv.{kind}", *tensors)


def _gated_mlp(megatron: str, hf: str, width: str) -> tuple[MappingRule, MappingRule]:
    gate, up = ((f"{hf}.{part}_proj.weight", f"{width} hidden") for part in ("gate", "up"))
    down = (f"{hf}.down_proj.weight", f"hidden {width}")
    return _layer(GATED_MLP, f"{megatron}.linear_fc1.weight", gate, up), _layer(
        ROW, f"{megatron}.linear_fc2.weight", down
    )


_EMBEDDING = MappingRule(VOCAB, EMBEDDING, ("model.embed_tokens.weight", "vocab hidden"))
_ATTENTION = (
    _layer(REPLICATED, "input_layernorm.weight", ("input_layernorm.weight", "hidden")),
    _qkv("weight", "query_width hidden", "kv_width hidden", "kv_width hidden"),
    _layer(ROW, "self_attention.linear_proj.weight", ("self_attn.o_proj.weight", "hidden query_width")),
)
_QKV_BIAS = _qkv("bias", "query_width", "kv_width", "kv_width")
_QK_NORMS = (
    _layer(REPLICATED, "self_attention.q_layernorm.weight", ("self_attn.q_norm.weight", "head_dim")),
    _layer(REPLICATED, "self_attention.k_layernorm.weight", ("self_attn.k_norm.weight", "head_dim")),
)
_MLP_NORM = _layer(REPLICATED, "pre_mlp_layernorm.weight", ("post_attention_layernorm.weight", "hidden"))
_MLP = (_MLP_NORM, *_gated_mlp("mlp", "mlp", "intermediate"))
_EXPERTS = (
    _MLP_NORM,
    _layer(REPLICATED, "mlp.router.weight", ("mlp.gate.weight", "experts hidden")),
    *_gated_mlp("mlp.experts.local_experts.{expert}", "mlp.experts.{expert}", "expert_intermediate"),
)
_HEAD = (
    MappingRule(REPLICATED, "decoder.final_layernorm.weight", ("model.norm.weight", "hidden")),
    MappingRule(VOCAB, OUTPUT, ("lm_head.weight", "vocab hidden")),
)


def _moe_settings(config: Any) -> dict[str, Any]:
    """Return the router's settings: top-k, no shared expert, no auxiliary loss, fp32 as transformers' softmax."""
    return {
        "qk_layernorm": True,
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_router_topk": config.num_experts_per_tok,
        # weights that sum to one over the chosen experts are the softmax over the chosen logits
        "moe_router_pre_softmax": not config.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
    }


QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    rules=(_EMBEDDING, *_ATTENTION, *_QK_NORMS, *_MLP, *_HEAD),
    settings=lambda config: {"qk_layernorm": True},
    required={"attention_bias": False, "use_sliding_window": False},
    defaults={"num_key_value_heads": 32, "head_dim": 128},
)
QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    rules=(_EMBEDDING, *_ATTENTION, *_QK_NORMS, *_EXPERTS, *_HEAD),
    settings=_moe_settings,
    required={
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,  # every layer has experts
        "mlp_only_layers": [],
    },
    defaults={"num_key_value_heads": 4},
)
QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    rules=(_EMBEDDING, *_ATTENTION, _QKV_BIAS, *_MLP, *_HEAD),
    settings=lambda config: {"add_qkv_bias": True},
    required={"use_sliding_window": False},
    defaults={"num_key_value_heads": 32},
)
LLAMA = Family(
    architecture="LlamaForCausalLM",
    rules=(_EMBEDDING, *_ATTENTION, *_MLP, *_HEAD),
    required={"attention_bias": False, "mlp_bias": False},
)
FAMILIES = {family.architecture: family for family in (QWEN3, QWEN3_MOE, QWEN2, LLAMA)}


def family_of(architectures: Sequence[str] | None, label: str) -> Family:
    """Return the family of a configuration's `architectures`. Raises UserError for an unknown architecture."""
    architecture = architectures[0] if architectures else "none"
    if architecture not in FAMILIES:
        raise UserError(
            f"{label}: architecture {architecture} is not supported; supported: {', '.join(FAMILIES)} "
            "(another one needs a mapping in eaopd_megatron/models/families.py)"
        )
    return FAMILIES[architecture]
