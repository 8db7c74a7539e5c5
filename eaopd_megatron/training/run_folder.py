"""Paths in a run's folder, its finished mark, and whether a recipe may continue the run in it. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eaopd_megatron.config import Recipe, dump_recipe, load_recipe, recipe_differences
from eaopd_megatron.config.aliases import teacher_schema_key
from eaopd_megatron.config.schema import teacher_key
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.digest import local_folder, model_digest
from eaopd_megatron.utils.files import atomic_write, read_json

_FREE_SECTIONS = ("evaluation.", "reporting.", "distributed.", "servers.", "weight_sync.")
"""Settings that may change when a run is resumed: they do not affect the student's weights, except for the rounding of
sums over another layout's ranks."""
_FREE_KEYS = (
    *(f"run.{key}" for key in ("folder", "save_interval", "keep_checkpoints", "async_save", "on_corrupt_checkpoint")),
    *("run.log_rollouts", "rollout.batch_size", "rollout.warn_logprob_gap", "rollout.warn_truncated"),
    *(f"student.{kind}_parallel" for kind in ("tensor", "pipeline", "context", "expert", "expert_tensor", "data")),
    *("student.sequence_parallel", "student.virtual_pipeline", "student.recompute"),
    *(f"optimizer.{key}" for key in ("distributed", "overlap", "offload")),
    *(f"teacher.{key}" for key in ("placement", "offload", "replicas", "urls", "listen", "api_key_file")),
    *(f"teacher.{kind}_parallel" for kind in ("tensor", "pipeline", "expert")),
    *("teacher.max_concurrent_requests", "teacher.mem_fraction_static"),
    *("teacher.startup_timeout_minutes", "teacher.unavailable_timeout_minutes"),
)
"""The same for single keys. Keys of `teacher` apply to `teachers.NAME` too."""


class RunFolder:
    """Paths in a run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.log = path / "log.txt"
        self.checkpoints = path / "checkpoints"
        self.evaluation = path / "evaluation"
        self.rollouts = path / "rollouts"
        self.failures = path / "failures"
        self.collectives = self.failures / "collectives"
        """Flight recorder dumps of each rank, written when the run fails."""
        self.servers = path / "servers"
        """Logs of the rollout servers started by the run."""
        self.teachers = path / "teachers"
        """Logs of the teacher replicas started by the run."""
        self.weights = path / "weights"
        """The student as last exported for rollout servers."""
        self.profile = path / "profile"
        """Profiler traces."""
        self.student = path / "student"
        """The trained student as a Hugging Face folder."""
        self.models = path / "models.json"
        """Each model's name in the recipe, folder and digest."""
        self.finished_file = path / "finished.json"

    def finished(self) -> dict[str, Any] | None:
        """Return the content of the finished mark, or None if the run is not finished."""
        try:
            return dict(json.loads(self.finished_file.read_text()))
        except FileNotFoundError:
            return None

    def finish(self, recipe: Recipe) -> None:
        """Mark the run as finished. The last step of a run."""
        atomic_write(self.finished_file, json.dumps({"iterations": recipe.train.iterations}) + "\n")

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise UserError with the first difference if the folder holds a run of another recipe."""
        if not self.config.exists():
            return
        before = load_recipe(self.config, report=lambda line: None)
        named = self.models.exists()  # else only the paths are known
        models = {f"{teacher_key(name)}.model": one.model for name, one in recipe.named_teachers().items()}
        models["student.model"] = recipe.student.model
        bound = (
            one
            for one in recipe_differences(before, recipe)
            if not _is_free(one[0]) and not (named and one[0] in models)
        )
        different = next((f"with {key}={old}, this recipe has {new}" for key, old, new in bound), "")
        if before.teachers.keys() != recipe.teachers.keys():
            old, new = (", ".join(one.teachers) or "one, without a name" for one in (before, recipe))
            different = f"whose teachers are {old}, this recipe's are {new}"
        if different:
            raise UserError(f"{self.path} holds a run {different}: choose another run.folder, or remove that one")
        self.check_models({key: (model, folder) for key, model in models.items() if (folder := local_folder(model))})

    def check_models(self, models: Mapping[str, tuple[str, Path]]) -> dict[str, dict[str, str | None]]:
        """Return the record of the models for `write_models`. models: by key, name in the recipe and folder.

        Raises UserError if the run was trained with other models. A model may be at another path.
        """
        record = {
            key: {"model": model, "folder": str(folder), "digest": _digest(folder)}
            for key, (model, folder) in models.items()
        }
        trained = any("." not in path.name for path in self.checkpoints.glob("step_*"))
        if not trained or not self.models.exists():
            return record
        before = read_json(self.models, str(self.models))
        for key, now in record.items():
            was = before.get(key, now)
            if was["digest"] and now["digest"] and was["digest"] != now["digest"]:
                old, new = (f"{one['model']} ({one['folder']}, digest {one['digest']:.12})" for one in (was, now))
                raise UserError(
                    f"{self.path} holds a run whose {key} had other weights or another config.json: {old} then, "
                    f"{new} now; give that model again (of the hub: owner/name@COMMIT), or choose another run.folder"
                )
        return record

    def write_models(self, record: Mapping[str, Mapping[str, str | None]]) -> None:
        """Record the models of the run."""
        atomic_write(self.models, json.dumps(record, indent=1) + "\n")

    def write_config(self, recipe: Recipe) -> None:
        atomic_write(self.config, dump_recipe(recipe))


def _digest(folder: Path) -> str | None:
    try:
        return model_digest(folder)
    except (OSError, ValueError, KeyError):  # the model is told to be damaged where it is read
        return None


def _is_free(key: str) -> bool:
    key = teacher_schema_key(key)
    return key in _FREE_KEYS or key.startswith(_FREE_SECTIONS)


def finished_message(recipe: Recipe) -> str | None:
    """Return the line for a user who restarts a finished run, or None if the run is not finished."""
    folder = RunFolder(Path(recipe.run.folder))
    folder.check_recipe(recipe)
    if folder.finished() is None:
        return None
    return (
        f"{folder.path}: this run is finished ({recipe.train.iterations} iterations). "
        f"Report: {folder.path / 'report.html'}  Student: {folder.student}"
    )
