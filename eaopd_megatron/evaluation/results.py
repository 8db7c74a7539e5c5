"""What an evaluation found: figures of each benchmark, the grades behind them, and their JSON file."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eaopd_megatron.data.sources import Problem
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.estimators import FloatArray, IntArray, avg_at_k, majority, pass_at_k, pass_ks
from eaopd_megatron.utils.files import atomic_write


@dataclass(frozen=True)
class Grade:
    """The grade of one response.

    key: the answer that it gives, equal for equal answers; None if it gives none. error: the grader raised or ran out
    of time; such a response counts as wrong. lenient: right once notation is read leniently (always where `correct`).
    """

    correct: bool
    key: str | None
    error: bool = False
    lenient: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "lenient", self.lenient or self.correct)


Grader = Callable[[Problem, str], Grade]
"""(problem, response text) -> grade."""


@dataclass(frozen=True)
class ProblemResult:
    """One problem's samples, in the order in which they were drawn.

    correct[s]: sample s is right; lenient[s]: so, or right in another notation; keys[s]: what it answers (None:
    nothing); truncated[s]: it ran into the length limit; lengths[s]: its tokens; errors: samples (counted as wrong)
    whose grader threw or ran out of time.
    """

    id: str
    correct: tuple[bool, ...]
    lenient: tuple[bool, ...]
    keys: tuple[str | None, ...]
    truncated: tuple[bool, ...]
    lengths: tuple[int, ...]
    errors: int = 0

    @classmethod
    def from_grades(
        cls, id: str, grades: Sequence[Grade], truncated: Sequence[bool], lengths: Sequence[int]
    ) -> "ProblemResult":
        """A problem's grades, with truncated[s] and lengths[s] (tokens) for each."""
        return cls(
            id=id,
            correct=tuple(grade.correct for grade in grades),
            lenient=tuple(grade.lenient for grade in grades),
            keys=tuple(grade.key for grade in grades),
            truncated=tuple(bool(cut) for cut in truncated),
            lengths=tuple(int(length) for length in lengths),
            errors=sum(grade.error for grade in grades),
        )

    @property
    def distinct_correct(self) -> int:
        """Number of different right answers among the samples."""
        return len({key for key, correct in zip(self.keys, self.correct, strict=True) if correct})


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's figures over its problems: avg@K, pass@1, 2, 4 ... K, lenient_avg@K, majority@K, distinct_correct,
    truncated, length, grader_errors.

    All are means over problems except `grader_errors`, the number of samples. `truncated` is a share of samples (the
    others stopped by themselves), `length` their mean length in tokens; `lenient_*` counts other notations as right;
    `pass@k` is there for every k up to K, though `figures` lists powers of two.
    """

    name: str
    samples: int
    figures: dict[str, float]
    results: tuple[ProblemResult, ...] = field(repr=False)

    @property
    def problems(self) -> int:
        """Number of problems."""
        return len(self.results)

    def per_problem(self, figure: str) -> FloatArray:
        """A figure problem by problem [problems]; `figures[figure]` is its mean (its sum for `grader_errors`)."""
        name, _, k = figure.partition("@")
        if name == "pass":
            return pass_at_k(self.samples, self._counts([result.correct for result in self.results]), int(k))
        if name in ("avg", "lenient_avg"):
            right = [result.correct if name == "avg" else result.lenient for result in self.results]
            return avg_at_k(self._counts(right), self.samples)
        values: dict[str, Callable[[ProblemResult], float]] = {
            "majority": lambda result: majority(result.keys, result.correct),
            "distinct_correct": lambda result: result.distinct_correct,
            "truncated": lambda result: sum(result.truncated) / self.samples,
            "length": lambda result: sum(result.lengths) / self.samples,
            "grader_errors": lambda result: result.errors,
        }
        return np.array([values[name](result) for result in self.results], dtype=np.float64)

    @staticmethod
    def _counts(flags: Sequence[Sequence[bool]]) -> IntArray:
        return np.array([sum(one) for one in flags], dtype=np.int64)


def summarise(name: str, samples: int, results: Sequence[ProblemResult]) -> BenchmarkResult:
    """The figures of a benchmark from each problem's `samples` grades.

    UserError if there are no problems; ValueError if a problem has another number of samples.
    """
    if not results:
        raise UserError(f"benchmark {name} has no problems: check its file and evaluation.problems")
    for result in results:
        parts = (result.correct, result.lenient, result.keys, result.truncated, result.lengths)
        if any(len(part) != samples for part in parts):
            raise ValueError(f"problem {result.id} of {name} has {len(result.correct)} grades, not {samples}")
    names = [
        *(f"avg@{samples}", *(f"pass@{k}" for k in pass_ks(samples)), f"lenient_avg@{samples}", f"majority@{samples}"),
        *("distinct_correct", "truncated", "length"),
    ]
    benchmark = BenchmarkResult(name, samples, {}, tuple(results))
    figures = {figure: float(benchmark.per_problem(figure).mean()) for figure in names}
    figures["grader_errors"] = float(benchmark.per_problem("grader_errors").sum())
    return BenchmarkResult(name, samples, figures, tuple(results))


@dataclass(frozen=True)
class EvaluationResult:
    """All benchmarks after `iteration` iterations (0: before training)."""

    iteration: int
    benchmarks: dict[str, BenchmarkResult]

    def to_metrics(self) -> dict[str, float]:
        """{"evaluation/<benchmark>/<figure>": value} for the run's metrics."""
        return {
            f"evaluation/{name}/{figure}": value
            for name, benchmark in self.benchmarks.items()
            for figure, value in benchmark.figures.items()
        }

    def to_json(self) -> dict[str, Any]:
        """JSON values of it all, each sample's grade with them."""
        benchmarks = {
            name: {
                "samples": benchmark.samples,
                "problems": benchmark.problems,
                **benchmark.figures,
                "results": [asdict(result) for result in benchmark.results],
            }
            for name, benchmark in self.benchmarks.items()
        }
        return {"iteration": self.iteration, "benchmarks": benchmarks}

    def write(self, folder: Path) -> Path:
        """Writes folder/XXXXXX.json (the iteration), whole or not at all, and returns its path."""
        path = folder / result_file_name(self.iteration)
        atomic_write(path, json.dumps(self.to_json()) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "EvaluationResult":
        """Reads a file of `write`; the figures are computed again from the grades. UserError if it is damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            benchmarks = {
                name: summarise(name, entry["samples"], [_problem_from_json(row) for row in entry["results"]])
                for name, entry in content["benchmarks"].items()
            }
            return cls(int(content["iteration"]), benchmarks)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not an evaluation's file ({error}): remove it and evaluate again") from error


def read_evaluations(folder: Path) -> list[EvaluationResult]:
    """All evaluations of a run's evaluation folder by iteration; an absent folder has none. UserError as for `read`."""
    found = [EvaluationResult.read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda evaluation: evaluation.iteration)


def result_file_name(iteration: int) -> str:
    """Of the result of an iteration."""
    return f"{iteration:06d}.json"


def _problem_from_json(row: Mapping[str, Any]) -> ProblemResult:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return ProblemResult(**values)
