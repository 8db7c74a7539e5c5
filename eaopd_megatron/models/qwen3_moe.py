"""Qwen3 mixture of experts: Qwen3's attention; every layer routes each token to top-k experts, without a shared one."""

from typing import Any

from eaopd_megatron.models.dense import ATTENTION, HEAD, HF, MCORE, MLP_NORM, QK_NORMS, VOCABULARY_EMBEDDING
from eaopd_megatron.models.mapping import GATED_MLP, REPLICATED, ROW, Family, MappingRule

HF_EXPERT = HF + "mlp.experts.{expert}."
EXPERT = MCORE + "mlp.experts.local_experts.{expert}."

EXPERTS = (
    MappingRule(REPLICATED, MCORE + "mlp.router.weight", (HF + "mlp.gate.weight", "experts hidden")),
    MappingRule(
        GATED_MLP,
        EXPERT + "linear_fc1.weight",
        (HF_EXPERT + "gate_proj.weight", "moe_ffn hidden"),
        (HF_EXPERT + "up_proj.weight", "moe_ffn hidden"),
    ),
    MappingRule(ROW, EXPERT + "linear_fc2.weight", (HF_EXPERT + "down_proj.weight", "hidden moe_ffn")),
)


def _settings(config: Any) -> dict[str, Any]:
    """Return the router's settings: no auxiliary loss; fp32, as the softmax is in transformers."""
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


QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    rules=(*VOCABULARY_EMBEDDING, *ATTENTION, *QK_NORMS, *MLP_NORM, *EXPERTS, *HEAD),
    settings=_settings,
    required={
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,  # every layer has experts
        "mlp_only_layers": [],
    },
    defaults={"num_key_value_heads": 4},
)
