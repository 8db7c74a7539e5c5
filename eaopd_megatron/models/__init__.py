"""What a model may be. A family is a table of rules (`dense`, `qwen3_moe`); add a new one to FAMILIES."""

from __future__ import annotations

from collections.abc import Sequence

from eaopd_megatron.errors import UserError
from eaopd_megatron.models.dense import LLAMA, QWEN2, QWEN3
from eaopd_megatron.models.mapping import Family
from eaopd_megatron.models.qwen3_moe import QWEN3_MOE

FAMILIES = {family.architecture: family for family in (QWEN3, QWEN3_MOE, QWEN2, LLAMA)}


def family_of(architectures: Sequence[str] | None, label: str) -> Family:
    """Return the family of a configuration's `architectures`. Raises UserError for an unknown architecture."""
    architecture = architectures[0] if architectures else "none"
    if architecture not in FAMILIES:
        raise UserError(
            f"{label}: architecture {architecture} is not supported; supported: {', '.join(FAMILIES)} "
            "(another one needs a mapping file in eaopd_megatron/models/)"
        )
    return FAMILIES[architecture]
