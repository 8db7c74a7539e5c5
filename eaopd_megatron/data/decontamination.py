"""Training problems that are evaluation problems too, or share a long passage with one, are left out and reported."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from eaopd_megatron.data.sources import Problem

Words = tuple[str, ...]
MAX_TEXTS_PER_PASSAGE = 10
"""A passage that more different training problems have is a turn of phrase: `relatively prime positive integers. Find
m + n`."""

MIN_PASSAGE_WORDS = 8
"""Words of a benchmark problem that is looked for inside of longer problems; a shorter one may be a part of many."""

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class ContaminatedProblem:
    """A training problem and the evaluation problem that it repeats: wholly ("exact") or in a passage ("n-gram")."""

    id: str
    benchmark: str
    benchmark_id: str
    kind: str
    passage: str


class Decontamination:
    """Compares problems with those of benchmarks, as sequences of words: letters and digits, without case and signs.

    ngram: so many words in a row that both have are a match, unless more than `COMMON` different ones of the compared
    problems have them. A benchmark problem of fewer words, but of `SHORTEST`, is such a passage as a whole; a still
    shorter one matches no more than the same problem.
    """

    def __init__(self, benchmarks: Mapping[str, Sequence[Problem]], ngram: int = 13) -> None:
        self.ngram = ngram
        self._exact: dict[Words, tuple[str, str]] = {}
        self._passages: dict[Words, tuple[str, str]] = {}
        lengths = {ngram}
        for name, problems in benchmarks.items():
            for problem in problems:
                found, where = split_words(str(problem["problem"])), (name, str(problem["id"]))
                self._exact.setdefault(found, where)
                length = min(ngram, len(found)) if len(found) >= MIN_PASSAGE_WORDS else ngram
                lengths.add(length)
                for passage in _passages(found, length):
                    self._passages.setdefault(passage, where)
        self._lengths = sorted(lengths, reverse=True)

    def clean(self, problems: Sequence[Problem]) -> tuple[list[Problem], list[ContaminatedProblem]]:
        """The problems without a match, in their order, and the first match of each of the others."""
        texts = [split_words(str(problem["problem"])) for problem in problems]
        shared = {text: [p for p in self._passages_of(text) if p in self._passages] for text in set(texts)}
        counts = Counter(chain.from_iterable(map(set, shared.values())))
        kept: list[Problem] = []
        matches: list[ContaminatedProblem] = []
        for problem, text in zip(problems, texts, strict=True):
            named = str(problem["id"])
            passage = next((p for p in shared[text] if counts[p] <= MAX_TEXTS_PER_PASSAGE), None)
            if text in self._exact:
                matches.append(ContaminatedProblem(named, *self._exact[text], "exact", " ".join(text)))
            elif passage is not None:
                matches.append(ContaminatedProblem(named, *self._passages[passage], "n-gram", " ".join(passage)))
            else:
                kept.append(problem)
        return kept, matches

    def _passages_of(self, text: Words) -> Iterator[Words]:
        return chain.from_iterable(_passages(text, length) for length in self._lengths)


def split_words(text: str) -> Words:
    """A text's words in lower case; LaTeX commands are words, their backslashes and braces are not."""
    return tuple(_WORD.findall(text.lower()))


def summarise_matches(matches: Sequence[ContaminatedProblem]) -> str:
    """One line: how many problems match which benchmark, exactly and in a passage."""
    counts = Counter((match.benchmark, match.kind) for match in matches)
    return ", ".join(f"{count} {name} ({kind})" for (name, kind), count in sorted(counts.items())) or "none"


def write_decontamination_report(
    path: Path, matches: Sequence[ContaminatedProblem], *, problems: int, ngram: int
) -> None:
    """All matches as JSON: {"problems", "left_out", "ngram", "matches": [{"id", "benchmark", ...}]}."""
    from eaopd_megatron.utils.files import atomic_write

    report: dict[str, Any] = {"problems": problems, "left_out": len(matches), "ngram": ngram}
    report["matches"] = [vars(match) for match in matches]
    atomic_write(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def _passages(found: Words, length: int) -> Iterator[Words]:
    return (found[start : start + length] for start in range(len(found) - length + 1))
