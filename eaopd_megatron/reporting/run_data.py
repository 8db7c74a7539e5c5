"""A run's folder, read: recipe, environment, metrics and evaluations, of a run in any state."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eaopd_megatron.config.aliases import rename_old_keys
from eaopd_megatron.config.model_schema import ObjectiveConfig
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.estimators import FloatArray
from eaopd_megatron.evaluation.results import BenchmarkResult, EvaluationResult
from eaopd_megatron.reporting.metrics_log import METRICS_FILE, read_metrics

_WINDOW = 10  # records averaged at the start and at the end of a run; at most half of all


History = list[tuple[int, BenchmarkResult]]
"""A benchmark's (iteration, result) pairs by iteration."""


@dataclass(frozen=True)
class RunData:
    """Contents of a run's folder. problems: a line for each part that could not be read; the others are reported."""

    folder: Path
    recipe_text: str
    recipe: dict[str, Any]
    environment: Any
    records: list[dict[str, Any]]
    evaluations: list[EvaluationResult]
    problems: list[str]

    @classmethod
    def read(cls, folder: Path) -> "RunData":
        """Read a run's folder. Raise UserError if it is none or holds no metrics yet."""
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give a run's folder (the recipe's run.folder)")
        records = read_metrics(folder / METRICS_FILE)
        if not records:
            raise UserError(
                f"{folder / METRICS_FILE} is missing or holds no record: give a run's folder (the recipe's "
                "run.folder), or wait for the first iteration"
            )
        problems: list[str] = []
        recipe_text = _read_text(folder / "config.yaml", problems)
        recipe: Any = None
        try:
            recipe = yaml.safe_load(recipe_text)
        except yaml.YAMLError:
            problems.append("config.yaml is no YAML")
        environment: Any = None
        try:
            environment = json.loads(_read_text(folder / "environment.json", problems) or "null")
        except ValueError:
            problems.append("environment.json is no JSON")
        return cls(
            folder=folder,
            recipe_text=recipe_text,
            recipe=_with_current_keys(recipe) if isinstance(recipe, dict) else {},
            environment=environment,
            records=records,
            evaluations=_read_evaluations(folder / "evaluation", records[-1]["iteration"], problems),
            problems=problems,
        )

    @property
    def last_iteration(self) -> int:
        return int(self.records[-1]["iteration"])

    @property
    def total_iterations(self) -> int | None:
        """Iterations of the complete run according to its recipe; None without a recipe."""
        total = self.setting("train", "iterations")
        return int(total) if isinstance(total, int) else None

    @property
    def finished(self) -> bool:
        """Whether the last iteration is recorded."""
        return self.total_iterations is not None and self.last_iteration >= self.total_iterations

    def setting(self, *keys: str) -> Any:
        """Return a value of the resolved recipe, or None."""
        node: Any = self.recipe
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def gate_threshold(self) -> float | None:
        """Return the teacher entropy (nats) above which tokens get a forward KL; None if the objective has no gate.

        Fields that the recipe leaves out are those of its preset. Without a recipe the result is None, too.
        """
        try:
            section = self.setting("objective").items()
            known = {key: value for key, value in section if key in ObjectiveConfig.model_fields}
            objective = ObjectiveConfig.model_validate(known).build_objective()
        except (AttributeError, ValueError):  # no recipe, one that was edited afterwards, or one of another version
            return None
        in_use = objective.forward_kl != "none" and objective.gate in ("hard", "soft")
        return objective.threshold if in_use else None

    def benchmarks(self) -> dict[str, History]:
        """Return the evaluations by benchmark."""
        histories: dict[str, History] = {}
        for evaluation in self.evaluations:
            for name, benchmark in evaluation.benchmarks.items():
                histories.setdefault(name, []).append((evaluation.iteration, benchmark))
        return histories

    def series(self, name: str) -> tuple[FloatArray, FloatArray]:
        """Return iterations and values of a metric, both [n], for the records that have it."""
        pairs = [(record["iteration"], record[name]) for record in self.records if name in record]
        array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    def has(self, name: str) -> bool:
        return any(name in record for record in self.records)

    def names(self, prefix: str) -> list[str]:
        """Return the names of the recorded metrics with this prefix, in order of first appearance."""
        return list(dict.fromkeys(name for record in self.records for name in record if name.startswith(prefix)))

    def early(self, name: str) -> float | None:
        """Return the mean of a metric's first values (10, or half of fewer than 20); None if it was never recorded."""
        values = self.series(name)[1]
        return float(values[: _window(values.size)].mean()) if values.size else None

    def recent(self, name: str) -> float | None:
        """Return the mean of a metric's last values, as many as for `early`."""
        values = self.series(name)[1]
        return float(values[-_window(values.size) :].mean()) if values.size else None


def _window(count: int) -> int:
    return max(1, min(_WINDOW, count // 2))


def _with_current_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with the current names of renamed keys: the run may be one of an earlier release."""
    try:
        return rename_old_keys(recipe)[0]
    except ValueError:  # edited by hand
        return recipe


def _read_text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
    return ""


def _read_evaluations(folder: Path, last_iteration: int, problems: list[str]) -> list[EvaluationResult]:
    """Return evaluations by iteration, without those past `last_iteration`, which a resumed run has yet to repeat."""
    evaluations = []
    for path in sorted(folder.glob("*.json")):
        try:
            evaluation = EvaluationResult.read(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if evaluation.iteration <= last_iteration:
            evaluations.append(evaluation)
    return sorted(evaluations, key=lambda evaluation: evaluation.iteration)
