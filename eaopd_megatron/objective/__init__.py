"""The entropy-aware distillation objective over vocabulary shards, with exact gradients. Depends on torch alone.

Names are imported on first use, so that `eaopd_megatron.objective.settings` can be read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from eaopd_megatron.objective.settings import Objective

if TYPE_CHECKING:
    from eaopd_megatron.objective.entropy_aware import entropy_aware_loss, token_statistics
    from eaopd_megatron.objective.linear import linear_entropy_aware_loss, linear_token_statistics
    from eaopd_megatron.objective.teacher import (
        TeacherHidden,
        TeacherLogits,
        TeacherTopK,
        entropy_bounds,
        summarise_teacher,
    )
    from eaopd_megatron.objective.token_losses import TokenLosses, TokenStatistics

__all__ = [
    "Objective",
    "TeacherHidden",
    "TeacherLogits",
    "TeacherTopK",
    "TokenLosses",
    "TokenStatistics",
    "entropy_aware_loss",
    "entropy_bounds",
    "linear_entropy_aware_loss",
    "linear_token_statistics",
    "summarise_teacher",
    "token_statistics",
]

_MODULES = {
    "entropy_aware": ("entropy_aware_loss", "token_statistics"),
    "linear": ("linear_entropy_aware_loss", "linear_token_statistics"),
    "teacher": ("TeacherHidden", "TeacherLogits", "TeacherTopK", "entropy_bounds", "summarise_teacher"),
    "token_losses": ("TokenLosses", "TokenStatistics"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
