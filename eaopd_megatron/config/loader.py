"""Load a recipe from its YAML file, the files it builds on, and overrides from the command line.

The files under `base:` come first, in their order, then the file itself, then the overrides; sections are merged key
by key, lists are replaced. OmegaConf merges and resolves `${section.key}`, pydantic checks the result. Every error
becomes a `RecipeError` of one line that begins with the file or the override that causes it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from eaopd_megatron.config import aliases
from eaopd_megatron.config.schema import Recipe, teacher_key
from eaopd_megatron.errors import RecipeError
from eaopd_megatron.utils.lifetime import LAUNCHER_PID_VARIABLE

_MODEL_KEYS = ("student.model", "teacher.model")  # may hold a folder
_FILE_KEYS = ("data.source", "data.decontaminate", "evaluation.benchmarks")  # may hold a .jsonl or .parquet file


@dataclass(frozen=True)
class _Layer:
    """The keys of one file or one override before they are merged."""

    origin: str  # its name in messages
    tree: dict[str, Any]
    folders: tuple[Path, ...] = ()  # where its relative paths are looked up before the working directory


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, report: Callable[[str], None] | None = None
) -> Recipe:
    """Return the checked recipe in the file `path` with `a.b.c=value` overrides.

    Relative paths of models and data are looked up in the folder of the file that gives them, then in the recipe's,
    then in the working directory, and made absolute if something exists there; any other value (a hub id) is left
    alone. A key that was renamed is reported in one line (by default on stderr, once per run). Raises RecipeError for
    an error in a file, a key, a value, or an objective that the teacher's signal cannot serve.
    """
    return load_with_origins(path, overrides, report=report)[0]


def load_with_origins(
    path: str | Path, overrides: Sequence[str] = (), *, report: Callable[[str], None] | None = None
) -> tuple[Recipe, dict[str, str]]:
    """Return what `load_recipe` returns, and the file or override that gives each key (no entry: the default)."""
    sources = [*_read_files(Path(path), ()), *(_read_override(text) for text in overrides)]
    layers = [_checked(layer, report or _warn_on_stderr) for layer in sources]
    origins = {key: layer for layer in layers for key, _ in aliases.flatten_keys(layer.tree)}

    def origin(key: str) -> str:
        layer = origins.get(key) or origins.get(aliases.teacher_schema_key(key))
        return str(path) if layer is None else layer.origin

    merged = _merge(layers, str(path))
    for key, value in list(aliases.flatten_keys(merged)):
        if key in origins and (_names_model(key) or key in _FILE_KEYS):
            *parents, leaf = key.split(".")
            located = partial(_located, key, folders=[*origins[key].folders, Path.cwd()])
            section = reduce(getitem, parents, merged)
            section[leaf] = [located(item) for item in value] if isinstance(value, list) else located(value)
    _complete_teachers(merged)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(_explain(error.errors(), origin)) from None
    _check_objective(recipe, origin)
    return recipe, {key: layer.origin for key, layer in origins.items()}


def _checked(layer: _Layer, report: Callable[[str], None]) -> _Layer:
    """Return the layer with current names, all of which exist. A section without a value counts as empty."""
    empty: dict[str, Any] = {
        key: {} for key, value in layer.tree.items() if value is None and key in aliases.section_keys()
    }
    try:
        tree, renamed = aliases.rename_old_keys(layer.tree | empty)
    except ValueError as error:
        raise RecipeError(f"{layer.origin}: {error}") from None
    if message := aliases.key_error(tree):
        raise RecipeError(f"{layer.origin}: {message}")
    for old, new in renamed.items():
        report(f"{layer.origin}: {old} is now {new}; the old name works until {aliases.RENAMED_UNTIL}")
    return replace(layer, tree=tree)


@cache
def _warn_on_stderr(line: str) -> None:
    """Print a warning once: in the launcher, or in rank 0 if another launcher started the ranks."""
    if LAUNCHER_PID_VARIABLE not in os.environ and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"warning: {line}", file=sys.stderr, flush=True)


def _names_model(key: str) -> bool:
    return aliases.teacher_schema_key(key) in _MODEL_KEYS


def _complete_teachers(merged: dict[str, Any]) -> None:
    """Let each named teacher inherit the keys of `teacher`; `teacher.model` may be missing if they have models."""
    if named := merged["teachers"]:
        common = merged["teacher"]
        merged["teachers"] = {name: {**common, **own} for name, own in named.items()}
        models = [own["model"] for own in named.values() if "model" in own]
        if models:
            common.setdefault("model", models[0])


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML with all defaults; `load_recipe` turns it into an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(recipe.model_dump())))


def recipe_differences(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """Return (dotted key, value in `a`, value in `b`) for every value that differs, in the recipe's order.

    A key that only the other recipe has (of a named teacher) counts as None.
    """
    left, right = dict(aliases.flatten_keys(a.model_dump())), dict(aliases.flatten_keys(b.model_dump()))
    names = dict.fromkeys([*left, *right])
    return [(key, left.get(key), right.get(key)) for key in names if left.get(key) != right.get(key)]


def recipe_value(recipe: Recipe, key: str) -> Any:
    """Return the value of a dotted key. Raises RecipeError if it does not exist."""
    values, key = dict(aliases.flatten_keys(recipe.model_dump())), aliases.current_key(key)
    if key not in values:
        _, _, name = key.rpartition(".")[0].partition("teachers.")
        if name and name not in recipe.teachers:
            known = ", ".join(recipe.teachers) or "a single one, `teacher`"
            raise RecipeError(f"the recipe has no teacher {name}; it has {known}")
        raise RecipeError(aliases.unknown_key_message(key))
    return values[key]


def _read_files(path: Path, parents: tuple[Path, ...]) -> Iterator[_Layer]:
    """Yield the layers of a file and of its bases, lowest first. parents: the files whose `base` led to it."""
    if path.resolve() in (parent.resolve() for parent in parents):
        chain = " -> ".join(str(parent) for parent in (*parents, path))
        raise RecipeError(f"{parents[0]}: the files under 'base' form a circle: {chain}")
    tree = _read(path, parents[-1] if parents else None)
    bases = tree.pop("base", None) or []
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"{path}: base is {bases!r}; it must be the name of a file or a list of names")
    for base in bases:
        yield from _read_files(path.parent / base, (*parents, path))
    yield _Layer(str(path), tree, (path.parent, (*parents, path)[0].parent))


def _read(path: Path, parent: Path | None) -> dict[Any, Any]:
    """Return the mapping in a YAML file, unresolved. parent: the file whose `base` names it."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = aliases.closest_match(path.stem, [file.stem for file in path.parent.glob("*.yaml")])
        hint = f"; did you mean '{path.parent / f'{near}.yaml'}'?" if near else ""
        where = f"{parent}: the base file {str(path)!r}" if parent else f"{path}: the recipe"
        raise RecipeError(f"{where} does not exist{hint}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: no YAML: it is not UTF-8 text") from None
    config = _parse(text, str(path), lines=True)
    if not isinstance(config, dict):
        kind = {"NoneType": "empty", "list": "a list"}.get(type(config).__name__, "a lone value")
        raise RecipeError(f"{path}: it must be a mapping of sections (run:, student:, ...), but it is {kind}")
    return config


