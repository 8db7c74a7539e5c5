"""A run's folder, read: recipe, environment, metrics and evaluations, whether the run has ended or not."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eaopd_megatron.config.aliases import rename_old_keys
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.estimators import FloatArray
from eaopd_megatron.evaluation.results import EvaluationResult
from eaopd_megatron.reporting.metrics_log import FILE_NAME, read_metrics

RECENT = 10  # records whose mean stands for the begin or the end of a run: a single one is noisy; at most half of all


@dataclass(frozen=True)
class GateSetting:
    """The part of the objective that the report must know. threshold: nats."""

    gate: str
    forward_kl: str
    threshold: float

    @property
    def in_use(self) -> bool:
        """True if some tokens, chosen by the teacher's entropy, get a forward KL."""
        return self.forward_kl != "none" and self.gate in ("hard", "soft")


@dataclass(frozen=True)
class RunData:
    """What a run's folder holds. `problems`: what could not be read, a line each; the rest is still reported."""

    folder: Path
    recipe_text: str
    recipe: dict[str, Any]
    environment: Any
    records: list[dict[str, Any]]
    evaluations: list[EvaluationResult]
    problems: list[str]

    @classmethod
    def read(cls, folder: Path) -> "RunData":
        """UserError if this is no run's folder or holds no metrics yet."""
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: give a run's folder (the recipe's run.folder)")
        records = read_metrics(folder / FILE_NAME)
        if not records:
            raise UserError(
                f"{folder / FILE_NAME} is missing or holds no record: give a run's folder (the recipe's run.folder), "
                "or wait for the first iteration"
            )
        problems: list[str] = []
        recipe_text = _text(folder / "config.yaml", problems)
        recipe: Any = None
        try:
            recipe = yaml.safe_load(recipe_text)
        except yaml.YAMLError:
            problems.append("config.yaml is no YAML")
        environment: Any = None
        try:
            environment = json.loads(_text(folder / "environment.json", problems) or "null")
        except ValueError:
            problems.append("environment.json is no JSON")
        last = records[-1]["iteration"]
        return cls(
            folder=folder,
            recipe_text=recipe_text,
            recipe=_with_current_keys(recipe) if isinstance(recipe, dict) else {},
            environment=environment,
            records=records,
            evaluations=_evaluations(folder / "evaluation", last, problems),
            problems=problems,
        )

    @property
    def last_iteration(self) -> int:
        """Iterations recorded so far."""
        return int(self.records[-1]["iteration"])

    @property
    def total_iterations(self) -> int | None:
        """Iterations of the whole run, as its recipe says; None without a recipe."""
        total = self.setting("train", "iterations")
        return int(total) if isinstance(total, int) else None

    @property
    def finished(self) -> bool:
        """True if the last iteration is recorded."""
        return self.total_iterations is not None and self.last_iteration >= self.total_iterations

    def setting(self, *keys: str) -> Any:
        """A value of the resolved recipe, or None."""
        node: Any = self.recipe
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    def gate(self) -> GateSetting | None:
        """The objective's gate: the recipe's own fields, else the preset's; None without a recipe."""
        objective = self.setting("objective")
        if not isinstance(objective, dict):
            return None
        names = ("gate", "forward_kl", "threshold")
        values: dict[str, Any] = {name: objective.get(name) for name in names}
        try:
            if None in values.values():
                from eaopd_megatron.objective import Objective

                preset = Objective.preset(str(objective.get("preset")))
                values = {name: getattr(preset, name) if values[name] is None else values[name] for name in names}
            return GateSetting(str(values["gate"]), str(values["forward_kl"]), float(values["threshold"]))
        except (ValueError, TypeError):  # a recipe that was edited afterwards, or that of another version
            return None

    def series(self, name: str) -> tuple[FloatArray, FloatArray]:
        """Iterations and values of a metric where it was recorded, both [n]."""
        pairs = [(record["iteration"], record[name]) for record in self.records if name in record]
        array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    def names(self, prefix: str) -> list[str]:
        """Names of the recorded metrics that begin so, in order of their first appearance."""
        return list(dict.fromkeys(name for record in self.records for name in record if name.startswith(prefix)))

    def recent(self, name: str) -> float | None:
        """Mean of a metric's last values, or None where it was never recorded."""
        values = self.series(name)[1]
        return float(values[-_window(values.size) :].mean()) if values.size else None

    def early(self, name: str) -> float | None:
        """Mean of a metric's first values, or None where it was never recorded."""
        values = self.series(name)[1]
        return float(values[: _window(values.size)].mean()) if values.size else None


def _window(count: int) -> int:
    return max(1, min(RECENT, count // 2))


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
    return ""


def _evaluations(folder: Path, last_iteration: int, problems: list[str]) -> list[EvaluationResult]:
    """By iteration; without those of iterations that the run, resumed from an earlier checkpoint, has yet to repeat."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            evaluation = EvaluationResult.read(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if evaluation.iteration <= last_iteration:
            found.append(evaluation)
    return sorted(found, key=lambda evaluation: evaluation.iteration)


def _with_current_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with the current names of renamed keys: the run may be one of an earlier release."""
    try:
        return rename_old_keys(recipe)[0]
    except ValueError:  # edited by hand
        return recipe
