"""A recipe from its YAML file, the files that it builds on, and overrides from the command line.

Merging: the files under `base:` first, in their order, then the file itself, then the overrides; sections are merged
key by key, lists are replaced. OmegaConf merges, and resolves `${section.key}`; pydantic checks the result. Whatever
is wrong becomes a `RecipeError` of one line that begins with the file, or the override, that says it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from eaopd_megatron.config import aliases
from eaopd_megatron.config.schema import Recipe
from eaopd_megatron.errors import RecipeError
from eaopd_megatron.utils.lifetime import LAUNCHER_PID_VARIABLE

MODEL_KEYS = ("student.model", "teacher.model")
"""Keys that may hold a folder."""
FILE_KEYS = ("data.source", "data.decontaminate", "evaluation.benchmarks")
"""Keys that may hold the name of a .jsonl or .parquet file."""


@dataclass(frozen=True)
class _Layer:
    """The keys of one file or one override before they are merged."""

    origin: str  # its name in messages
    tree: dict[str, Any]
    folder: Path | None  # where its relative paths are looked up first; None for an override


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
    recipe_path = Path(path)
    sources = [*_read_files(recipe_path, ()), *(_read_override(text) for text in overrides)]
    layers = [_checked(layer, report or _warn_on_stderr) for layer in sources]
    origins = {key: layer for layer in layers for key, _ in aliases.flatten_keys(layer.tree)}

    def origin(key: str) -> str:
        layer = origins.get(key) or origins.get(aliases.teacher_schema_key(key))
        return str(path) if layer is None else layer.origin

    merged = _merge(layers, str(path))
    for key, value in list(aliases.flatten_keys(merged)):
        if key in origins and (_names_model(key) or key in FILE_KEYS):
            *parents, leaf = key.split(".")
            folders = _folders(origins[key], recipe_path.parent)
            section = merged
            for parent in parents:
                section = section[parent]
            section[leaf] = (
                [_located(key, item, folders) for item in value]
                if isinstance(value, list)
                else _located(key, value, folders)
            )
    _complete_teachers(merged)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(_explain(error.errors(), origin)) from None
    _check_objective(recipe, origin)
    return recipe, {key: layer.origin for key, layer in origins.items()}


def _checked(layer: _Layer, report: Callable[[str], None]) -> _Layer:
    """Return the layer with current names, all of which exist. A section without a value counts as empty."""
    filled = {
        key: {} if value is None and key in aliases.section_keys() else value for key, value in layer.tree.items()
    }
    try:
        tree, renamed = aliases.rename_old_keys(filled)
    except ValueError as error:
        raise RecipeError(f"{layer.origin}: {error}") from None
    if message := aliases.key_error(tree):
        raise RecipeError(f"{layer.origin}: {message}")
    for line in aliases.renaming_warnings(renamed):
        report(f"{layer.origin}: {line}")
    return replace(layer, tree=tree)


@cache
def _warn_on_stderr(line: str) -> None:
    """Print a warning once: in the launcher, or in rank 0 if another launcher started the ranks."""
    if LAUNCHER_PID_VARIABLE not in os.environ and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"warning: {line}", file=sys.stderr, flush=True)


def _names_model(key: str) -> bool:
    return key in MODEL_KEYS or (key.startswith("teachers.") and key.endswith(".model"))


def _complete_teachers(merged: dict[str, Any]) -> None:
    """Each of several teachers has the keys of `teacher` that it does not say, which may leave its model to them."""
    if named := merged["teachers"]:
        common = merged["teacher"]
        merged["teachers"] = {name: {**common, **own} for name, own in named.items()}
        models = [own["model"] for own in named.values() if "model" in own]
        if models:
            common.setdefault("model", models[0])


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included, that `load_recipe` turns into an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(recipe.model_dump())))


def recipe_differences(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """(dotted key, value in `a`, value in `b`) of every setting that differs, in the recipe's order.

    None stands for the value of a key that only the other one has: a teacher's.
    """
    left, right = dict(aliases.flatten_keys(a.model_dump())), dict(aliases.flatten_keys(b.model_dump()))
    names = dict.fromkeys([*left, *right])
    return [(key, left.get(key), right.get(key)) for key in names if left.get(key) != right.get(key)]


def recipe_value(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key. Raises RecipeError where there is none."""
    values, key = dict(aliases.flatten_keys(recipe.model_dump())), aliases.current_key(key)
    if key not in values:
        _, _, name = key.rpartition(".")[0].partition("teachers.")
        if name and name not in recipe.teachers:
            known = ", ".join(recipe.teachers) or "a single one, `teacher`"
            raise RecipeError(f"the recipe has no teacher {name}; it has {known}")
        raise RecipeError(aliases.unknown_key_message(key))
    return values[key]


