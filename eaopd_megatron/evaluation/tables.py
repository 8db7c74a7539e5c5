"""What an evaluation found, and how two of them differ, as Markdown and as JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from eaopd_megatron.evaluation.estimators import Estimate, FloatArray, estimate_mean_of_groups
from eaopd_megatron.evaluation.results import BenchmarkResult, EvaluationResult

MEAN = "mean"
"""The row of all benchmarks' mean, each benchmark counting the same."""
NOTE = (
    "In brackets: 95 % bootstrap intervals over problems; they do not hold the spread between training runs. lenient: "
    "notations that the strict comparison does not read count as right. errors: answers whose comparison threw or ran "
    "out of time, counted as wrong."
)
CHANGE_NOTE = "Differences with 95 % paired bootstrap intervals over problems; bold where the interval leaves out 0."


def figures_json(result: EvaluationResult) -> dict[str, dict[str, Any]]:
    """{benchmark, or `mean`: {figure: {"value", "low", "high"}, "pass_at_k": {k: the same}, "problems", "samples"}}.

    `stopped` is the share of samples that ended by themselves, the others are `truncated`.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, chosen in _rows(result).items():
        samples = min(benchmark.samples for benchmark in chosen)
        wanted = ["avg", f"pass@{samples}", "majority", "lenient_avg", "truncated", "stopped", "length"]
        found[name] = {
            **{figure: asdict(_mean(chosen, figure)) for figure in wanted},
            "pass_at_k": {k: asdict(_mean(chosen, f"pass@{k}")) for k in range(1, samples + 1)},
            "grader_errors": int(sum(benchmark.figures["grader_errors"] for benchmark in chosen)),
            "problems": sum(benchmark.problems for benchmark in chosen),
            "samples": samples,
        }
    return found


def results_markdown(result: EvaluationResult) -> str:
    """A table with a row a benchmark and one for their mean."""
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
        shares = [_percent(Estimate(**row[key])) for key in ("avg", f"pass@{samples}", "majority", "lenient_avg")]
        rows.append([name, f"{row['problems']} × {samples}", *shares, f"{row['stopped']['value']:.1%}",
                     f"{row['length']['value']:.0f}", str(row["grader_errors"])])  # fmt: skip
    return f"{_table(heads, rows)}\n{NOTE}\n"


def paired_changes(before: EvaluationResult, after: EvaluationResult) -> dict[str, dict[str, Estimate]]:
    """after - before of avg and of pass at the largest common k, for each benchmark with the same problems in both, and
    for their mean."""
    pairs: dict[str, tuple[BenchmarkResult, BenchmarkResult]] = {}
    for name, one in before.benchmarks.items():
        other = after.benchmarks.get(name)
        if other is not None and [r.id for r in one.results] == [r.id for r in other.results]:
            pairs[name] = (one, other)
    found: dict[str, dict[str, Estimate]] = {}
    for name, chosen in _with_mean({name: [pair] for name, pair in pairs.items()}).items():
        k = min(benchmark.samples for pair in chosen for benchmark in pair)
        found[name] = {
            figure: estimate_mean_of_groups([_values(other, figure) - _values(one, figure) for one, other in chosen])
            for figure in ("avg", f"pass@{k}")
        }
    return found


def changes_markdown(changes: Mapping[str, Mapping[str, Estimate]]) -> str:
    """A table with a row a benchmark."""
    rows = []
    for name, row in changes.items():
        shown = [(_percent(change, sign="+"), change.excludes_zero) for change in row.values()]
        rows.append([name, *(f"**{cell}**" if sure else cell for cell, sure in shown), list(row)[1]])
    return f"{_table(['benchmark', 'avg@k', 'pass@k', 'k'], rows)}\n{CHANGE_NOTE}\n"


def _rows(result: EvaluationResult) -> dict[str, list[BenchmarkResult]]:
    return _with_mean({name: [benchmark] for name, benchmark in result.benchmarks.items()})


def _with_mean(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    everything = [one for row in rows.values() for one in row]
    return {**rows, MEAN: everything} if len(everything) > 1 else rows


def _mean(chosen: Sequence[BenchmarkResult], figure: str) -> Estimate:
    return estimate_mean_of_groups([_values(benchmark, figure) for benchmark in chosen])


def _values(benchmark: BenchmarkResult, figure: str) -> FloatArray:
    if figure == "stopped":
        return 1.0 - benchmark.per_problem("truncated")
    of_all = figure in ("avg", "lenient_avg", "majority")
    return benchmark.per_problem(f"{figure}@{benchmark.samples}" if of_all else figure)


def _percent(value: Estimate, sign: str = "") -> str:
    numbers = [format(100 * number + 0.0, f"{sign}.1f") for number in (value.value, value.low, value.high)]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
