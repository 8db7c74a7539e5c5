"""Frozen weights in fp8: Transformer Engine's parameters under Megatron-Core's recipe of one scale a tensor.

The layers' matrices are e4m3; norms, embedding and output layer stay bf16, and so do the hidden states. The scales of
activations are made of the activations themselves, so that a token's states depend on no earlier request. This has not
been run: it needs CUDA and Transformer Engine.
"""

from __future__ import annotations

from typing import Any

from megatron.core.fp8_utils import prepare_model_for_fp8_inference
from megatron.core.models.gpt.gpt_model import GPTModel

from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.layers import uses_transformer_engine

SETTINGS: dict[str, Any] = {"fp8": "e4m3", "fp8_recipe": "tensorwise", "fp8_param": True}
"""Of Megatron-Core's TransformerConfig."""


def check_fp8(key: str) -> None:
    """Raises UserError, which names the recipe's key, where Transformer Engine cannot run."""
    if not uses_transformer_engine():
        raise UserError(f"{key}=fp8 needs CUDA and Transformer Engine, which are not here; bf16 needs neither")


def take_any_length(gpt: GPTModel) -> None:
    """fp8 products want a multiple of 16 tokens: linear layers pad what they are given, and cut it off again."""
    prepare_model_for_fp8_inference(gpt)
