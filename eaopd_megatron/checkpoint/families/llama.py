"""Llama 3, dense: grouped queries, no biases, gated SiLU, embeddings tied or not."""

from eaopd_megatron.checkpoint.families.decoder import ATTENTION, DENSE_MLP, HEAD, MLP_NORM, WORDS
from eaopd_megatron.checkpoint.mapping import Family

FAMILY = Family(
    architecture="LlamaForCausalLM",
    rules=(*WORDS, *ATTENTION, *MLP_NORM, *DENSE_MLP, *HEAD),
    required={"attention_bias": False, "mlp_bias": False},
)
