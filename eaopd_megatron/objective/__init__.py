"""The paper's objective: what is minimised, over vocabulary shards, with exact gradients. Imports torch alone."""

from .entropy_aware import entropy_aware_loss, token_statistics
from .linear_head import linear_entropy_aware_loss, linear_token_statistics
from .losses import TokenLosses, TokenStatistics
from .settings import Objective
from .teacher import TeacherHidden, TeacherLogits, TeacherTopK, entropy_bounds, summarise_teacher

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
