"""Build the teachers of a recipe on this rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaopd_megatron.checkpoint.hf_folder import HfFolder, check_same_tokenizer
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config import Recipe
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.config.schema import TeacherConfig, teacher_key
from eaopd_megatron.distributed.parallel_state import ParallelState, num_ranks_on_rank0_host
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.layers import require_fp8_support
from eaopd_megatron.megatron.model import DTYPES, build_model
from eaopd_megatron.models.supported import check_supported, colocated_layouts
from eaopd_megatron.teacher.base import TeacherModel, TeacherRouter
from eaopd_megatron.teacher.colocated import ColocatedTeacher
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.protocol import build_teacher_info
from eaopd_megatron.teacher.remote import RemoteTeacher, ScoringBackend, load_teacher_head
from eaopd_megatron.teacher.replicas import TeacherReplicas
from eaopd_megatron.teacher.separate import SeparateBackend
from eaopd_megatron.teacher.served import ServedBackend


def open_teacher_folders(recipe: Recipe, student: HfFolder) -> dict[str, HfFolder]:
    """Return each teacher's folder by its name. Raises UserError for a missing one and for another tokenizer."""
    folders = {}
    for name, config in recipe.named_teachers().items():
        key = teacher_key(name)
        if config.precision == "fp8" and config.placement == "colocated":
            require_fp8_support(f"{key}.precision")
        folders[name] = HfFolder.open(config.model, f"{key}.model")
        check_same_tokenizer(folders[name], student, allowed=config.tokenizer_check)
    return folders


def model_layouts(layout: ParallelLayout, models: Sequence[HfFolder]) -> list[ParallelLayout]:
    """Return each model's layout on the same ranks: dense models have no expert parallelism beside one with experts."""
    return colocated_layouts(layout, [folder.family.has_experts for folder in models])


@dataclass(frozen=True)
class TeacherContext:
    """What all teachers of a run share."""

    recipe: Recipe
    parallel: ParallelState
    student_folder: HfFolder
    teacher_folders: Mapping[str, HfFolder]
    layouts: Mapping[str, ParallelLayout]  # of the colocated teachers
    vocab_size: int  # ids that all models have
    logs: Path  # folder for the logs of replicas that are started here
    stop_signal: Callable[[], int]  # number of the signal that asks the run to stop, or 0
    report: Callable[[str], None]
    failures: Path | None = None  # folder for the samples of refused answers

    @property
    def top_k(self) -> int:
        return min(self.recipe.objective.build_objective().top_k, self.vocab_size)


def build_teachers(context: TeacherContext) -> TeacherRouter:
    """Return all teachers of the recipe. Raises UserError."""
    teachers: dict[str, TeacherModel] = {}
    local_ranks = num_ranks_on_rank0_host(context.parallel)
    gpus = _first_gpus(context.recipe, local_ranks)
    for name, config in context.recipe.named_teachers().items():
        key, student, folder = teacher_key(name), context.student_folder, context.teacher_folders[name]
        terminal = TerminalMap.of_folders(config, student, folder)
        _check_label_map(context.recipe, key, terminal)
        if terminal.masked_ids and context.recipe.objective.build_objective().reverse_kl == "exact":
            raise UserError(
                f"{key}.tokenizer_check=shared gives {len(terminal.masked_ids)} ids no probability, from which "
                "objective.reverse_kl=exact is infinitely far; set objective.reverse_kl=sampled"
            )
        if config.launched_by_trainer and local_ranks != context.parallel.world_size:
            raise UserError(
                f"{key}.placement={config.placement} starts replicas on the first rank's host, where {local_ranks} of "
                f"the {context.parallel.world_size} ranks are, and the others cannot reach them: start the replicas "
                f"elsewhere and give {key}.urls"
            )
        if config.placement == "colocated":
            teachers[name] = _colocated(context, name, config, terminal)
        else:
            teachers[name] = _remote(context, name, config, terminal, gpus[name])
    return TeacherRouter(teachers)


