"""The change from one evaluation to another, over the problems that both have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation import estimators
from eaopd_megatron.evaluation.estimators import Estimate
from eaopd_megatron.evaluation.results import (
    BenchmarkResult,
    EvaluationResult,
    format_percent,
    markdown_table,
    rows_with_mean,
    summarise,
    values_per_problem,
)

_NOTE = "Differences with 95 % paired bootstrap intervals over problems; bold if the interval excludes 0."
_SETTINGS = ("sampling", "samples", "seed", "template", "suffixes", "engine")
"""Settings of an evaluation, besides model and problems, that its figures depend on."""

Identities = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class EvaluationChange:
    """What changed between two evaluations.

    changes: {benchmark, or "mean": {figure: after - before}}. counts: {benchmark: (problems of both, of the one before
    alone, of the one after alone)}. differences: settings that differ, one sentence each.
    """

    changes: dict[str, dict[str, Estimate]]
    counts: dict[str, tuple[int, int, int]]
    differences: Sequence[str] = ()

    def to_markdown(self) -> str:
        """Return a table with a row per benchmark, the problems left out, and the settings that differ."""
        rows = []
        for name, row in self.changes.items():
            cells = [(format_percent(change, sign="+"), change.excludes_zero) for change in row.values()]
            common = self.counts[name][0] if name in self.counts else sum(count[0] for count in self.counts.values())
            rows.append([name, str(common), *(f"**{text}**" if bold else text for text, bold in cells), list(row)[1]])
        lines = [markdown_table(["benchmark", "problems", "avg@k", "pass@k", "k"], rows), _NOTE]
        for name, (common, before, after) in self.counts.items():
            if before or after:
                lines.append(
                    f"{name}: {common} problems are in both evaluations; left out are {before} of the other one and "
                    f"{after} of this one."
                )
        lines += [f"Other settings: {text}." for text in self.differences]
        return "\n".join(lines) + "\n"


def compare_results(
    before: EvaluationResult,
    after: EvaluationResult,
    settings: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
) -> EvaluationChange:
    """Return after - before of avg and of pass at the largest common k, per benchmark and for their mean.

    Problems are matched by the digests of their texts. Raise UserError if no benchmark has a problem in common.
    """
    require_common(before, {name: identities(one) for name, one in after.benchmarks.items()})
    pairs: dict[str, list[tuple[BenchmarkResult, BenchmarkResult]]] = {}
    counts: dict[str, tuple[int, int, int]] = {}
    for name, one in before.benchmarks.items():
        if (other := after.benchmarks.get(name)) is None:
            counts[name] = (0, one.problems, 0)
            continue
        first, second = dict(zip(identities(one), one.results, strict=True)), identities(other)
        common = [identity for identity in second if identity in first]
        counts[name] = len(common), one.problems - len(common), other.problems - len(common)
        if common:
            later = dict(zip(second, other.results, strict=True))
            kept = [[found[identity] for identity in common] for found in (first, later)]
            pairs[name] = [(summarise(name, one.samples, kept[0]), summarise(name, other.samples, kept[1]))]
    counts |= {name: (0, 0, one.problems) for name, one in after.benchmarks.items() if name not in counts}
    changes: dict[str, dict[str, Estimate]] = {}
    for name, row in rows_with_mean(pairs).items():
        k = min(benchmark.samples for pair in row for benchmark in pair)
        for figure in ("avg", f"pass@{k}"):
            differences = [values_per_problem(later, figure) - values_per_problem(one, figure) for one, later in row]
            changes.setdefault(name, {})[figure] = estimators.estimate_mean_of_groups(differences)
    return EvaluationChange(changes, counts, _differing_settings(*settings))


def require_common(before: EvaluationResult, after: Mapping[str, Identities]) -> None:
    """Raise UserError unless a benchmark of both evaluations has a problem in common. after: `identities` by name."""
    shared = [name for name in before.benchmarks if name in after]
    if any(not set(identities(before.benchmarks[name])).isdisjoint(after[name]) for name in shared):
        return
    if shared:
        raise UserError(f"--compare: the problems of {', '.join(shared)} are other ones there: nothing can be compared")
    raise UserError(
        f"--compare: no benchmark is in both evaluations: {', '.join(before.benchmarks) or 'none'} there, "
        f"{', '.join(after) or 'none'} here"
    )


def identities(benchmark: BenchmarkResult) -> Identities:
    """Return what each problem is matched by."""
    return numbered([result.digest or result.id for result in benchmark.results])


def numbered(digests: Sequence[str]) -> Identities:
    """Return each digest with the number of its occurrence: a benchmark may have a problem twice."""
    seen: Counter[str] = Counter()
    found = []
    for digest in digests:
        found.append((digest, seen[digest]))
        seen[digest] += 1
    return found


def _differing_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ, as `temperature was 1.0, is 0.6`."""
    pairs = [_flattened(settings) for settings in (before, after)] if before and after else [{}, {}]
    names = list(dict.fromkeys([*pairs[0], *pairs[1]]))
    values = [(name, pairs[0].get(name), pairs[1].get(name)) for name in names]
    of_one = {name for name in names if name.startswith("suffix of") and not all(name in pair for pair in pairs)}
    return [f"{name} was {one!r}, is {other!r}" for name, one, other in values if one != other and name not in of_one]


def _flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in _SETTINGS:
        value = settings.get(key)
        if key == "suffixes":
            found |= {f"suffix of {name}": text for name, text in (value or {}).items()}
        elif isinstance(value, dict):
            found |= value
        else:
            found[key] = value
    return found
