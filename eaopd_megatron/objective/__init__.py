"""The paper's objective: what is minimised, over vocabulary shards, with exact gradients. Imports torch alone."""

from .entropy_aware import TokenLosses, TokenStatistics, entropy_aware_loss, token_statistics
from .settings import Objective
from .teacher import TeacherLogits, TeacherTopK, entropy_bounds, summarise_teacher

__all__ = [
    "Objective",
    "TeacherLogits",
    "TeacherTopK",
    "TokenLosses",
    "TokenStatistics",
    "entropy_aware_loss",
    "entropy_bounds",
    "summarise_teacher",
    "token_statistics",
]
