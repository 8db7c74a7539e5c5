"""Paths in a run's folder, its finished mark, and whether a recipe may continue the run in it. Imports no torch."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from eaopd_megatron.config import Recipe, dump_recipe, load_recipe, recipe_differences
from eaopd_megatron.config.aliases import at_resume
from eaopd_megatron.config.model_schema import AtResume
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.digest import local_folder, model_digest
from eaopd_megatron.utils.files import atomic_write, checkpoint_step, complete_checkpoints, read_json

RECIPE_FILE = "recipe.yaml"
"""In a checkpoint: the recipe that it was made with."""


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
        """Raise UserError with the first difference if the folder holds a trained run that the recipe cannot go on."""
        recipe, checkpoint = started_from(recipe), self.latest_checkpoint()
        if checkpoint is None:
            return
        if (done := checkpoint_step(checkpoint.name) or 0) > recipe.train.iterations:
            raise UserError(
                f"{self.path} holds a run of {done} iterations, more than train.iterations={recipe.train.iterations}: "
                "raise it, or choose another run.folder"
            )
        before = self.recipe_of(checkpoint)
        if before is None:
            return
        named = self.models.exists()  # else only the paths are known
        models = recipe.model_names()
        bound = (
            one
            for one in recipe_differences(before, recipe)
            if at_resume(one[0]) is AtResume.NEVER and not (named and one[0] in models)
        )
        different = next((f"with {key}={old}, this recipe has {new}" for key, old, new in bound), "")
        if before.teachers.keys() != recipe.teachers.keys():
            old, new = (", ".join(one.teachers) or "one, without a name" for one in (before, recipe))
            different = f"whose teachers are {old}, this recipe's are {new}"
        if different:
            raise UserError(
                f"{self.path} holds a run {different}, and it has trained: give the old value, or begin another run "
                f"from its student: run.folder=NEW --continue-from {self.path}"
            )
        self.check_models({key: (model, folder) for key, model in models.items() if (folder := local_folder(model))})

    def latest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint, or None if nothing is trained."""
        return next(reversed(complete_checkpoints(self.checkpoints)), None)

    def recipe_of(self, checkpoint: Path) -> Recipe | None:
        """Return the recipe that a checkpoint was made with: its own or, of an earlier release, the run's."""
        path = next((path for path in (checkpoint / RECIPE_FILE, self.config) if path.exists()), None)
        return None if path is None else load_recipe(path, report=lambda line: None)

    def check_models(self, models: Mapping[str, tuple[str, Path]]) -> dict[str, dict[str, str | None]]:
        """Return the record of the models for `write_models`. models: by key, name in the recipe and folder.

        Raises UserError if the run was trained with other models. A model may be at another path.
        """
        record = {
            key: {"model": model, "folder": str(folder), "digest": _digest(folder)}
            for key, (model, folder) in models.items()
        }
        if self.latest_checkpoint() is None or not self.models.exists():
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


def finished_message(recipe: Recipe) -> str | None:
    """Return the line for a user who restarts a finished run, or None if the run is not finished."""
    folder = RunFolder(Path(recipe.run.folder))
    folder.check_recipe(recipe)
    finished = folder.finished()
    if finished is None or finished["iterations"] < recipe.train.iterations:
        return None
    return (
        f"{folder.path}: this run is finished ({recipe.train.iterations} iterations); a larger "
        f"train.iterations goes on. Report: {folder.path / 'report.html'}  Student: {folder.student}"
    )


def check_inputs(recipe: Recipe, *, hub: bool) -> None:
    """Read data and benchmarks and import what reports, before a rank starts or a model is loaded. Raises UserError.

    hub: read data sets of the Hugging Face hub too, which may be downloaded.
    """
    from eaopd_megatron.data.sources import FieldNames, check_batch, load_problems
    from eaopd_megatron.evaluation.benchmarks import BENCHMARKS, load_benchmark, sources_by_name
    from eaopd_megatron.reporting.metrics_log import import_sink

    data, benchmarks = recipe.data, sources_by_name(recipe.evaluation.benchmarks).values()
    for source in dict.fromkeys([*benchmarks, *data.decontaminate]):
        if hub or not (source in BENCHMARKS or source.startswith("hub:")):
            load_benchmark(source)
    if hub or not data.source.startswith("hub:"):
        names = FieldNames(problem=data.prompt_field)
        problems = load_problems(data.source, data.split, names, text_field=data.prompt_field)
        check_batch(len(problems), recipe.train.prompts_per_iteration, data.last_batch)
    if recipe.reporting.wandb:
        import_sink("wandb", "wandb")


def started_from(recipe: Recipe) -> Recipe:
    """Return the recipe with `start/` of the run's folder as the student's model if run.continue_from names one."""
    if recipe.run.continue_from is None:
        return recipe
    start = str((Path(recipe.run.folder) / "start").resolve())
    return recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": start})})


def export_start(recipe: Recipe, log: Callable[[str], None]) -> None:
    """Write the student that run.continue_from names into the run's folder, unless it is there. For rank 0.

    Raises UserError if there is none.
    """
    name, start = recipe.run.continue_from, Path(started_from(recipe).student.model)
    if name is None or start.exists() or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    source, work = Path(name).expanduser(), start.with_name("start.incomplete")
    run = RunFolder(source)
    checkpoint = run.latest_checkpoint() or source
    shutil.rmtree(work, ignore_errors=True)
    work.parent.mkdir(parents=True, exist_ok=True)
    if run.finished_file.exists():
        shutil.copytree(run.student, work)
    elif (checkpoint / "sharded").is_dir():
        # by a process of its own: a launcher that had loaded the model would keep its GPU memory for the whole run
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                lines = pool.submit(_export, checkpoint, work).result()
        except BrokenExecutor:
            raise UserError(f"run.continue_from: the process that read {checkpoint} was killed (memory?)") from None
        for line in lines:
            log(line)
    else:
        raise UserError(f"run.continue_from: {name} is no run with a checkpoint, and no checkpoint of a run")
    work.rename(start)
    log(f"the student of {name} is in {start}: this run begins with it")


def _export(checkpoint: Path, out: Path) -> list[str]:
    """Write a checkpoint's student as a Hugging Face folder; return the lines to log."""
    warnings.simplefilter("ignore")
    from eaopd_megatron.checkpoint.convert import export_checkpoint

    lines: list[str] = []
    export_checkpoint(checkpoint, out, verify=False, log=lines.append)
    return lines
