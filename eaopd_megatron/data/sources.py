"""Problems from a built-in task, a JSONL or Parquet file or the Hugging Face hub, without those of benchmarks."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from eaopd_megatron.data import countdown
from eaopd_megatron.errors import RecipeError, UserError
from eaopd_megatron.utils.files import atomic_write

Problem = dict[str, Any]
Words = tuple[str, ...]
SOURCE_KINDS = "countdown, a .jsonl or .parquet file, or hub:owner/name[:config][@revision]"
MAX_TEXTS_PER_PASSAGE = 10
"""A passage that occurs in more training problems is a common phrase: `relatively prime positive integers. Find m + n`.
"""
MIN_PASSAGE_WORDS = 8
"""Words of the shortest benchmark problem that is searched for inside longer problems."""
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class FieldNames:
    """Names of a source's fields that hold what this package calls `problem`, `answer` and `id`."""

    problem: str = "problem"
    answer: str = "answer"
    id: str = "id"

    @classmethod
    def parse(cls, text: str) -> FieldNames:
        """Parse `problem=question,answer=gold`. Raises UserError for any other name."""
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        values = {name.strip(): value.strip() for name, _, value in pairs}
        known = [field.name for field in fields(cls)]
        if any(name not in known or not value for name, value in values.items()):
            raise UserError(
                f"--fields {text}: expected NAME=FIELD, separated by commas, with NAME of {', '.join(known)}"
            )
        return cls(**values)


def load_problems(
    source: str, split: str, names: FieldNames | None = None, *, text_field: str | None = None
) -> list[Problem]:
    """Return the records of a source with their own fields and `id`, `problem` and `answer`.

    source: `countdown` (split train or heldout), a .jsonl or .parquet file, or `hub:owner/name[:config][@revision]`,
    which `datasets` downloads and caches. text_field: the field that each record must have a text under. Raises
    UserError.
    """
    rows: list[Problem]
    if source == "countdown":
        rows = countdown.problems("train" if split == "train" else "heldout")
    elif source.startswith("hub:"):
        rows = _load_hub(source, split)
    elif source.endswith(".jsonl"):
        rows = read_jsonl(Path(source))
    elif source.endswith(".parquet"):
        rows = _read_parquet(Path(source))
    else:
        raise RecipeError(f"data source {source!r}: expected {SOURCE_KINDS}")
    if text_field is not None:
        for number, row in enumerate(rows, 1):
            prompt_text(row, text_field, f"{source}, record {number}")
    if source == "countdown":
        return rows
    ours = {field.name: getattr(names or FieldNames(), field.name) for field in fields(FieldNames)}
    return [
        {**row, "id": str(number), **{name: row[theirs] for name, theirs in ours.items() if theirs in row}}
        for number, row in enumerate(rows)
    ]


def prompt_text(record: Problem, field: str, where: str) -> str:
    """Return the text of a record's field. Raises UserError, starting with `where`, that names the record's keys."""
    text = record.get(field)
    if not isinstance(text, str) or not text:
        lists = [name for name, value in record.items() if isinstance(value, list) and value and value[0] is not None]
        messages = next((name for name in lists if isinstance(record[name][0], dict) and "role" in record[name][0]), "")
        hint = f" ({messages!r} is a list of messages, which is not read: a prompt is one text)" if messages else ""
        raise UserError(f"{where}: no text under {field!r}{hint}; its keys are {', '.join(record) or 'none'}")
    if half := lone_surrogate(text):
        raise UserError(f"{where}: {field!r} holds the lone surrogate {half}, which is no character: correct it")
    return text


def lone_surrogate(text: str) -> str | None:
    r"""Return the first half of a surrogate pair in a text, which UTF-8 has not, as an escape; None if it has none."""
    match = re.search("[\ud800-\udfff]", text)
    return None if match is None else f"\\u{ord(match[0]):04x}"


