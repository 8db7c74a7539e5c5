"""A run's folder: where things lie in it, whether the run is finished, and whether this recipe may go on in it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaopd_megatron.config import Recipe, dump_recipe, load_recipe, recipe_differences
from eaopd_megatron.errors import UserError
from eaopd_megatron.utils.files import atomic_write

_FREE = ("evaluation.", "reporting.", "distributed.", "servers.", "weight_sync.")
"""Settings that may change between a run's start and its continuation: none of them reaches the student's weights,
but for the rounding of sums over another layout's ranks."""
_FREE_KEYS = (
    *(f"run.{key}" for key in ("folder", "save_interval", "keep_checkpoints", "async_save", "on_corrupt_checkpoint")),
    *("run.log_rollouts", "rollout.batch_size", "rollout.warn_logprob_gap", "rollout.warn_truncated"),
    *(f"student.{kind}_parallel" for kind in ("tensor", "pipeline", "context", "expert", "expert_tensor", "data")),
    *("student.sequence_parallel", "student.virtual_pipeline", "student.recompute"),
    *(f"optimizer.{key}" for key in ("distributed", "overlap", "offload")),
    *(f"teacher.{key}" for key in ("placement", "offload", "replicas", "urls", "listen", "api_key_file")),
    *(f"teacher.{kind}_parallel" for kind in ("tensor", "pipeline", "expert")),
    *(
        f"teacher.{key}"
        for key in (
            "max_concurrent_requests",
            "mem_fraction_static",
            "startup_timeout_minutes",
            "unavailable_timeout_minutes",
        )
    ),
)
"""Of a teacher it counts what it says, not where it is: the same keys are free in `teachers.NAME`."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's folder (docs: the run's folder)."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def failures(self) -> Path:
        return self.path / "failures"

    @property
    def servers(self) -> Path:
        """Logs of the rollout servers that were started for the run."""
        return self.path / "servers"

    @property
    def teachers(self) -> Path:
        """Logs of the teachers' replicas that were started for the run."""
        return self.path / "teachers"

    @property
    def weights(self) -> Path:
        """The student as it was last exported for rollout servers."""
        return self.path / "weights"

    @property
    def collectives(self) -> Path:
        """What each rank's flight recorder held when the run failed."""
        return self.failures / "collectives"

    @property
    def profile(self) -> Path:
        """The profiler's traces."""
        return self.path / "profile"

    @property
    def student(self) -> Path:
        """The trained student as a Hugging Face folder."""
        return self.path / "student"

    @property
    def finished_file(self) -> Path:
        return self.path / "finished.json"

    def finished(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None while the run is not finished."""
        try:
            return dict(json.loads(self.finished_file.read_text()))
        except FileNotFoundError:
            return None

    def finish(self, recipe: Recipe) -> None:
        """Mark the run as finished: the last thing that it does."""
        atomic_write(self.finished_file, json.dumps({"iterations": recipe.train.iterations}) + "\n")

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse to go on in a folder that holds a run of another recipe (UserError with the first difference)."""
        if not self.config.exists():
            return
        before = load_recipe(self.config, report=lambda line: None)
        if before.teachers.keys() != recipe.teachers.keys():
            there, here = (", ".join(one.teachers) or "one, without a name" for one in (before, recipe))
            raise UserError(
                f"{self.path} holds a run whose teachers are {there}, this recipe's are {here}: "
                "choose another run.folder, or remove that one"
            )
        for key, there, here in recipe_differences(before, recipe):
            if not _is_free(key):
                raise UserError(
                    f"{self.path} holds a run with {key}={there}, this recipe has {here}: "
                    "choose another run.folder, or remove that one"
                )

    def write_config(self, recipe: Recipe) -> None:
        """Keep the resolved recipe beside the run."""
        atomic_write(self.config, dump_recipe(recipe))


def _is_free(key: str) -> bool:
    key = re.sub(r"^teachers\.[^.]*\.", "teacher.", key)
    return key in _FREE_KEYS or key.startswith(_FREE)


def finished_message(recipe: Recipe) -> str | None:
    """The line for a user who starts a finished run again; None where there is something to do. Needs no torch."""
    folder = RunFolder(Path(recipe.run.folder))
    folder.check_recipe(recipe)
    if folder.finished() is None:
        return None
    return (
        f"{folder.path}: this run is finished ({recipe.train.iterations} iterations). "
        f"Report: {folder.path / 'report.html'}  Student: {folder.student}"
    )
