"""A recipe's teachers, built on this rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eaopd_megatron.checkpoint.hf_folder import HfFolder, check_same_tokenizer
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config import Recipe
from eaopd_megatron.config.schema import TeacherConfig as Options
from eaopd_megatron.config.schema import teacher_key
from eaopd_megatron.distributed.parallel_state import ParallelLayout, ParallelState, num_ranks_on_rank0_host
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.layers import require_fp8_support
from eaopd_megatron.megatron.model import DTYPES, ModelChunks, build_model
from eaopd_megatron.models.supported import check_supported, colocated_layouts
from eaopd_megatron.teacher.base import TeacherModel
from eaopd_megatron.teacher.colocated import ColocatedTeacher
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.protocol import build_teacher_info
from eaopd_megatron.teacher.remote import RemoteTeacher, load_teacher_head
from eaopd_megatron.teacher.replicas import TeacherReplicas
from eaopd_megatron.teacher.router import TeacherRouter
from eaopd_megatron.teacher.separate import SeparateBackend
from eaopd_megatron.teacher.served import ServedBackend


def open_teacher_folders(recipe: Recipe, student: HfFolder) -> dict[str, HfFolder]:
    """Each teacher's folder by its name. Raises UserError for one that is not there or has another tokenizer."""
    folders = {}
    for name, options in recipe.named_teachers().items():
        key = teacher_key(name)
        if options.precision == "fp8" and options.placement == "colocated":
            require_fp8_support(f"{key}.precision")
        folders[name] = HfFolder.open(options.model, f"{key}.model")
        check_same_tokenizer(folders[name], student)
    return folders


def model_layouts(layout: ParallelLayout, models: Sequence[HfFolder]) -> list[ParallelLayout]:
    """The layout of each model on the same ranks: expert parallelism is that of those that have experts."""
    return colocated_layouts(layout, [folder.family.has_experts for folder in models])


@dataclass(frozen=True)
class TeacherContext:
    """What all teachers of a run have in common. layouts: of those that are colocated. vocab_size: that all models
    have. logs: folder of the logs of replicas that are started here. asked: the number of a signal that asks the run
    to stop, or 0."""

    recipe: Recipe
    parallel: ParallelState
    student_folder: HfFolder
    teacher_folders: Mapping[str, HfFolder]
    layouts: Mapping[str, ParallelLayout]
    vocab_size: int
    logs: Path
    stop_signal: Callable[[], int]
    report: Callable[[str], None]


def build_teachers(context: TeacherContext) -> TeacherRouter:
    """Every teacher of the recipe. Raises UserError."""
    named: dict[str, TeacherModel] = {}
    beside = num_ranks_on_rank0_host(context.parallel)
    gpus = _first_gpus(context.recipe, beside)
    for name, options in context.recipe.named_teachers().items():
        terminal = TerminalMap.between(
            options.terminal_map, context.student_folder.eos_ids, context.teacher_folders[name].eos_ids
        )
        _check_label(context.recipe, name, terminal)
        if options.launched_by_trainer and beside != context.parallel.world_size:
            raise UserError(
                f"{teacher_key(name)}.placement={options.placement} starts replicas on the first rank's host, where "
                f"{beside} of the {context.parallel.world_size} ranks are, and others cannot reach them: start them "
                f"elsewhere and give {teacher_key(name)}.urls"
            )
        if options.placement == "colocated":
            named[name] = _colocated(context, name, options, terminal)
        elif options.placement == "separate":
            named[name] = _separate(context, name, options, terminal, gpus[name])
        else:
            named[name] = _served(context, name, options, terminal, gpus[name])
    return TeacherRouter(named)


def _check_label(recipe: Recipe, name: str, terminal: TerminalMap) -> None:
    """label leaves the teacher's distribution as it is: terms over the whole vocabulary would punish the student's end,
    whose looked-up log-prob looks well."""
    settings = recipe.objective.build_objective()
    exact = [key for key in ("reverse_kl", "forward_kl") if getattr(settings, key) == "exact"]
    if terminal.kind == "label" and exact:
        raise UserError(
            f"{teacher_key(name)}.terminal_map=label looks up the sampled token alone, and objective.{exact[0]}=exact "
            f"compares all: the student, which ends with {terminal.student_id}, the teacher with "
            f"{terminal.teacher_id}, would unlearn to stop; set {teacher_key(name)}.terminal_map=swap"
        )


