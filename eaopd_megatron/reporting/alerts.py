"""Warnings about a run: `AlertMonitor` during training, `find_warnings` in the report, from the same rules."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from eaopd_megatron.config.schema import RolloutConfig, TrainConfig
from eaopd_megatron.evaluation.estimators import FloatArray

if TYPE_CHECKING:
    from eaopd_megatron.reporting.run_data import RunData

TERMINAL_LOGPROB_FLOOR = -10.0  # nats; below it the teacher takes the student's stopping for a mistake
_AMBIGUOUS_CEILING = 0.05  # share of tokens; each may lose its forward KL
_KL_FLOOR = -1e-3  # nats; rounding alone gives about -1e-5
_TRUNCATED_ANSWERS_CEILING = 0.5  # share of an evaluation's answers

Values = TypeVar("Values", float, FloatArray)


@dataclass(frozen=True)
class Alert:
    """A rule: warn when `metric` is above `limit` (floor: below it). remedy: what to look at."""

    metric: str
    limit: float
    text: str
    remedy: str
    floor: bool = False

    def excess(self, values: Values) -> Values:
        """Return how far the values are beyond the limit; positive values call for a warning."""
        return self.limit - values if self.floor else values - self.limit


def alert_rules(rollout: RolloutConfig, updates: int, teachers: Collection[str] = ()) -> list[Alert]:
    """Return the rules that the recipe leaves on. updates: per iteration. teachers: names, if there are several."""
    gap, truncated, lag = rollout.warn_logprob_gap, rollout.warn_truncated, rollout.max_staleness * updates
    rules = []
    for label, key in [(f"teacher {name}", f"teachers.{name}") for name in teachers] or [("the teacher", "teacher")]:
        text = f"{label}'s log-probability of the stopping token is below {TERMINAL_LOGPROB_FLOOR:g} nats"
        remedy = f"teacher and student may end with different ids: see {key}.terminal_map"
        metric = f"{key.replace('.', '/', 1)}/terminal_logprob"
        rules.append(Alert(metric, TERMINAL_LOGPROB_FLOOR, text, remedy, floor=True))
    rules += [
        Alert(
            "objective/kl_min",
            _KL_FLOOR,
            f"the smallest KL of a token is below {_KL_FLOOR:g} nats, more than rounding explains",
            "teacher and student may be normalised over different vocabularies",
            floor=True,
        ),
        Alert(
            "objective/gate_ambiguous",
            _AMBIGUOUS_CEILING,
            f"more than {_AMBIGUOUS_CEILING:.0%} of the tokens have a teacher entropy that its top-k leaves on either "
            "side of the threshold; their gate stays shut",
            "raise objective.top_k, or use a teacher.placement that knows the entropy (colocated, separate)",
        ),
        Alert(
            "rollout/version_lag",
            float(lag),
            f"responses were sampled from weights more than {lag} updates old, more than rollout.max_staleness allows",
            "a server missed a weight update: see log.txt; training on stale samples collapses",
        ),
    ]
    if gap is not None:
        text = f"the rollout's log-probabilities lie more than {gap:g} nats from the trainer's"
        remedy = "the rollout may have other weights or another precision: see weight_sync.verify, student.precision"
        rules.append(Alert("rollout/logprob_gap", gap, text, remedy))
    if truncated is not None:
        text = f"more than {truncated:.0%} of the rollouts are cut off at the length limit"
        remedy = "see rollout.max_response_tokens and rollout.stop_token_ids"
        rules.append(Alert("rollout/truncated", truncated, text, remedy))
    return rules


class AlertMonitor:
    """Warns about an iteration's metrics, once per metric until its value is within the limit again."""

    def __init__(self, rules: Sequence[Alert]) -> None:
        self._rules = rules
        self._raised: set[str] = set()

    def check(self, record: Mapping[str, float]) -> list[str]:
        """Return the new warnings about an iteration's metrics, a line each. An absent metric changes nothing."""
        lines = []
        for rule in self._rules:
            if rule.metric not in record:
                continue
            value = record[rule.metric]
            if rule.excess(value) <= 0:
                self._raised.discard(rule.metric)
            elif rule.metric not in self._raised:
                self._raised.add(rule.metric)
                lines.append(f"warning: {rule.text} ({value:.3g}): {rule.remedy}")
        return lines


def find_warnings(run: RunData) -> list[str]:
    """Return the warnings about a run, a line each: unreadable files, metrics beyond limits, gate, evaluations."""
    lines = list(run.problems)
    for rule in _recipe_rules(run):
        iterations, values = run.series(rule.metric)
        amount = rule.excess(values)
        if values.size and (amount > 0).any():
            worst = int(amount.argmax())
            lines.append(
                f"{rule.text}: {int((amount > 0).sum())} of {values.size} iterations, worst {values[worst]:.3g} "
                f"at iteration {iterations[worst]:.0f}, last {values[-1]:.3g}; {rule.remedy}"
            )
    return lines + _gate_warnings(run) + _evaluation_warnings(run)


def _recipe_rules(run: RunData) -> list[Alert]:
    """Return the rules of the run's recipe; sections that are missing or of another version count as the defaults."""
    rollout, updates = RolloutConfig(), 1
    with contextlib.suppress(AttributeError, ValueError):
        known = {key: value for key, value in run.setting("rollout").items() if key in RolloutConfig.model_fields}
        rollout = RolloutConfig.model_validate(known)
    with contextlib.suppress(ValueError):
        updates = TrainConfig.model_validate(run.setting("train")).updates_per_iteration
    return alert_rules(rollout, updates, run.setting("teachers") or ())


def _gate_warnings(run: RunData) -> list[str]:
    threshold = run.gate_threshold()
    if threshold is None or not run.names("objective/"):
        return []
    fractions = run.series("objective/gate_fraction")[1]
    if not fractions.size:
        return ["the objective has a gate, but objective/gate_fraction was never recorded: the gate may be off"]
    if not (fractions > 0).any():
        return [
            f"the gate never opened: no token of {fractions.size} iterations has a teacher entropy above "
            f"{threshold:g} nats, so the run trained without its forward KL; see objective.threshold and whether "
            "the teacher's signal holds entropies"
        ]
    return []


def _evaluation_warnings(run: RunData) -> list[str]:
    lines = []
    for evaluation in run.evaluations:
        for name, benchmark in evaluation.benchmarks.items():
            errors, truncated = benchmark.figures["grader_errors"], benchmark.figures["truncated"]
            if errors:
                lines.append(
                    f"grader errors: {errors:.0f} of {benchmark.samples * benchmark.problems} answers of {name} at "
                    f"iteration {evaluation.iteration} could not be graded (the grader raised or ran out of time) and "
                    "count as wrong"
                )
            if truncated > _TRUNCATED_ANSWERS_CEILING:
                lines.append(
                    f"{truncated:.0%} of the answers of {name} at iteration {evaluation.iteration} "
                    "are cut off at the length limit; see evaluation.max_response_tokens"
                )
    return lines
