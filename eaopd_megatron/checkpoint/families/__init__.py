"""One file a family of models: the table between Hugging Face's names and Megatron-Core's."""

from __future__ import annotations

from typing import Any

from eaopd_megatron.checkpoint.families import qwen3
from eaopd_megatron.checkpoint.mapping import Family
from eaopd_megatron.errors import UserError

FAMILIES = {family.architecture: family for family in (qwen3.FAMILY,)}


def family_of(config: dict[str, Any], label: str) -> Family:
    """The family of a config.json. UserError for an architecture that has no mapping."""
    architectures = config.get("architectures") or ["none"]
    if architectures[0] not in FAMILIES:
        raise UserError(
            f"{label}: architecture {architectures[0]} is not supported; supported: {', '.join(FAMILIES)} "
            "(another one needs a mapping file in eaopd_megatron/checkpoint/families/)"
        )
    return FAMILIES[architectures[0]]
