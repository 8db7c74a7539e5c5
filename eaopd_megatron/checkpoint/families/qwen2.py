"""Qwen2 and Qwen2.5, dense: grouped queries with a bias on q, k and v, gated SiLU, embeddings tied or not."""

from eaopd_megatron.checkpoint.families.decoder import ATTENTION, DENSE_MLP, HEAD, MLP_NORM, QKV_BIAS, WORDS
from eaopd_megatron.checkpoint.mapping import Family

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    rules=(*WORDS, *ATTENTION, *QKV_BIAS, *MLP_NORM, *DENSE_MLP, *HEAD),
    settings=lambda config: {"add_qkv_bias": True},
    required={"use_sliding_window": False},
)
