"""Assign a recipe's roles to the nodes and GPUs of a job, and render the result as bash for slurm/lib/job.sh."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eaopd_megatron.config import Recipe, load_recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.supported import check_recipe_models
from eaopd_megatron.slurm_job import ROLES
from eaopd_megatron.training.run_folder import finished_message

_SHARED, _MODELS, _STAGE = "EAOPD_SHARED", "EAOPD_MODELS", "EAOPD_STAGE"
_PER_NODE = {
    "student": "EAOPD_RANKS_PER_NODE",
    "teacher": "EAOPD_TEACHERS_PER_NODE",
    "servers": "EAOPD_SERVERS_PER_NODE",
}


@dataclass(frozen=True)
class JobNodes:
    """A job's nodes, and how many each role takes in the order of ROLES; one with 0 runs where the recipe places it."""

    student: int
    teacher: int
    servers: int
    names: tuple[str, ...]
    gpus: int  # per node; 0 on a cluster without GPUs, where `per_node` is required
    per_node: Mapping[str, int]  # ranks or services per node of a role, where the site sets it

    def check(self) -> None:
        """Raise UserError unless the roles take exactly the job's nodes and a node's capacity is known."""
        total = self.student + self.teacher + self.servers
        if total != len(self.names):
            counts = ", ".join(f"{role} {getattr(self, role)}" for role in ROLES)
            raise UserError(
                f"the script's roles take {total} nodes ({counts}), the job has {len(self.names)}: set #SBATCH --nodes "
                "to their sum"
            )
        if not self.gpus and not self.per_node:
            raise UserError(
                "the job's nodes have no GPUs: request them with #SBATCH --gpus-per-node, or set EAOPD_RANKS_PER_NODE"
            )

    def of(self, role: str) -> tuple[str, ...]:
        """Return the names of a role's nodes."""
        first = sum(getattr(self, earlier) for earlier in ROLES[: ROLES.index(role)])
        return self.names[first : first + getattr(self, role)]


@dataclass(frozen=True)
class StepPlan:
    """One Slurm step: the student's ranks, one teacher replica or one rollout server."""

    name: str  # student, teacher_N or server_N
    nodes: tuple[str, ...]
    tasks_per_node: int
    gpus: tuple[int, int] | None = None  # (first, count) of each node's GPUs; None: all of them

    def words(self) -> str:
        """Return nodes, tasks per node and FIRST:COUNT of the GPUs, as `step` in slurm/lib/steps.sh reads them."""
        gpus = ":".join(map(str, self.gpus)) if self.gpus else ""
        return f"{','.join(self.nodes)} {self.tasks_per_node} {gpus}".rstrip()


@dataclass(frozen=True)
class Allocation:
    """What a job runs, and on which nodes."""

    recipe: str
    folder: Path  # the run's
    finished: str  # why there is nothing to do; "" if there is
    models: tuple[str, ...]  # folders or hub ids that every node must be able to read
    staged: tuple[str, ...]  # overrides that name the models' copies on the nodes' local disks
    overrides: tuple[str, ...]
    steps: tuple[StepPlan, ...]  # the student's first, then the services

    def render(self) -> str:
        """Return bash that sets `allocated_<field>`, lists as arrays, one step per line."""
        lines = ["# What this job runs, written by `python -m eaopd_megatron.slurm_job allocate` for slurm/lib/job.sh."]
        for name in ("recipe", "folder", "finished"):
            lines.append(f"allocated_{name}={shlex.quote(str(getattr(self, name)))}")
        for name in ("models", "staged", "overrides"):
            lines += [f"allocated_{name}=(", *(f"    {shlex.quote(word)}" for word in getattr(self, name)), ")"]
        lines.append(f"allocated_services=({' '.join(step.name for step in self.steps[1:])})")
        lines.append("# name: nodes, tasks per node, FIRST:COUNT of each node's GPUs (all of them if omitted)")
        lines += ["declare -gA allocated_steps=("]
        return "\n".join([*lines, *(f'    [{step.name}]="{step.words()}"' for step in self.steps), ")"])


def print_allocation(recipe: str, overrides: Sequence[str], roles: str, nodes: str, gpus: int) -> None:
    """Print the allocation as bash. roles: such as "student=1 teacher=2". nodes: names, separated by commas."""
    counts = {role: int(count) for role, _, count in (word.partition("=") for word in roles.split())}
    per_node = {role: int(count) for role, name in _PER_NODE.items() if (count := os.environ.get(name) or "0") != "0"}
    job = JobNodes(**{**dict.fromkeys(ROLES, 0), **counts}, names=tuple(nodes.split(",")), gpus=gpus, per_node=per_node)
    print(allocate(recipe, overrides, job).render())


