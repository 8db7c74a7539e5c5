"""The recipe: a typed, frozen tree of settings, read from YAML and checked before anything starts."""

from eaopd_megatron.config.load import differences, dump, load_recipe, setting
from eaopd_megatron.config.tree import (
    Data,
    Distributed,
    Evaluation,
    ObjectiveChoice,
    Optimizer,
    Recipe,
    Reporting,
    Rollout,
    Run,
    Student,
    Teacher,
    Train,
)

__all__ = [
    "Data",
    "Distributed",
    "Evaluation",
    "ObjectiveChoice",
    "Optimizer",
    "Recipe",
    "Reporting",
    "Rollout",
    "Run",
    "Student",
    "Teacher",
    "Train",
    "differences",
    "dump",
    "load_recipe",
    "setting",
]
