"""One file a family of models: the table between Hugging Face's names and Megatron-Core's."""

from __future__ import annotations

from collections.abc import Sequence

from eaopd_megatron.checkpoint.families import llama, qwen2, qwen3, qwen3_moe
from eaopd_megatron.checkpoint.mapping import Family
from eaopd_megatron.errors import UserError

FAMILIES = {module.FAMILY.architecture: module.FAMILY for module in (qwen3, qwen3_moe, qwen2, llama)}


def family_of(architectures: Sequence[str] | None, label: str) -> Family:
    """The family of a configuration's `architectures`. UserError for an architecture that has no mapping."""
    architecture = architectures[0] if architectures else "none"
    if architecture not in FAMILIES:
        raise UserError(
            f"{label}: architecture {architecture} is not supported; supported: {', '.join(FAMILIES)} "
            "(another one needs a mapping file in eaopd_megatron/checkpoint/families/)"
        )
    return FAMILIES[architecture]
