"""Grades, the figures of each benchmark computed from them, their JSON file and their Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eaopd_megatron.data.sources import Problem
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation import estimators
from eaopd_megatron.evaluation.estimators import Estimate, FloatArray, IntArray
from eaopd_megatron.utils.files import atomic_write, read_json

_MEAN = "mean"
"""Row of the mean over benchmarks; each benchmark has the same weight."""
_NOTE = (
    "In brackets: 95 % bootstrap intervals over problems; they do not cover the spread between training runs. lenient: "
    "answers in notations that the strict comparison does not read count as right, too. errors: answers whose "
    "comparison raised or ran out of time; they count as wrong."
)


@dataclass(frozen=True)
class Grade:
    """The grade of one response.

    key: the answer that it gives, equal for equal answers; None if it gives none. error: the grader raised or ran out
    of time; the response counts as wrong. lenient: right once notation is read leniently (implied by `correct`).
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
    """One problem's samples, in sampling order.

    For sample s: correct[s], lenient[s] (right, possibly in another notation), keys[s] (its answer, None without one),
    truncated[s] (cut off at the length limit) and lengths[s] (tokens). errors: number of samples whose grader raised or
    ran out of time. digest: of the problem's text, by which evaluations are compared.
    """

    id: str
    correct: tuple[bool, ...]
    lenient: tuple[bool, ...]
    keys: tuple[str | None, ...]
    truncated: tuple[bool, ...]
    lengths: tuple[int, ...]
    errors: int = 0
    digest: str = ""

    @classmethod
    def from_grades(
        cls, id: str, grades: Sequence[Grade], truncated: Sequence[bool], lengths: Sequence[int], digest: str = ""
    ) -> ProblemResult:
        """Collect a problem's grades with truncated[s] and lengths[s] (tokens) of each sample."""
        correct, lenient = tuple(one.correct for one in grades), tuple(one.lenient for one in grades)
        keys, errors = tuple(one.key for one in grades), sum(one.error for one in grades)
        return cls(id, correct, lenient, keys, tuple(truncated), tuple(lengths), errors, digest)

    @property
    def distinct_correct(self) -> int:
        """Number of different right answers among the samples."""
        return len({key for key, correct in zip(self.keys, self.correct, strict=True) if correct})


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's figures: means over its problems (`grader_errors`: a number of samples).

    avg@K, pass@k for 1, 2, 4 ... K, lenient_avg@K (right in any notation), majority@K, distinct_correct (different
    right answers per problem), truncated (share of samples cut off at the limit; the others ended by themselves),
    length (tokens of a sample) and grader_errors.
    """

    name: str
    samples: int
    figures: dict[str, float]
    results: tuple[ProblemResult, ...] = field(repr=False)

    @property
    def problems(self) -> int:
        return len(self.results)

    def per_problem(self, figure: str) -> FloatArray:
        """Return a figure per problem [problems]; any k from 1 to `samples` is valid in "pass@k"."""
        name, _, k = figure.partition("@")
        if name == "pass":
            return estimators.pass_at_k(self.samples, self._counts([result.correct for result in self.results]), int(k))
        if name in ("avg", "lenient_avg"):
            right = [result.correct if name == "avg" else result.lenient for result in self.results]
            return estimators.avg_at_k(self._counts(right), self.samples)
        values: dict[str, Callable[[ProblemResult], float]] = {
            "majority": lambda result: estimators.majority(result.keys, result.correct),
            "distinct_correct": lambda result: result.distinct_correct,
            "truncated": lambda result: sum(result.truncated) / self.samples,
            "length": lambda result: sum(result.lengths) / self.samples,
            "grader_errors": lambda result: result.errors,
        }
        return np.array([values[name](result) for result in self.results], dtype=np.float64)

    def pass_curve(self) -> list[Estimate]:
        """Return pass@k with its interval for k = 1 ... `samples`."""
        return [estimators.estimate_mean(self.per_problem(f"pass@{k}")) for k in range(1, self.samples + 1)]

    @staticmethod
    def _counts(flags: Sequence[Sequence[bool]]) -> IntArray:
        return np.array([sum(one) for one in flags], dtype=np.int64)


def summarise(name: str, samples: int, results: Sequence[ProblemResult]) -> BenchmarkResult:
    """Compute a benchmark's figures from each problem's `samples` grades.

    Raise UserError without problems, ValueError if a problem has another number of samples.
    """
    if not results:
        raise UserError(f"benchmark {name} has no problems: check its file and evaluation.problems")
    for result in results:
        parts = (result.correct, result.lenient, result.keys, result.truncated, result.lengths)
        if any(len(part) != samples for part in parts):
            raise ValueError(f"problem {result.id} of {name} has {len(result.correct)} grades, not {samples}")
    passes = [f"pass@{k}" for k in estimators.pass_ks(samples)]
    names = [f"avg@{samples}", *passes, f"lenient_avg@{samples}", f"majority@{samples}"]
    names += ["distinct_correct", "truncated", "length"]
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
        """Return {"evaluation/<benchmark>/<figure>": value} for the run's metrics."""
        pairs = self.benchmarks.items()
        return {f"evaluation/{name}/{figure}": value for name, one in pairs for figure, value in one.figures.items()}

    def to_json(self) -> dict[str, Any]:
        """Return JSON values of the figures and of every sample's grade."""
        benchmarks = {
            name: {
                "samples": one.samples,
                "problems": one.problems,
                **one.figures,
                "results": list(map(asdict, one.results)),
            }
            for name, one in self.benchmarks.items()
        }
        return {"iteration": self.iteration, "benchmarks": benchmarks}

    def write(self, folder: Path) -> Path:
        """Write folder/XXXXXX.json (the iteration) atomically and return its path."""
        path = folder / result_file_name(self.iteration)
        atomic_write(path, json.dumps(self.to_json()) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> EvaluationResult:
        """Read a file of `write` and recompute the figures from the grades. Raise UserError if it is damaged."""
        try:
            content = read_json(path, str(path.parent))
            benchmarks = {
                name: summarise(name, entry["samples"], [_problem_from_json(row) for row in entry["results"]])
                for name, entry in content["benchmarks"].items()
            }
            return cls(int(content["iteration"]), benchmarks)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not an evaluation's file ({error}): remove it and evaluate again") from error


def result_file_name(iteration: int) -> str:
    """Return the name of the file that holds an iteration's evaluation."""
    return f"{iteration:06d}.json"


def _problem_from_json(row: Mapping[str, Any]) -> ProblemResult:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return ProblemResult(**values)


def figures_json(result: EvaluationResult) -> dict[str, dict[str, Any]]:
    """Return the figures with their intervals as JSON values.

    {benchmark, or "mean": {figure: {"value", "low", "high"}, "pass_at_k": {k: likewise}, "problems", "samples",
    "grader_errors"}}. `stopped` is the share of samples that ended by themselves, 1 - `truncated`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, benchmarks in rows_with_mean({name: [one] for name, one in result.benchmarks.items()}).items():
        samples = min(benchmark.samples for benchmark in benchmarks)
        figures = ["avg", f"pass@{samples}", "majority", "lenient_avg", "truncated", "stopped", "length"]
        rows[name] = {
            **{figure: _mean(benchmarks, figure)._asdict() for figure in figures},
            "pass_at_k": {k: _mean(benchmarks, f"pass@{k}")._asdict() for k in range(1, samples + 1)},
            "grader_errors": int(sum(benchmark.figures["grader_errors"] for benchmark in benchmarks)),
            "problems": sum(benchmark.problems for benchmark in benchmarks),
            "samples": samples,
        }
    return rows


def results_markdown(result: EvaluationResult) -> str:
    """Return a table with a row per benchmark and one for their mean."""
    heads = [
        "benchmark",
        "problems × k",
        "avg@k",
        "pass@k",
        "majority@k",
        "lenient avg@k",
        "stopped",
        "tokens",
        "errors",
    ]
    rows = []
    for name, row in figures_json(result).items():
        samples = row["samples"]
        shares = [format_percent(Estimate(**row[key])) for key in ("avg", f"pass@{samples}", "majority", "lenient_avg")]
        rows.append([name, f"{row['problems']} × {samples}", *shares, f"{row['stopped']['value']:.1%}",
                     f"{row['length']['value']:.0f}", str(row["grader_errors"])])  # fmt: skip
    return f"{markdown_table(heads, rows)}\n{_NOTE}\n"


def rows_with_mean(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the rows of benchmarks and, if there are several, the row of their mean."""
    everything = [one for row in rows.values() for one in row]
    return {**rows, _MEAN: everything} if len(everything) > 1 else rows


def _mean(benchmarks: Sequence[BenchmarkResult], figure: str) -> Estimate:
    return estimators.estimate_mean_of_groups([values_per_problem(benchmark, figure) for benchmark in benchmarks])


def values_per_problem(benchmark: BenchmarkResult, figure: str) -> FloatArray:
    """Return a figure per problem [problems]; `avg` is `avg@n` of its n samples."""
    if figure == "stopped":
        return 1.0 - benchmark.per_problem("truncated")
    of_all = figure in ("avg", "lenient_avg", "majority")
    return benchmark.per_problem(f"{figure}@{benchmark.samples}" if of_all else figure)


def format_percent(value: Estimate, sign: str = "") -> str:
    """Return an estimate in percent, with its interval."""
    numbers = [format(100 * number + 0.0, f"{sign}.1f") for number in value]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