def allocate(recipe: str, overrides: Sequence[str], nodes: JobNodes) -> Allocation:
    """Assign the recipe's roles to the job's nodes. Raise UserError if they do not fit.

    User overrides take precedence over role defaults; paths in them are resolved on the cluster.
    """
    nodes.check()
    defaults = (nodes.teacher, "teacher.placement=separate"), (nodes.servers, "rollout.engine=sglang")
    overrides = [*(override for count, override in defaults if count), *overrides]
    named = load_recipe(recipe, overrides)
    resolved = {key: _model_path(key, model) for key, model in named.model_names().items()}
    resolved["run.folder"] = str(Path(os.environ.get(_SHARED) or ".").absolute() / named.run.folder)
    overrides += [f"{key}={value}" for key, value in resolved.items()]
    loaded = load_recipe(recipe, overrides)
    allocation = Allocation(
        recipe=recipe,
        folder=Path(loaded.run.folder),
        finished=finished_message(loaded) or "",
        models=tuple(dict.fromkeys(loaded.model_names().values())),
        staged=_staged_overrides(loaded),
        overrides=tuple(overrides),
        steps=(_student_step(loaded, nodes), *_teacher_steps(loaded, nodes), *_server_steps(loaded, nodes)),
    )
    if not allocation.finished:
        check_recipe_models(loaded)
    return allocation


def _model_path(key: str, model: str) -> str:
    """Return the site's folder of a hub id, or the id itself if the site has no folder of models."""
    models = os.environ.get(_MODELS)
    if not models or Path(model).is_absolute():
        return model
    candidates = [Path(models) / model, Path(models) / Path(model).name]
    for candidate in candidates:
        if (candidate / "config.json").exists():
            return str(candidate)
    raise UserError(
        f"{key} is {model}, but {_MODELS} has neither {candidates[0]} nor {candidates[1]} (with a config.json)"
    )


def staged_path(model: Path, stage: Path) -> Path:
    """Return where a model's copy lies below `stage`, the same on every node."""
    return stage / f"{model.name}-{hashlib.sha256(str(model).encode()).hexdigest()[:12]}"


def _staged_overrides(recipe: Recipe) -> tuple[str, ...]:
    stage = os.environ.get(_STAGE)
    if not stage:
        return ()
    for key, model in recipe.model_names().items():
        if not Path(model).is_absolute():
            raise UserError(f"{key} is {model}: {_STAGE} copies folders, so set {_MODELS} to the folder that holds it")
    return tuple(f"{key}={staged_path(Path(model), Path(stage))}" for key, model in recipe.model_names().items())


def _student_step(recipe: Recipe, nodes: JobNodes) -> StepPlan:
    student = recipe.student
    layout, per_node = student.parallel_layout, nodes.per_node.get("student", nodes.gpus)
    available = nodes.student * per_node
    if student.data_parallel is None:
        ranks = available
        if available % layout.min_world_size:
            raise UserError(
                f"the student's layout takes a multiple of {layout.min_world_size} ranks, its nodes have "
                f"{nodes.student} x {per_node}: change student.tensor_parallel, pipeline_, context_ or expert_parallel"
            )
    else:
        ranks = layout.model_parallel_size * student.data_parallel
        if ranks > available or ranks % nodes.student:
            raise UserError(
                f"the student's layout takes {ranks} ranks with student.data_parallel={student.data_parallel}, its "
                f"nodes have {nodes.student} x {per_node}"
            )
    return StepPlan("student", nodes.of("student"), ranks // nodes.student)


def _teacher_steps(recipe: Recipe, nodes: JobNodes) -> list[StepPlan]:
    """One step per replica; a replica takes part of a node or several whole nodes."""
    if not nodes.teacher:
        return []
    if recipe.teachers:
        raise UserError("nodes for the teacher require a recipe with a single teacher; it has several: use teacher=0")
    names, ranks = nodes.of("teacher"), recipe.teacher.parallel_layout.min_world_size
    span = 1 if "teacher" in nodes.per_node else -(-ranks // nodes.gpus)
    per_node = nodes.per_node.get("teacher", 0)
    if not per_node:
        fits = nodes.gpus % ranks == 0 if span == 1 else ranks % nodes.gpus == 0
        if not fits or nodes.teacher % span:
            raise UserError(
                f"a replica of the teacher takes {ranks} GPUs, its nodes have {nodes.teacher} x {nodes.gpus}, which "
                "is no multiple: change teacher.tensor_parallel, pipeline_ or expert_parallel"
            )
        per_node = nodes.gpus // ranks
    if span > 1:
        groups = [names[first : first + span] for first in range(0, len(names), span)]
        return [StepPlan(f"teacher_{i}", group, ranks // span) for i, group in enumerate(groups)]
    return _share_nodes("teacher", names, per_node, ranks, ranks if nodes.gpus else 0)


def _server_steps(recipe: Recipe, nodes: JobNodes) -> list[StepPlan]:
    if not nodes.servers:
        return []
    size = recipe.servers.tensor_parallel
    per_node = nodes.per_node.get("servers", 0)
    if not per_node:
        if nodes.gpus % size:
            raise UserError(
                f"a rollout server takes servers.tensor_parallel={size} GPUs, which does not divide the {nodes.gpus} "
                "GPUs of its node"
            )
        per_node = nodes.gpus // size
    return _share_nodes("server", nodes.of("servers"), per_node, 1, size if nodes.gpus else 0)


def _share_nodes(prefix: str, names: Sequence[str], per_node: int, tasks: int, gpus: int) -> list[StepPlan]:
    """`per_node` steps on each node, each with `gpus` of the node's GPUs (0: the node has none)."""
    places = [(name, i) for name in names for i in range(per_node)]
    return [
        StepPlan(f"{prefix}_{number}", (name,), tasks, (i * gpus, gpus) if gpus else None)
        for number, (name, i) in enumerate(places)
    ]
