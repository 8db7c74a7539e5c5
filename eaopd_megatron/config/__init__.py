"""The recipe: a typed, frozen tree of values, read from YAML and checked before anything starts."""

from eaopd_megatron.config.loader import dump_recipe, load_recipe, recipe_differences, recipe_value
from eaopd_megatron.config.schema import Recipe, StudentConfig

__all__ = ["Recipe", "StudentConfig", "dump_recipe", "load_recipe", "recipe_differences", "recipe_value"]