def check_batch(count: int, batch: int, last_batch: str) -> None:
    """Raise RecipeError if `count` prompts do not fill one iteration of `batch`."""
    if count < 1 or (last_batch == "drop" and count < batch):
        raise RecipeError(
            f"train.prompts_per_iteration={batch} is more than the {count} prompts of data.source; "
            "lower it or set data.last_batch=keep"
        )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return one JSON object per line. Raises UserError with the number of an invalid line."""
    rows: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8-sig") as lines:
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


def _require_rows(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    if not rows:
        raise UserError(f"{path}: the data file is empty")
    return rows


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


# Decontamination


@dataclass(frozen=True)
class ContaminatedProblem:
    """A training problem and the benchmark problem that it repeats entirely ("exact") or in a passage ("n-gram")."""

    id: str
    benchmark: str
    benchmark_id: str
    kind: str
    passage: str


class Decontamination:
    """Finds problems that are benchmark problems too, or share a long passage with one.

    Texts are compared as words: letters and digits, without case and punctuation. `ngram` consecutive shared words are
    a match, unless more than MAX_TEXTS_PER_PASSAGE different problems have them. A benchmark problem of
    MIN_PASSAGE_WORDS to `ngram` words is such a passage as a whole; a shorter one matches only the same problem.
    """

    def __init__(self, benchmarks: Mapping[str, Sequence[Problem]], ngram: int = 13) -> None:
        self._exact: dict[Words, tuple[str, str]] = {}
        self._passages: dict[Words, tuple[str, str]] = {}
        lengths = {ngram}
        for name, problems in benchmarks.items():
            for problem in problems:
                text, where = split_words(str(problem["problem"])), (name, str(problem["id"]))
                self._exact.setdefault(text, where)
                length = min(ngram, len(text)) if len(text) >= MIN_PASSAGE_WORDS else ngram
                lengths.add(length)
                for passage in _passages(text, length):
                    self._passages.setdefault(passage, where)
        self._lengths = sorted(lengths, reverse=True)

    def clean(self, problems: Sequence[Problem]) -> tuple[list[Problem], list[ContaminatedProblem]]:
        """Return the problems without a match, in their order, and the first match of each of the others."""
        texts = [split_words(str(problem["problem"])) for problem in problems]
        shared = {
            text: [p for length in self._lengths for p in _passages(text, length) if p in self._passages]
            for text in set(texts)
        }
        counts = Counter(chain.from_iterable(map(set, shared.values())))
        clean: list[Problem] = []
        matches: list[ContaminatedProblem] = []
        for problem, text in zip(problems, texts, strict=True):
            name = str(problem["id"])
            passage = next((p for p in shared[text] if counts[p] <= MAX_TEXTS_PER_PASSAGE), None)
            if text in self._exact:
                matches.append(ContaminatedProblem(name, *self._exact[text], "exact", " ".join(text)))
            elif passage is not None:
                matches.append(ContaminatedProblem(name, *self._passages[passage], "n-gram", " ".join(passage)))
            else:
                clean.append(problem)
        return clean, matches


def split_words(text: str) -> Words:
    """Return a text's words in lower case. LaTeX commands are words; their backslashes and braces are not."""
    return tuple(_WORD.findall(text.lower()))


def summarise_matches(matches: Sequence[ContaminatedProblem]) -> str:
    """Return one line: the number of matches per benchmark and kind."""
    counts = Counter((match.benchmark, match.kind) for match in matches)
    return ", ".join(f"{count} {name} ({kind})" for (name, kind), count in sorted(counts.items())) or "none"


def write_decontamination_report(
    path: Path, matches: Sequence[ContaminatedProblem], *, problems: int, ngram: int
) -> None:
    """Write all matches as JSON: {"problems", "left_out", "ngram", "matches": [{"id", "benchmark", ...}]}."""
    report: dict[str, Any] = {"problems": problems, "left_out": len(matches), "ngram": ngram}
    report["matches"] = [vars(match) for match in matches]
    atomic_write(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def _passages(text: Words, length: int) -> Iterator[Words]:
    return (text[start : start + length] for start in range(len(text) - length + 1))
