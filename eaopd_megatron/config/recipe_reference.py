"""What each key means: recipes/README.md, made from the schema, and the text of `eaopd show RECIPE --explain KEY`.

python -m eaopd_megatron.config.recipe_reference > recipes/README.md
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Mapping
from functools import cache, partial
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

from eaopd_megatron.config import aliases
from eaopd_megatron.config.loader import recipe_value
from eaopd_megatron.config.schema import Recipe
from eaopd_megatron.errors import RecipeError

_HEAD = """\
# Recipes

<!-- Made from the schema; do not edit: python -m eaopd_megatron.config.recipe_reference > recipes/README.md -->

A recipe is a YAML file of sections. It gives what differs from the defaults; `eaopd show RECIPE` prints all of it,
`eaopd show RECIPE --explain KEY` where a value comes from and what it means. Required are `run.folder`,
`student.model`, `teacher.model` and `train.iterations`. Keys and values are checked before anything starts.

- **Inheritance.** `base: FILE`, or a list of files, names recipes to build on, relative to the file. Sections are
  merged key by key, later files win, lists are replaced.
- **Overrides.** `eaopd train RECIPE optimizer.lr=1e-5 student.tensor_parallel=4` replaces values; an override is YAML.
- **References.** `${section.key}` stands for the value of that key.
- **Paths** of models and data are looked up in the folder of the file that gives them, in the recipe's, and in the
  working directory. Anything else is a hub id.
- **Resuming.** A run that has trained goes on with changed values of the keys *at resume*: yes, or logged: these change
  the rest of the run, with a line in the log and `changed/KEY` in the metrics. Before the first checkpoint any key may
  change. `eaopd train RECIPE run.folder=NEW --continue-from RUN` begins a new run from another one's student.
- **Several teachers.** `teachers: {math: {model: A}, code: {model: B}}` names them; each has the keys of `teacher` and
  inherits those it does not give. The prompt's field `data.teacher_field` chooses one.

`countdown/` runs on two CPU cores (its README has results), `qwen3/` has the paper's pairs and pairs with larger
teachers, `_base/` what recipes share.
"""


def recipe_reference() -> str:
    """Return the text of recipes/README.md."""
    models, parts = aliases.section_models(), [_HEAD]
    for section in ("", *models):
        title = f"`{section}`\n\n{_section_text(section)}" if section else "Top level"
        names = aliases.section_keys()[section] if section else [n for n in Recipe.model_fields if n not in models]
        keys = [f"{section}.{name}".lstrip(".") for name in names]
        rows = [
            "| key | type | default | unit | at resume | meaning |",
            "| --- | --- | --- | --- | --- | --- |",
            *map(_row, keys),
        ]
        parts.append("\n".join([f"\n## {title}\n", *rows, ""]))
    return "".join(parts)


def _row(key: str) -> str:
    info = describe_key(key)
    default = info["default"] if info["default"] == "required" else f"`{info['default']}`"
    meaning = f"{info['meaning']} Old name: {info['old name']}." if info["old name"] else info["meaning"]
    cells = (f"`{key}`", info["type"], default, info["unit"], info["at resume"], meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def explain_key(recipe: Recipe, origins: Mapping[str, str], key: str) -> str:
    """Return value, origin, type, default, unit and meaning of a key, or of all keys of a section.

    origins: as `load_with_origins` returns them. Raises RecipeError for a key that does not exist.
    """
    key = aliases.current_key(key)
    kind = "teacher" if key.startswith("teachers.") and key.partition(".")[2] in recipe.teachers else key
    if kind in aliases.section_models():
        keys = [f"{key}.{name}" for name in aliases.section_keys()[kind]]
        return "\n".join([f"{key}: {_section_text(kind)}\n", *(explain_key(recipe, origins, one) for one in keys)])
    schema_key = aliases.teacher_schema_key(key)
    value = recipe.model_dump()["teachers"] if key == "teachers" else recipe_value(recipe, key)
    if schema_key not in aliases.value_keys():  # a named teacher, or a key within `teachers`
        raise RecipeError(aliases.unknown_key_message(key))
    info = {"from": origins.get(key) or origins.get(schema_key) or "the default", **describe_key(schema_key)}
    wrap = partial(textwrap.fill, width=100, subsequent_indent=" " * 12)
    lines = [wrap(text, initial_indent=f"  {name:<10}") for name, text in info.items() if text]
    return "\n".join([f"{key} = {_shown(value)}", *lines])


def describe_key(key: str) -> dict[str, str]:
    """Return type, default, unit, meaning and old name of a dotted key (`teacher.x` for `teachers.NAME.x`)."""
    section, _, name = key.rpartition(".")
    field = _model(section).model_fields[name]
    meaning, _, unit = field_docstrings(section).get(name, "").partition(" [")
    note = f" (renamed in {aliases.RENAMED_SINCE}, works until {aliases.RENAMED_UNTIL})"
    return {
        "type": _type_text(_properties(section)[name]),
        "default": "required" if field.is_required() else _shown(field.get_default()),
        "unit": unit.rstrip("]"),
        "at resume": aliases.at_resume(key).value,
        "meaning": meaning,
        "old name": next((f"{old}{note}" for old, new in aliases.RENAMED.items() if new == key), ""),
    }


@cache
def field_docstrings(section: str) -> dict[str, str]:
    """Return the string under each field of a section ('': the recipe itself), on one line.

    pydantic's `use_attribute_docstrings` reads them when a class is made, which every command would wait for.
    """
    (definition,) = ast.parse(inspect.getsource(_model(section))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


@cache
def _properties(section: str) -> dict[str, Any]:
    """Return the JSON schema of each key of a section."""
    return dict(_model(section).model_json_schema()["properties"])


def _model(section: str) -> type[BaseModel]:
    return aliases.section_models()[section] if section else Recipe


def _section_text(section: str) -> str:
    return " ".join((aliases.section_models()[section].__doc__ or "").split())


_TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))


def _type_text(schema: Mapping[str, Any]) -> str:
    """Return a JSON schema in words: 'integer ≥ 1 or null'."""
    if "anyOf" in schema:
        return " or ".join(_type_text(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(schema["enum"])
    if schema["type"] == "array":
        return f"list of {_type_text(schema['items'])}"
    if schema["type"] == "object":
        return "teachers by name"
    bounds = [f"{sign} {schema[name]:g}" for name, sign in _BOUNDS if name in schema]
    return " ".join([_TYPES[schema["type"]], ", ".join(bounds)]).strip()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


if __name__ == "__main__":
    print(recipe_reference(), end="")
