"""Signs of a run that goes wrong: which metric shows it, from what value on, what it means and what to look at.

`training/warnings.py` says them while the run goes on, `findings.py` in the report.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from eaopd_megatron.config.schema import RolloutConfig
from eaopd_megatron.evaluation.estimators import FloatArray

TERMINAL_LOGPROB_FLOOR = -10.0  # nats; below it the teacher takes the student's stop for a mistake
AMBIGUOUS_CEILING = 0.05  # share of tokens; each may lose its forward KL
KL_FLOOR = -1e-3  # nats; rounding alone gives about -1e-5

Values = TypeVar("Values", float, FloatArray)


@dataclass(frozen=True)
class Alert:
    """An iteration's mean of `metric` beyond `limit` (below a floor, above a ceiling)."""

    metric: str
    limit: float
    text: str
    remedy: str
    floor: bool = False

    def excess(self, values: Values) -> Values:
        """How far beyond the limit the values are; positive: a sign."""
        return self.limit - values if self.floor else values - self.limit


def alert_rules(rollout: RolloutConfig, updates: int, teachers: Collection[str] = ()) -> list[Alert]:
    """Those that the recipe's limits leave on. updates: of one iteration. teachers: names, where they are several."""
    gap, truncated, lag = rollout.warn_logprob_gap, rollout.warn_truncated, rollout.max_staleness * updates
    terminal = [
        Alert(
            f"{f'teachers/{name}' if name else 'teacher'}/terminal_logprob",
            TERMINAL_LOGPROB_FLOOR,
            f"{f'teacher {name}' if name else 'the teacher'}'s log-probability of the stopping token is below "
            f"{TERMINAL_LOGPROB_FLOOR:g} nats",
            "teacher and student may end with different ids: see "
            f"{f'teachers.{name}' if name else 'teacher'}.terminal_map",
            floor=True,
        )
        for name in teachers or [""]
    ]
    found = [
        *terminal,
        Alert(
            "objective/kl_min",
            KL_FLOOR,
            f"the smallest KL of a token is below {KL_FLOOR:g} nats, more than rounding explains",
            "teacher and student may be normalised over different vocabularies",
            floor=True,
        ),
        Alert(
            "objective/gate_ambiguous",
            AMBIGUOUS_CEILING,
            f"more than {AMBIGUOUS_CEILING:.0%} of the tokens have a teacher entropy that its top-k leaves on either "
            "side of the threshold; their gate stays shut",
            "raise objective.top_k, or use a teacher.placement that knows the entropy (colocated, separate)",
        ),
        Alert(
            "rollout/version_lag",
            float(lag),
            f"responses were written by weights more than {lag} updates old, more than rollout.max_staleness allows",
            "a server missed an update of its weights: see log.txt; training on stale samples collapses",
        ),
    ]
    if gap is not None:
        text = f"the rollout's log-probabilities lie more than {gap:g} nats from the trainer's"
        remedy = "the rollout may have other weights or another precision: see weight_sync.verify, student.precision"
        found.append(Alert("rollout/logprob_gap", gap, text, remedy))
    if truncated is not None:
        text = f"more than {truncated:.0%} of the rollouts are cut off at the length limit"
        remedy = "see rollout.max_response_tokens and rollout.stop_token_ids"
        found.append(Alert("rollout/truncated", truncated, text, remedy))
    return found


class AlertMonitor:
    """Warn about an iteration's metrics, once per metric until its value is within the limit again."""

    def __init__(self, rules: Sequence[Alert]) -> None:
        self._rules = rules
        self._raised: set[str] = set()

    def check(self, record: Mapping[str, float]) -> list[str]:
        """Return the new warnings of an iteration's metrics, a line each. A metric that is absent changes nothing."""
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
