"""Dense families, and the rules that they share with others: Llama-like decoders have the same tensor names."""

from eaopd_megatron.models.mapping import EMBEDDING, GATED_MLP, OUTPUT, QKV, REPLICATED, ROW, VOCAB, Family, MappingRule

HF = "model.layers.{layer}."
MCORE = "decoder.layers.{layer}."

VOCABULARY_EMBEDDING = (MappingRule(VOCAB, EMBEDDING, ("model.embed_tokens.weight", "vocab hidden")),)

ATTENTION = (
    MappingRule(REPLICATED, MCORE + "input_layernorm.weight", (HF + "input_layernorm.weight", "hidden")),
    MappingRule(
        QKV,
        MCORE + "self_attention.linear_qkv.weight",
        (HF + "self_attn.q_proj.weight", "q hidden"),
        (HF + "self_attn.k_proj.weight", "kv hidden"),
        (HF + "self_attn.v_proj.weight", "kv hidden"),
    ),
    MappingRule(ROW, MCORE + "self_attention.linear_proj.weight", (HF + "self_attn.o_proj.weight", "hidden q")),
)

QKV_BIAS = (
    MappingRule(
        QKV,
        MCORE + "self_attention.linear_qkv.bias",
        (HF + "self_attn.q_proj.bias", "q"),
        (HF + "self_attn.k_proj.bias", "kv"),
        (HF + "self_attn.v_proj.bias", "kv"),
    ),
)

QK_NORMS = (
    MappingRule(REPLICATED, MCORE + "self_attention.q_layernorm.weight", (HF + "self_attn.q_norm.weight", "head_dim")),
    MappingRule(REPLICATED, MCORE + "self_attention.k_layernorm.weight", (HF + "self_attn.k_norm.weight", "head_dim")),
)

MLP_NORM = (
    MappingRule(REPLICATED, MCORE + "pre_mlp_layernorm.weight", (HF + "post_attention_layernorm.weight", "hidden")),
)

DENSE_MLP = (
    MappingRule(
        GATED_MLP,
        MCORE + "mlp.linear_fc1.weight",
        (HF + "mlp.gate_proj.weight", "ffn hidden"),
        (HF + "mlp.up_proj.weight", "ffn hidden"),
    ),
    MappingRule(ROW, MCORE + "mlp.linear_fc2.weight", (HF + "mlp.down_proj.weight", "hidden ffn")),
)

HEAD = (
    MappingRule(REPLICATED, "decoder.final_layernorm.weight", ("model.norm.weight", "hidden")),
    MappingRule(VOCAB, OUTPUT, ("lm_head.weight", "vocab hidden")),
)


LLAMA = Family(
    architecture="LlamaForCausalLM",
    rules=(*VOCABULARY_EMBEDDING, *ATTENTION, *MLP_NORM, *DENSE_MLP, *HEAD),
    required={"attention_bias": False, "mlp_bias": False},
)


QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    rules=(*VOCABULARY_EMBEDDING, *ATTENTION, *QKV_BIAS, *MLP_NORM, *DENSE_MLP, *HEAD),
    settings=lambda config: {"add_qkv_bias": True},
    required={"use_sliding_window": False},
    defaults={"num_key_value_heads": 32},
)


QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    rules=(*VOCABULARY_EMBEDDING, *ATTENTION, *QK_NORMS, *MLP_NORM, *DENSE_MLP, *HEAD),
    settings=lambda config: {"qk_layernorm": True},
    required={"attention_bias": False, "use_sliding_window": False},
    defaults={"num_key_value_heads": 32, "head_dim": 128},
)