def _check_label_map(recipe: Recipe, key: str, terminal: TerminalMap) -> None:
    """Refuse terminal_map=label with an exact term: it leaves the teacher's distribution as it is, so such a term would
    punish the student's stop, while the looked-up log-prob of the stop looks fine."""
    objective = recipe.objective.build_objective()
    exact = [term for term in ("reverse_kl", "forward_kl") if getattr(objective, term) == "exact"]
    if terminal.kind == "label" and exact:
        raise UserError(
            f"{key}.terminal_map=label maps only the sampled token, and objective.{exact[0]}=exact compares all of "
            f"them: the student, which ends with {terminal.student_id} (the teacher with {terminal.teacher_id}), would "
            f"unlearn to stop; set {key}.terminal_map=swap"
        )


def _first_gpus(recipe: Recipe, local_ranks: int) -> dict[str, int]:
    """Return the first GPU of each teacher's replicas on the main rank's host: after those of the ranks there, of the
    rollout servers, and of the teachers before it."""
    free = local_ranks
    servers = recipe.servers
    if recipe.rollout.engine == "sglang" and servers.launched_by_trainer and servers.placement == "separate":
        free += servers.count * servers.tensor_parallel
    first = {}
    for name, config in recipe.named_teachers().items():
        first[name] = free
        free += config.replicas * config.parallel_layout.min_world_size if config.launched_by_trainer else 0
    return first


def _colocated(context: TeacherContext, name: str, config: TeacherConfig, terminal: TerminalMap) -> TeacherModel:
    """Load a model whose output layer has the student's rows and shards: the objective reads both models' logits side
    by side."""
    folder, layout = context.teacher_folders[name], context.layouts[name]
    check_supported(folder.config, layout, f"{folder.name}: {config.model}")
    row_map = terminal.row_map()
    model = build_model(
        folder.config,
        layout,
        DTYPES[config.precision],
        untie=row_map is not None,
        output_vocab=context.student_folder.vocab_size,
        fp8=config.precision == "fp8",
    )
    load_hf(model, folder, context.parallel, row_map=row_map)
    return ColocatedTeacher(
        model,
        context.parallel,
        vocab_size=context.vocab_size,
        signal=context.recipe.resolve_signal(config),
        top_k=context.top_k,
        terminal=terminal,
        micro_batch_tokens=context.recipe.train.micro_batch_tokens,
        offload=config.offload == "weights",
    )


def _remote(
    context: TeacherContext, name: str, config: TeacherConfig, terminal: TerminalMap, first_gpu: int
) -> TeacherModel:
    head, replicas = None, None
    if context.recipe.resolve_signal(config) == "hidden":
        head = load_teacher_head(
            context.teacher_folders[name],
            context.parallel,
            student_rows=context.student_folder.vocab_size,
            vocab_size=context.vocab_size,
            precision=config.precision,
            terminal=terminal,
        )
    if config.launched_by_trainer and context.parallel.is_main:
        replicas = TeacherReplicas(context.recipe, name, context.logs, first_gpu=first_gpu, report=context.report)
    return RemoteTeacher(
        context.parallel,
        _scoring_backend(context, name, config, terminal),
        config,
        head=head,
        replicas=replicas,
        failures=context.failures,
        stop_signal=context.stop_signal,
        report=context.report,
    )


def _scoring_backend(
    context: TeacherContext, name: str, config: TeacherConfig, terminal: TerminalMap
) -> ScoringBackend[Any, Any]:
    """Raises UserError if a separate teacher's top-k may hold ids that another teacher of the run lacks."""
    key, folder = teacher_key(name), context.teacher_folders[name]
    if config.placement == "served":
        return ServedBackend(
            folder,
            vocab_size=context.vocab_size,
            k=context.top_k,
            terminal=terminal,
            connections=config.max_concurrent_requests,
            config_key=key,
        )
    expected = build_teacher_info(context.recipe, config, context.student_folder, folder, terminal)
    if expected.signal == "topk" and expected.vocab_size > context.vocab_size:
        raise UserError(
            f"{key}.signal=topk is computed over {expected.vocab_size} tokens, and another teacher's vocabulary has "
            f"{context.vocab_size}: set {key}.signal=hidden, of which the student's ranks use the shared tokens"
        )
    return SeparateBackend(
        expected,
        budget=context.recipe.train.micro_batch_tokens,
        terminal=terminal,
        connections=config.max_concurrent_requests,
        config_key=key,
    )
