"""Which of a recipe's teachers is served, before torch is imported."""

from __future__ import annotations

from eaopd_megatron.config import Recipe
from eaopd_megatron.config.schema import TeacherConfig
from eaopd_megatron.errors import RecipeError


def key_of(name: str) -> str:
    """The recipe's section of a teacher; '': of its only one."""
    return f"teachers.{name}" if name else "teacher"


def chosen(recipe: Recipe, name: str) -> TeacherConfig:
    """The recipe's separate teacher of this name ('': its only one). Raises RecipeError."""
    named = recipe.named_teachers()
    known = ", ".join(named)
    if name not in named:
        if not name:
            raise RecipeError(f"the recipe has teachers {known}: say which with --teacher")
        remedy = f"it has {known}" if known else "leave --teacher out"
        raise RecipeError(f"the recipe has no teacher {name}; {remedy}")
    if named[name].placement != "separate":
        key = key_of(name)
        raise RecipeError(
            f"{key}.placement is {named[name].placement}: eaopd teach serves a teacher with {key}.placement=separate"
        )
    return named[name]
