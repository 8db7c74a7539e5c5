"""Qwen3, dense: grouped queries with a norm on q and k, no biases, gated SiLU, embeddings tied or not."""

from eaopd_megatron.checkpoint.families.decoder import ATTENTION, DENSE_MLP, HEAD, MLP_NORM, QK_NORMS, WORDS
from eaopd_megatron.checkpoint.mapping import Family

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    rules=(*WORDS, *ATTENTION, *QK_NORMS, *MLP_NORM, *DENSE_MLP, *HEAD),
    settings=lambda config: {"qk_layernorm": True},
    required={"attention_bias": False, "use_sliding_window": False},
)
