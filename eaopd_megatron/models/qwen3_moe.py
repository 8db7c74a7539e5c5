"""Qwen3 mixture of experts: Qwen3's attention; every layer routes each token to its best experts, none is shared."""

from typing import Any

from eaopd_megatron.models.dense import ATTENTION, HEAD, HF, MCORE, MLP_NORM, QK_NORMS, WORDS
from eaopd_megatron.models.mapping import GATED_MLP, REPLICATED, ROW, Family, MappingRule, dense_sizes

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


def sizes(config: Any) -> dict[str, int]:
    """The dense decoder's, and the experts'."""
    return {**dense_sizes(config), "experts": config.num_experts, "moe_ffn": config.moe_intermediate_size}


def settings(config: Any) -> dict[str, Any]:
    """The router adds nothing to the loss; it works in fp32, as its softmax does in transformers."""
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
    rules=(*WORDS, *ATTENTION, *QK_NORMS, *MLP_NORM, *EXPERTS, *HEAD),
    sizes=sizes,
    settings=settings,
    required={
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,  # every layer has experts
        "mlp_only_layers": [],
    },
)
