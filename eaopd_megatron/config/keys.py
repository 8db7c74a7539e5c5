"""The recipe's keys as dotted names, and the nearest right one to a wrong one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from pydantic import BaseModel

from eaopd_megatron.config.schema import Recipe, TeacherConfig
from eaopd_megatron.errors import RecipeError

LEAST_LIKENESS = 0.6
TEACHER_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""It is part of keys, of metrics' names and of files' names."""


@cache
def sections() -> dict[str, tuple[str, ...]]:
    """Each section's keys; the recipe's own top level stands under ''."""
    found: dict[str, tuple[str, ...]] = {"": tuple(Recipe.model_fields)}
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found[name] = tuple(kind.model_fields)
    return found


def defaults() -> dict[str, Any]:
    """The tree of all keys that have a default."""
    tree: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        if name not in sections():
            tree[name] = field.get_default()
        elif isinstance(kind := field.annotation, type) and issubclass(kind, BaseModel):
            tree[name] = {key: part.get_default() for key, part in kind.model_fields.items() if not part.is_required()}
    return tree


@cache
def settings() -> tuple[str, ...]:
    """Every key that holds a value, dotted: 'seed', 'run.folder', ..."""
    top = tuple(key for key in sections()[""] if key not in sections())
    return top + tuple(f"{section}.{key}" for section, keys in sections().items() if section for key in keys)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty mapping is a leaf, a list too."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def fault(tree: Mapping[Any, Any]) -> str | None:
    """What is wrong with the keys of an unchecked tree, in words; None: every key exists."""
    for name, value in tree.items():
        if name not in sections()[""]:
            return unknown(str(name))
        if name == "teachers":
            if not isinstance(value, Mapping):
                return f"'teachers' names teachers, each with keys of 'teacher'; it is no value such as {value!r}"
            for teacher in value:
                if not isinstance(teacher, str) or not TEACHER_NAME.fullmatch(teacher):
                    return f"a teacher is named {teacher!r}; a name has letters, digits, '-' and '_'"
            parts = {f"teachers.{teacher}": keys for teacher, keys in value.items()}
            kind = "teacher"
        elif name in sections():
            parts, kind = {name: value}, name
        else:
            continue
        for section, keys in parts.items():
            if not isinstance(keys, Mapping):
                return f"{section!r} is a section (keys: {', '.join(sections()[kind])}), not a value such as {keys!r}"
            for key in keys:
                if key not in sections()[kind]:
                    return unknown(f"{section}.{key}")
    return None


def unknown(key: str) -> str:
    """The message for a dotted key that does not exist, with the nearest one that does."""
    section, _, leaf = key.rpartition(".")
    kind = "teacher" if section.startswith("teachers.") else section  # whose keys each of several teachers has
    near = nearest(leaf, sections().get(kind, ()))
    hint = ".".join(filter(None, (section, near))) if near else _nearest_anywhere(leaf)
    if hint:
        return f"unknown key {key!r}; did you mean {hint!r}?"
    here = f"of {section!r}" if section and kind in sections() else "at the top"
    keys = sections().get(kind, sections()[""])
    return f"unknown key {key!r}; the keys {here} are {', '.join(keys)}"


def _nearest_anywhere(leaf: str) -> str | None:
    found = nearest(leaf, {name.rpartition(".")[2] for name in settings()})
    return next((name for name in settings() if name.rpartition(".")[2] == found), None)


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like the word, if any is like it enough; the first of equals in alphabetical order."""
    ranked = sorted((-_likeness(word, choice), choice) for choice in choices)
    return ranked[0][1] if ranked and -ranked[0][0] >= LEAST_LIKENESS else None


def _likeness(word: str, choice: str) -> float:
    """0 to 1. An abbreviation by initials ('learning_rate' and 'lr', 'tp' and 'tensor_parallel') counts as near."""
    word, choice = word.lower().replace("-", "_"), choice.lower()
    if word == choice:
        return 1.0
    if _initials(word) == choice or _initials(choice) == word:
        return 0.95
    return SequenceMatcher(None, word, choice).ratio()


def _initials(word: str) -> str:
    return "".join(part[:1] for part in word.split("_")) if "_" in word else ""


def teacher_key(name: str) -> str:
    """Return the recipe's section of a teacher, `teachers.NAME`, or `teacher` for the only one, whose name is ''."""
    return f"teachers.{name}" if name else "teacher"


def select_separate_teacher(recipe: Recipe, name: str) -> TeacherConfig:
    """Return the teacher of this name ('': the only one), which `eaopd teach` is to serve.

    Raises RecipeError if there is none of this name, or its placement is not separate.
    """
    teachers = recipe.named_teachers()
    known = ", ".join(teachers)
    if name not in teachers:
        if not name:
            raise RecipeError(f"the recipe has teachers {known}: name one with --teacher")
        remedy = f"it has {known}" if known else "leave --teacher out"
        raise RecipeError(f"the recipe has no teacher {name}; {remedy}")
    if (placement := teachers[name].placement) != "separate":
        key = teacher_key(name)
        raise RecipeError(f"{key}.placement is {placement}: eaopd teach serves a teacher with {key}.placement=separate")
    return teachers[name]
