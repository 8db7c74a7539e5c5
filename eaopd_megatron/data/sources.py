"""Problems from a built-in task, a JSONL or Parquet file, or the Hugging Face hub, under this package's own names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eaopd_megatron.data import countdown
from eaopd_megatron.errors import RecipeError, UserError

Problem = dict[str, Any]
SOURCE_KINDS = "countdown, a .jsonl or .parquet file, or hub:owner/name[:config][@revision]"


@dataclass(frozen=True)
class FieldNames:
    """Under which names a source has what this package calls `problem`, `answer` and `id`."""

    problem: str = "problem"
    answer: str = "answer"
    id: str = "id"

    @classmethod
    def parse(cls, text: str) -> FieldNames:
        """`problem=question,answer=gold`. Raises UserError for another name than the three."""
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        given = {name.strip(): value.strip() for name, _, value in pairs}
        known = [field.name for field in fields(cls)]
        for name, value in given.items():
            if name not in known or not value:
                raise UserError(
                    f"--fields {text}: expected NAME=FIELD, separated by commas, with NAME of {', '.join(known)}"
                )
        return cls(**given)


def load_problems(source: str, split: str, names: FieldNames | None = None) -> list[Problem]:
    """The records of a source, each with `id` and, where it has them, `problem` and `answer` beside its own fields.

    source: `countdown` (split train or heldout), a .jsonl or .parquet file, or `hub:owner/name[:config][@revision]`,
    which `datasets` downloads once and caches.
    """
    if source == "countdown":
        return countdown.problems("train" if split == "train" else "heldout")
    if source.startswith("hub:"):
        rows = _load_hub(source, split)
    elif source.endswith(".jsonl"):
        rows = read_jsonl(Path(source))
    elif source.endswith(".parquet"):
        rows = _read_parquet(Path(source))
    else:
        raise RecipeError(f"data source {source!r}: expected {SOURCE_KINDS}")
    return [_rename_fields(row, number, names or FieldNames()) for number, row in enumerate(rows)]


def _rename_fields(row: Mapping[str, Any], number: int, names: FieldNames) -> Problem:
    there = {field.name: getattr(names, field.name) for field in fields(names)}
    named = {ours: row[theirs] for ours, theirs in there.items() if theirs in row}
    return {**row, "id": str(number), **named}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line. Raises UserError with the number of a broken line."""
    rows: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: no valid JSON ({error})") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}, line {number}: a JSON object was expected, not {type(row).__name__}")
                rows.append(row)
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return _require_rows(rows, path)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path}: no such data file") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: no valid Parquet ({str(error).splitlines()[0]})") from None
    return _require_rows(rows, path)


def _require_rows(rows: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    if not rows:
        raise UserError(f"{path}: the data file is empty")
    return list(rows)


def _load_hub(source: str, split: str) -> list[dict[str, Any]]:
    import datasets

    where, _, revision = source.removeprefix("hub:").partition("@")
    name, _, config = where.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, revision=revision or None)
        return [dict(row) for row in rows]
    except Exception as error:  # the library raises a different class for every cause
        raise UserError(
            f"data source {source}: {type(error).__name__}: {str(error).splitlines()[0]}; without a network, give a "
            ".jsonl or .parquet file instead"
        ) from None