def _first_gpus(recipe: Recipe, ranks: int) -> dict[str, int]:
    """The first GPU of each teacher's replicas that are started on the main rank's host: after the ranks' own, those of
    the rollout's servers, and those of the teachers before it. ranks: on that host."""
    free = ranks
    servers = recipe.servers
    if recipe.rollout.engine == "sglang" and servers.launched_by_trainer and servers.placement == "separate":
        free += servers.count * servers.tensor_parallel
    found = {}
    for name, options in recipe.named_teachers().items():
        found[name] = free
        free += options.replicas * options.parallel_layout.min_world_size if options.launched_by_trainer else 0
    return found


def _colocated(context: TeacherContext, name: str, options: Options, terminal: TerminalMap) -> TeacherModel:
    model = _colocated_model(
        options,
        context.parallel,
        context.student_folder,
        context.teacher_folders[name],
        context.layouts[name],
        terminal,
    )
    return ColocatedTeacher(
        model,
        context.parallel,
        vocab_size=context.vocab_size,
        signal=context.recipe.resolve_signal(options),
        top_k=_top_k(context),
        terminal=terminal,
        budget=context.recipe.train.micro_batch_tokens,
        offload=options.offload == "weights",
    )


def _separate(
    context: TeacherContext, name: str, options: Options, terminal: TerminalMap, first_gpu: int
) -> TeacherModel:
    recipe, parallel, folder = context.recipe, context.parallel, context.teacher_folders[name]
    wanted = build_teacher_info(recipe, options, context.student_folder, folder)
    if wanted.signal == "topk" and wanted.vocab_size > context.vocab_size:  # it knows of no other teacher
        raise UserError(
            f"{teacher_key(name)}.signal=topk is made of {wanted.vocab_size} tokens, and another teacher's vocabulary "
            f"has {context.vocab_size}: set {teacher_key(name)}.signal=hidden, of which the student's ranks take what "
            "all have"
        )
    source = SeparateBackend(
        wanted,
        budget=recipe.train.micro_batch_tokens,
        terminal=terminal,
        connections=options.max_concurrent_requests,
        config_key=teacher_key(name),
    )
    head = None
    if wanted.signal == "hidden":
        head = load_teacher_head(
            folder,
            parallel,
            student_rows=context.student_folder.vocab_size,
            vocab_size=context.vocab_size,
            precision=options.precision,
            terminal=terminal,
        )
    return RemoteTeacher(
        parallel,
        source,
        payload_format=wanted.payload_format,
        head=head,
        terminal=terminal,
        replicas=_replicas(context, name, options, first_gpu),
        options=options,
        stop_signal=context.stop_signal,
        report=context.report,
    )


def _served(
    context: TeacherContext, name: str, options: Options, terminal: TerminalMap, first_gpu: int
) -> TeacherModel:
    source = ServedBackend(
        context.teacher_folders[name],
        vocab_size=context.vocab_size,
        k=_top_k(context),
        terminal=terminal,
        max_running=options.max_concurrent_requests,
        config_key=teacher_key(name),
    )
    return RemoteTeacher(
        context.parallel,
        source,
        payload_format=source.payload_format,
        head=None,
        terminal=terminal,
        replicas=_replicas(context, name, options, first_gpu),
        options=options,
        stop_signal=context.stop_signal,
        report=context.report,
    )


def _top_k(context: TeacherContext) -> int:
    return min(context.recipe.objective.build_objective().top_k, context.vocab_size)


def _replicas(context: TeacherContext, name: str, options: Options, first_gpu: int) -> TeacherReplicas | None:
    """On the main rank, where the trainer starts them."""
    if not (options.launched_by_trainer and context.parallel.is_main):
        return None
    return TeacherReplicas(context.recipe, name, context.logs, first_gpu=first_gpu, report=context.report)


def _colocated_model(
    options: Options,
    parallel: ParallelState,
    student: HfFolder,
    folder: HfFolder,
    layout: ParallelLayout,
    terminal: TerminalMap,
) -> ModelChunks:
    """Its output layer has the student's rows and shards: the objective takes both models' logits side by side."""
    check_supported(folder.config, layout, f"{folder.name}: {options.model}")
    row_map = terminal.row_map()
    model = build_model(
        folder.config,
        layout,
        DTYPES[options.precision],
        untie=row_map is not None,
        output_vocab=student.vocab_size,
        fp8=options.precision == "fp8",
    )
    load_hf(model, folder, parallel, row_map=row_map)
    return model
