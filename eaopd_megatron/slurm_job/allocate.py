"""Which nodes and GPUs a recipe's roles take in a job, said to the job's script as bash assignments."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eaopd_megatron.config import Recipe, load_recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.slurm_job import ROLES
from eaopd_megatron.slurm_job.services import staged
from eaopd_megatron.training.run_folder import finished_message

SHARED, MODELS, STAGE = "EAOPD_SHARED", "EAOPD_MODELS", "EAOPD_STAGE"


@dataclass(frozen=True)
class Nodes:
    """What the job has. Roles of zero nodes have none of their own: the recipe says where they are."""

    student: int
    teacher: int
    servers: int
    gpus: int  # a node's; 0: none, and `per_node` says what a node carries
    allocated: int
    per_node: Mapping[str, int]  # of a role's ranks or services, where the site says it

    def check(self) -> None:
        """Raises UserError where the job has other nodes than the roles take."""
        wanted = self.student + self.teacher + self.servers
        if wanted != self.allocated:
            said = ", ".join(f"{role} {getattr(self, role)}" for role in ROLES)
            raise UserError(
                f"the script's roles take {wanted} nodes ({said}), the job has {self.allocated}: make #SBATCH --nodes "
                "their sum"
            )
        if not self.gpus and not self.per_node:
            raise UserError(
                "the job's nodes have no GPUs: ask for them with #SBATCH --gpus-per-node, or name what a node carries "
                "with EAOPD_RANKS_PER_NODE"
            )


@dataclass(frozen=True)
class Arrangement:
    """tasks: of a step, a node."""

    folder: Path  # the run's
    student_tasks: int
    teacher_replicas: int
    teacher_tasks: int
    teacher_nodes: int  # that one replica takes
    servers: int
    server_gpus: int
    models: tuple[str, ...]  # folders, or hub ids, that every node must see
    staged: tuple[str, ...]  # overrides that name the models' copies on the nodes' own disks
    overrides: tuple[str, ...]
    finished: str = ""

    def assignments(self) -> str:
        """Bash that sets `arranged_<field>`, the tuples as arrays."""
        return "\n".join(f"arranged_{name}={_quoted(value)}" for name, value in vars(self).items())


def _quoted(value: object) -> str:
    if isinstance(value, tuple):
        return f"({' '.join(map(shlex.quote, value))})"
    return shlex.quote(str(value))


def arrange(recipe: str, overrides: Sequence[str], nodes: Nodes) -> Arrangement:
    """How the job's nodes carry the recipe. Raises UserError where they cannot.

    The user's overrides win over the roles' (a teacher and servers of their own); what they name is then found at the
    site: the run in the shared folder, models in the folder of models.
    """
    nodes.check()
    roles = (nodes.teacher, "teacher.placement=separate"), (nodes.servers, "rollout.engine=sglang")
    overrides = [*(override for count, override in roles if count), *overrides]
    named = load_recipe(recipe, overrides)
    found = {key: _found(key, model) for key, model in _models(named).items()}
    found["run.folder"] = str(Path(os.environ.get(SHARED) or ".").absolute() / named.run.folder)
    overrides += [f"{key}={value}" for key, value in found.items()]
    loaded = load_recipe(recipe, overrides)
    replicas, tasks, each = _teachers(loaded, nodes)
    return Arrangement(
        folder=Path(loaded.run.folder),
        student_tasks=_student_tasks(loaded, nodes),
        teacher_replicas=replicas,
        teacher_tasks=tasks,
        teacher_nodes=each,
        servers=_servers(loaded, nodes),
        server_gpus=loaded.servers.tensor_parallel,
        models=tuple(dict.fromkeys(_models(loaded).values())),
        staged=_staged(loaded),
        overrides=tuple(overrides),
        finished=finished_message(loaded) or "",
    )


def _models(recipe: Recipe) -> dict[str, str]:
    found = {"student.model": recipe.student.model}
    for name, teacher in recipe.named_teachers().items():
        found[f"teachers.{name}.model" if name else "teacher.model"] = teacher.model
    return found


def _found(key: str, model: str, environment: Mapping[str, str] = os.environ) -> str:
    """A hub id as the folder that the site has of it. Raises UserError where it has none."""
    models = environment.get(MODELS)
    if not models or Path(model).is_absolute():
        return model
    places = [Path(models) / model, Path(models) / Path(model).name]
    for place in places:
        if (place / "config.json").exists():
            return str(place)
    raise UserError(f"{key} is {model}, but {MODELS} has neither {places[0]} nor {places[1]} (with a config.json)")


def _staged(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    stage = environment.get(STAGE)
    if not stage:
        return ()
    for key, model in _models(recipe).items():
        if not Path(model).is_absolute():
            raise UserError(f"{key} is {model}: {STAGE} copies folders, so set {MODELS} to where it lies")
    return tuple(f"{key}={staged(Path(model), Path(stage))}" for key, model in _models(recipe).items())


def _student_tasks(recipe: Recipe, nodes: Nodes) -> int:
    """Ranks on each of the student's nodes."""
    student = recipe.student
    layout, each = student.parallel_layout, nodes.per_node.get("student", nodes.gpus)
    there = nodes.student * each
    if student.data_parallel is None:
        ranks = there
        if there % layout.min_world_size:
            raise UserError(
                f"the student's layout takes a multiple of {layout.min_world_size} ranks, its nodes carry "
                f"{nodes.student} x {each}: change student.tensor_parallel, pipeline_, context_ or expert_parallel"
            )
    else:
        ranks = layout.model_parallel_size * student.data_parallel
        if ranks > there or ranks % nodes.student:
            raise UserError(
                f"the student's layout takes {ranks} ranks with student.data_parallel={student.data_parallel}, its "
                f"nodes carry {nodes.student} x {each}"
            )
    return ranks // nodes.student


def _teachers(recipe: Recipe, nodes: Nodes) -> tuple[int, int, int]:
    """(replicas, tasks a node, nodes a replica) of a teacher with nodes of its own."""
    if not nodes.teacher:
        return 0, 0, 0
    if recipe.teachers:
        raise UserError("the recipe has several teachers; nodes of its own are for a recipe with one: use teacher=0")
    ranks = recipe.teacher.parallel_layout.min_world_size
    if "teacher" in nodes.per_node:
        return nodes.teacher * nodes.per_node["teacher"], ranks, 1
    each = -(-ranks // nodes.gpus)
    if (each == 1 and nodes.gpus % ranks) or (each > 1 and ranks % nodes.gpus) or nodes.teacher % each:
        raise UserError(
            f"a replica of the teacher takes {ranks} GPUs, its nodes have {nodes.teacher} x {nodes.gpus}, which that "
            "does not divide: change teacher.tensor_parallel, pipeline_ or expert_parallel"
        )
    replicas = nodes.teacher // each if each > 1 else nodes.teacher * (nodes.gpus // ranks)
    return replicas, ranks // each, each


def _servers(recipe: Recipe, nodes: Nodes) -> int:
    """SGLang servers on each of their nodes."""
    if not nodes.servers:
        return 0
    if "servers" in nodes.per_node:
        return nodes.per_node["servers"]
    size = recipe.servers.tensor_parallel
    if nodes.gpus % size:
        raise UserError(
            f"a rollout server takes servers.tensor_parallel={size} GPUs, which does not divide the {nodes.gpus} of "
            "its node"
        )
    return nodes.gpus // size
