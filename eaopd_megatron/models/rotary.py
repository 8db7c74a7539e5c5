"""Rotary positions: transformers' frequencies and attention factor in Megatron-Core's module."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from eaopd_megatron.errors import UserError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds whose frequencies do not change with the length of the sequence."""


def check_rotary(hf: Any, folder: str) -> None:
    """Refuse (UserError) a kind of rotary positions that `set_rotary` cannot give."""
    rope, supported = hf.rope_parameters, ", ".join(ROPE_TYPES)
    if rope["rope_type"] not in ROPE_TYPES:
        raise UserError(f"{folder}: rope_type {rope['rope_type']!r} is not supported; supported: {supported}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{folder}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported, only 1 is")


def rotary_base(hf: Any) -> float:
    """The base of the frequencies, an int where it is integral, as Megatron-Core's annotation wants it."""
    theta = float(hf.rope_parameters["rope_theta"])
    return int(theta) if theta.is_integer() else theta


def set_attention_factor(config: TransformerConfig, hf: Any) -> None:
    """Let Megatron-Core's attention scale cosines and sines by the kind's attention factor (yarn has one).

    Megatron-Core reads it from three attributes that are no fields of its configuration, as
    (0.1 · yarn_mscale · log(yarn_rotary_scaling_factor) + 1) / (0.1 · yarn_mscale_all_dim · log(…) + 1).
    """
    if hf.rope_parameters["rope_type"] == "default":
        return
    _, factor = _scaled(hf)
    extra: Any = config
    extra.yarn_rotary_scaling_factor = math.e
    extra.yarn_mscale = 10.0 * (factor - 1.0)
    extra.yarn_mscale_all_dim = 0.0


def set_frequencies(gpt: GPTModel, hf: Any) -> None:
    """Put the kind's frequencies into the model's rotary module, before its first forward pass."""
    if hf.rope_parameters["rope_type"] == "default":
        return
    frequencies, _ = _scaled(hf)
    rotary: Any = gpt.rotary_pos_emb
    if rotary.inv_freq.shape != frequencies.shape:
        raise ImportError("megatron-core changed RotaryEmbedding.inv_freq: adapt megatron/rotary.py")
    rotary.inv_freq = frequencies.to(rotary.inv_freq.device)


def _scaled(hf: Any) -> tuple[Any, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS[hf.rope_parameters["rope_type"]](hf, "cpu")
