"""`eaopd plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from eaopd_megatron.config import load_recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.supported import find_model
from eaopd_megatron.planning.hardware import find_gpu
from eaopd_megatron.planning.layouts import PlannedLayout
from eaopd_megatron.planning.memory import PlannedServers
from eaopd_megatron.planning.planner import Plan, Planner
from eaopd_megatron.planning.tables import plan_as_json, print_plan
from eaopd_megatron.planning.workload import PlannedTeacher, Workload


def plan_recipe(
    recipe: str,
    overrides: Sequence[str],
    *,
    gpus: int | None,
    gpu: str,
    gpu_memory: float | None,
    teacher: str | None,
    out: Path | None,
) -> None:
    """Print the plan of a recipe, and write it to `out`. UserError, with the remedy, where the recipe does not fit."""
    chosen = find_gpu(gpu)
    replaced = [] if teacher is None else [f"teacher.model={json.dumps(teacher)}"]
    loaded = load_recipe(recipe, [*overrides, *replaced])
    if teacher is not None and loaded.teachers:
        raise UserError("--teacher is for one teacher; with several give teachers.NAME.model=MODEL as an override")
    planner = Planner(
        student=find_model(loaded.student.model, "student.model"),
        teachers=PlannedTeacher.from_recipe(loaded),
        work=Workload.from_recipe(loaded),
        gpu=chosen,
        limit=gpu_memory or chosen.memory,
        servers=PlannedServers.from_recipe(loaded),
    )
    layout = PlannedLayout.of(loaded.student, gpus)
    found = Plan(planner, layout, gpus or layout.gpus)
    print_plan(found)
    if out is not None:
        try:
            out.write_text(json.dumps(plan_as_json(found), indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json {out}: {error.strerror}") from None
    if not found.fits:
        raise UserError(found.remedy())