def _read_files(path: Path, below: tuple[Path, ...]) -> Iterator[_Layer]:
    """The layers of a file and of all that it builds on, lowest first; `below` are the files that lead to it."""
    if path.resolve() in (seen.resolve() for seen in below):
        chain = " -> ".join(str(seen) for seen in (*below, path))
        raise RecipeError(f"{below[0]}: the files under 'base' form a circle: {chain}")
    tree = _read(path, below[-1] if below else None)
    bases = tree.pop("base", None) or []
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"{path}: base is {bases!r}; it must be the name of a file or a list of names")
    for base in bases:
        yield from _read_files(path.parent / base, (*below, path))
    yield _Layer(str(path), tree, path.parent)


def _read(path: Path, named_by: Path | None) -> dict[Any, Any]:
    """The mapping in a YAML file, unresolved. `named_by`: the file whose `base` names it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = aliases.closest_match(path.stem, [found.stem for found in path.parent.glob("*.yaml")])
        hint = f"; did you mean '{path.parent / f'{near}.yaml'}'?" if near else ""
        where = f"{named_by}: the base file {str(path)!r}" if named_by else f"{path}: the recipe"
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
    """YAML as OmegaConf reads it (1e-4 is a number, a key may stand once), interpolations left as they are."""
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
    return _Layer(origin, tree, None)


def _merge(layers: Sequence[_Layer], origin: str) -> dict[str, Any]:
    """One tree of the defaults and all layers, with `${section.key}` replaced by the value of that key."""
    try:
        merged = OmegaConf.merge(aliases.default_values(), *(layer.tree for layer in layers))
        tree: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError) as error:
        named = getattr(error, "full_key", None)
        sources = (layer.origin for layer in reversed(layers) if named in dict(aliases.flatten_keys(layer.tree)))
        source = next(sources, origin)
        raise RecipeError(f"{source}: {f'{named}: ' if named else ''}{_one_line(error)}") from None
    return dict(tree)


def _folders(layer: _Layer, recipe_folder: Path) -> list[Path]:
    """Where a relative path may be, best first."""
    return [Path.cwd()] if layer.folder is None else [layer.folder, recipe_folder, Path.cwd()]


def _located(key: str, value: Any, folders: Sequence[Path]) -> Any:
    """The absolute path of what the value names, or the value itself where it names no folder or file."""
    if not isinstance(value, str) or not value or (key in FILE_KEYS and not value.endswith((".jsonl", ".parquet"))):
        return value
    for folder in folders:
        found = folder / Path(value).expanduser()
        if found.is_dir() if _names_model(key) else found.is_file():
            return str(found.resolve())
    return value


def _check_objective(recipe: Recipe, origin: Callable[[str], str]) -> None:
    try:
        objective = recipe.objective.build_objective()
    except ValueError as error:
        named = next(
            (key for key in type(recipe.objective).model_fields if re.search(rf"\b{key}\b", str(error))), "preset"
        )
        raise RecipeError(f"{origin(f'objective.{named}')}: objective: {_one_line(error)}") from None
    for name, teacher in recipe.named_teachers().items():
        if refusal := objective.refusal(recipe.resolve_signal(teacher)):
            key = f"teachers.{name}" if name else "teacher"
            where = origin(f"{key}.signal")
            raise RecipeError(f"{where}: objective and {key}.signal do not fit: {_one_line(refusal)}")


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
    """The first fault in one line: where it was said, the key, the value, and what is allowed."""
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
    """A missing section's first required key: 'student' -> 'student.model'."""
    field = Recipe.model_fields.get(key)
    inner = getattr(field.annotation, "model_fields", {}) if field else {}
    return next((f"{key}.{name}" for name, part in inner.items() if part.is_required()), key)


def _shown(value: Any) -> str:
    """A value as YAML spells it."""
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))


def _escaped(value: Any) -> Any:
    """The same value with every text written so that OmegaConf reads it literally."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _one_line(error: object) -> str:
    return " ".join(str(error).splitlines()[:1]).strip() or type(error).__name__
