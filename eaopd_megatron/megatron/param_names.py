"""Names of parameters that depend neither on the layout nor on Transformer Engine."""

from __future__ import annotations

import re

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine's layers that hold the norm of their input, and the norm's name in Megatron's local layers."""


def global_name(name: str, *, first_layer: int = 0, first_expert: int = 0) -> str:
    """The name in the whole model of a chunk's parameter, as Megatron's local layers would call it.

    first_layer, first_expert: numbers, in the whole model, of the chunk's layer 0 and expert 0.
    """
    for fused, own in _FUSED_NORMS.items():
        name = name.replace(fused, own)
    name = _GROUPED_EXPERT.sub(r"mlp.experts.local_experts.\3.\1.\2", name)
    name = _LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) + first_layer}.", name)
    return _EXPERT.sub(lambda found: f"mlp.experts.local_experts.{int(found[1]) + first_expert}.", name)