def _parse(text: str, origin: str, lines: bool) -> Any:
    """Parse YAML as OmegaConf does (1e-4 is a number, duplicate keys are errors), interpolations unresolved."""
    try:
        # OmegaConf reads a lone word as a key without a value, and nothing as an empty mapping.
        if not isinstance(node := yaml.compose(text, Loader=yaml.SafeLoader), yaml.MappingNode):
            return None if node is None else node.value
        return OmegaConf.to_container(OmegaConf.create(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and lines else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{origin}{line}: no valid YAML: {_one_line(problem)}") from None
    except (OmegaConfBaseException, ValueError) as error:
        raise RecipeError(f"{origin}: {_one_line(error)}") from None


def _read_override(text: str) -> _Layer:
    origin = f"override {text!r}"
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{origin}: it must have the form section.key=value")
    parts = key.strip().split(".")
    if parts == ["base"]:
        raise RecipeError(f"{origin}: 'base' may stand in a file only")
    tree = _parse(f"value: {value}", origin, lines=False)
    if not isinstance(tree, dict) or set(tree) != {"value"}:
        raise RecipeError(f"{origin}: the value is no valid YAML; put it in quotes")
    tree = tree["value"]
    for part in reversed(parts):
        tree = {part: tree}
    return _Layer(origin, tree)


def _merge(layers: Sequence[_Layer], origin: str) -> dict[str, Any]:
    """Merge the defaults and all layers into one tree, and replace `${section.key}` by the value of that key."""
    try:
        merged = OmegaConf.merge(aliases.default_values(), *(layer.tree for layer in layers))
        tree: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        sources = (layer.origin for layer in reversed(layers) if key in dict(aliases.flatten_keys(layer.tree)))
        source = next(sources, origin)
        raise RecipeError(f"{source}: {f'{key}: ' if key else ''}{_one_line(error)}") from None
    return dict(tree)


def _located(key: str, value: Any, folders: Sequence[Path]) -> Any:
    """Return the absolute path of the folder or file that the value names, or the value if there is none."""
    if not isinstance(value, str) or not value or (key in _FILE_KEYS and not value.endswith((".jsonl", ".parquet"))):
        return value
    for folder in folders:
        path = folder / Path(value).expanduser()
        if path.is_dir() if _names_model(key) else path.is_file():
            return str(path.resolve())
    return value


def _check_objective(recipe: Recipe, origin: Callable[[str], str]) -> None:
    try:
        objective = recipe.objective.build_objective()
    except ValueError as error:
        fields = type(recipe.objective).model_fields
        field = next((name for name in fields if re.search(rf"\b{name}\b", str(error))), "preset")
        raise RecipeError(f"{origin(f'objective.{field}')}: objective: {_one_line(error)}") from None
    for name, teacher in recipe.named_teachers().items():
        if refusal := objective.refusal(recipe.resolve_signal(teacher)):
            key = teacher_key(name)
            raise RecipeError(f"{origin(f'{key}.signal')}: objective and {key}.signal do not fit: {_one_line(refusal)}")


_ALLOWED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text (in quotes where it looks like a number)",
    "string_too_short": "a text of at least one character",
    "list_type": "a list such as [a, b]",
}
_BOUNDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


def _explain(errors: Sequence[ErrorDetails], origin: Callable[[str], str]) -> str:
    """Return the first error in one line: its file or override, the key, the value, and what is allowed."""
    error = errors[0]
    key = ".".join(str(part) for part in error["loc"] if isinstance(part, str))
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if error["type"] == "missing":
        return f"{origin(key)}: missing key {_first_required(key)!r}{more}"
    context, value = error.get("ctx", {}), error["input"]
    if error["type"] == "value_error":
        message = str(context["error"])
        if key.startswith("teachers."):
            message = message.replace("teacher.", f"{'.'.join(key.split('.')[:2])}.")
        text = message if isinstance(value, (Mapping, Recipe)) else f"{key} is {_shown(value)}; {message}"
    elif error["type"] == "literal_error":
        text = f"{key} is {_shown(value)}; allowed: {context['expected']}"
    elif bounds := [f"{words} {context[name]:g}" for name, words in _BOUNDS.items() if name in context]:
        text = f"{key} is {_shown(value)}; it must be {' and '.join(bounds)}"
    else:
        text = f"{key} is {_shown(value)}; it must be {_ALLOWED.get(error['type'], error['msg'])}"
    return f"{origin(key)}: {text}{more}"


def _first_required(key: str) -> str:
    """Return a missing section's first required key: 'student' -> 'student.model'."""
    field = Recipe.model_fields.get(key)
    inner = getattr(field.annotation, "model_fields", {}) if field else {}
    return next((f"{key}.{name}" for name, part in inner.items() if part.is_required()), key)


def _shown(value: Any) -> str:
    """Return a value as YAML spells it."""
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))


def _escaped(value: Any) -> Any:
    """Escape every text so that OmegaConf reads it literally."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _one_line(error: object) -> str:
    return " ".join(str(error).splitlines()[:1]).strip() or type(error).__name__
