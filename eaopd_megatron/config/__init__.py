"""The recipe: a typed, frozen tree of settings, read from YAML and checked before anything starts."""

from eaopd_megatron.config.loader import differences, dump, load_recipe, setting
from eaopd_megatron.config.schema import (
    Data,
    Distributed,
    Evaluation,
    ObjectiveChoice,
    Optimizer,
    Recipe,
    Reporting,
    Rollout,
    Run,
    Servers,
    Student,
    Teacher,
    Train,
    WeightSync,
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
    "Servers",
    "Student",
    "Teacher",
    "Train",
    "WeightSync",
    "differences",
    "dump",
    "load_recipe",
    "setting",
]
