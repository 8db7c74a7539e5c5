"""What a run's figures say: each evaluation figure before and after, what deserves a warning, and a line of it all."""

from dataclasses import dataclass

from eaopd_megatron.config.schema import RolloutConfig, TrainConfig
from eaopd_megatron.evaluation.estimators import Estimate, estimate_mean
from eaopd_megatron.evaluation.results import BenchmarkResult
from eaopd_megatron.reporting.alerts import alert_rules
from eaopd_megatron.reporting.run_data import RunData

TRUNCATION_CEILING = 0.5  # of an evaluation's answers


@dataclass(frozen=True)
class Comparison:
    """One figure of one benchmark, before training and in the latest evaluation (None: only one evaluation yet).

    change: the paired difference; None if there is no later evaluation or if it has other problems.
    """

    benchmark: str
    figure: str
    before: Estimate
    after: Estimate | None
    change: Estimate | None

    @property
    def relative_change(self) -> float | None:
        """(after - before) / before, or None where that says nothing."""
        return self.change.value / self.before.value if self.change is not None and self.before.value > 0 else None


def compare_evaluations(run: RunData) -> list[Comparison]:
    """Every figure of every benchmark of the first evaluation against the same benchmark's last one."""
    rows = []
    for name in dict.fromkeys(name for evaluation in run.evaluations for name in evaluation.benchmarks):
        history = [evaluation.benchmarks[name] for evaluation in run.evaluations if name in evaluation.benchmarks]
        before, after = history[0], history[-1] if len(history) > 1 else None
        for figure in before.figures:
            if figure != "grader_errors":
                rows.append(_compare(name, figure, before, after))
    return rows


def _compare(name: str, figure: str, before: BenchmarkResult, after: BenchmarkResult | None) -> Comparison:
    first = before.per_problem(figure)
    if after is None or figure not in after.figures:
        return Comparison(name, figure, estimate_mean(first), None, None)
    second = after.per_problem(figure)
    same = [result.id for result in before.results] == [result.id for result in after.results]
    return Comparison(
        name, figure, estimate_mean(first), estimate_mean(second), estimate_mean(second - first) if same else None
    )


def find_warnings(run: RunData) -> list[str]:
    """A line for each sign of a run that goes wrong, with the iteration where it is worst and what to look at."""
    lines = list(run.problems)

    for sign in alert_rules(_rollout_options(run), _updates(run), run.setting("teachers") or ()):
        iterations, values = run.series(sign.metric)
        amount = sign.excess(values)
        if values.size and (amount > 0).any():
            worst = int(amount.argmax())
            lines.append(
                f"{sign.text}: {int((amount > 0).sum())} of {values.size} iterations, worst {values[worst]:.3g} "
                f"at iteration {iterations[worst]:.0f}, last {values[-1]:.3g}; {sign.remedy}"
            )
    return lines + _gate_warning(run) + _evaluation_warnings(run)


def _rollout_options(run: RunData) -> RolloutConfig:
    """The recipe's limits, or the defaults where it says none or those of another version."""
    given = run.setting("rollout")
    try:
        known = {name: value for name, value in given.items() if name in RolloutConfig.model_fields}
        return RolloutConfig.model_validate(known)
    except (AttributeError, ValueError):
        return RolloutConfig()


def _updates(run: RunData) -> int:
    """Updates of an iteration."""
    try:
        return TrainConfig.model_validate(run.setting("train")).updates_per_iteration
    except ValueError:
        return 1


def _gate_warning(run: RunData) -> list[str]:
    gate = run.gate()
    if gate is None or not gate.in_use or not run.names("objective/"):
        return []
    fractions = run.series("objective/gate_fraction")[1]
    if not fractions.size:
        return ["the objective has a gate, but objective/gate_fraction was never recorded: the gate may be off"]
    if not (fractions > 0).any():
        return [
            f"the gate never opened: no token of {fractions.size} iterations has a teacher entropy above "
            f"{gate.threshold:g} nats, so the run trained without its forward KL; see objective.threshold and whether "
            "the teacher's signal holds entropies"
        ]
    return []


def _evaluation_warnings(run: RunData) -> list[str]:
    lines = []
    for evaluation in run.evaluations:
        for name, benchmark in evaluation.benchmarks.items():
            errors = benchmark.figures["grader_errors"]
            answers = benchmark.samples * benchmark.problems
            if errors:
                lines.append(
                    f"grader errors: {errors:.0f} of {answers} answers of {name} at iteration {evaluation.iteration} "
                    "could not be graded (the grader threw or ran out of time) and count as wrong"
                )
            truncated = benchmark.figures["truncated"]
            if truncated > TRUNCATION_CEILING:
                lines.append(
                    f"{truncated:.0%} of the answers of {name} at iteration {evaluation.iteration} "
                    "are cut off at the length limit; see evaluation.max_response_tokens"
                )
    return lines


def summary_of(run: RunData) -> str:
    """One line: the chief figures before -> after (means over benchmarks) and the student's entropy on gated tokens."""
    parts = []
    rows = compare_evaluations(run)
    benchmarks = len({row.benchmark for row in rows})
    for figure in _chief_figures([row.figure for row in rows]):
        chosen = [row for row in rows if row.figure == figure]
        before = sum(row.before.value for row in chosen) / len(chosen)
        label = "distinct right answers" if figure == "distinct_correct" else figure.replace("pass@", "Pass@")
        done = [row.after.value for row in chosen if row.after is not None]
        if len(done) < len(chosen):
            parts.append(f"{label} {before:.3f}")
            continue
        after = sum(done) / len(done)
        relative = f" ({100 * (after - before) / before:+.0f} %)" if before > 0 else ""
        parts.append(f"{label} {before:.3f} -> {after:.3f}{relative}")
    student = run.recent("student/entropy_gated")
    teacher = run.recent("teacher/entropy_gated")
    if student is not None:
        versus = f" (teacher {teacher:.2f})" if teacher is not None else ""
        parts.append(f"student entropy on gated tokens {student:.2f} nats{versus}")
    loss = run.recent("objective/loss")
    if not rows and loss is not None:
        parts.insert(0, f"loss {run.early('objective/loss'):.3f} -> {loss:.3f}")
    prefix = f"mean of {benchmarks} benchmarks: " if benchmarks > 1 else ""
    return prefix + (", ".join(parts) if parts else f"{run.last_iteration} iterations, nothing evaluated")


def _chief_figures(figures: list[str]) -> list[str]:
    """pass@1, the largest pass@k, and the number of distinct right answers, as far as they are there."""
    passes = sorted({name for name in figures if name.startswith("pass@")}, key=lambda name: int(name[5:]))
    chosen = list(dict.fromkeys([*passes[:1], *passes[-1:]]))
    return chosen + (["distinct_correct"] if "distinct_correct" in figures else [])
