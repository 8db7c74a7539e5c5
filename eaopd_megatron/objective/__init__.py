"""The paper's objective: what is minimised, over vocabulary shards, with exact gradients. Imports torch alone."""

from eaopd_megatron.objective.entropy_aware import entropy_aware_loss, token_statistics
from eaopd_megatron.objective.linear import linear_entropy_aware_loss, linear_token_statistics
from eaopd_megatron.objective.settings import Objective
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
