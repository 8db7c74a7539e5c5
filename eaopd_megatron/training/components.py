"""Build the models, optimizer, teachers, rollout engine, data and evaluation of a recipe on this rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaopd_megatron.checkpoint.hf_folder import HfFolder, common_vocab_size
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config import Recipe
from eaopd_megatron.config.schema import DataConfig
from eaopd_megatron.data.prompts import PromptBuilder
from eaopd_megatron.data.sources import (
    Decontamination,
    FieldNames,
    Problem,
    load_problems,
    summarise_matches,
    write_decontamination_report,
)
from eaopd_megatron.data.types import SamplingParams
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.benchmarks import load_benchmark, sources_by_name
from eaopd_megatron.evaluation.generate import check_length
from eaopd_megatron.evaluation.runner import Benchmark, Evaluator
from eaopd_megatron.megatron import optimizer as megatron_optimizer
from eaopd_megatron.megatron.layers import attention_in_use
from eaopd_megatron.megatron.model import DTYPES, ModelChunks, build_model
from eaopd_megatron.megatron.offload import TrainerMemory
from eaopd_megatron.models.supported import check_supported
from eaopd_megatron.rollout.interface import RolloutEngine
from eaopd_megatron.rollout.local import LocalRollout
from eaopd_megatron.rollout.sglang.served_rollout import ServedRollout, ServedRolloutContext
from eaopd_megatron.teacher.base import TeacherRouter
from eaopd_megatron.teacher.build import TeacherContext, build_teachers, model_layouts, open_teacher_folders
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.training.run_folder import RunFolder
from eaopd_megatron.training.step import StudentTrainer


def load_training_problems(data: DataConfig, report: Path | None, log: Callable[[str], None]) -> list[Problem]:
    """Return the problems of `data.source` in order, without those that `data.decontaminate` matches.

    report: file listing the removed problems; None on ranks that do not write it. Raises UserError if none is left.
    """
    names = FieldNames(problem=data.prompt_field)
    problems = load_problems(data.source, data.split, names, text_field=data.prompt_field)
    if not data.decontaminate:
        return problems
    benchmarks = {name: load_benchmark(name) for name in data.decontaminate}
    clean, matches = Decontamination(benchmarks, data.decontaminate_ngram).clean(problems)
    log(
        f"{len(matches)} of {len(problems)} training problems are evaluation problems too: {summarise_matches(matches)}"
    )
    if report is not None:
        write_decontamination_report(report, matches, problems=len(problems), ngram=data.decontaminate_ngram)
    if not clean:
        raise UserError(f"data.decontaminate leaves nothing of {data.source}: name other benchmarks")
    return clean


@dataclass(frozen=True)
class Components:
    """The parts of a run on this rank."""

    student_folder: HfFolder
    vocab_size: int  # shared by student and teachers
    tokenizer: Any
    model: ModelChunks
    student: StudentTrainer
    teachers: TeacherRouter
    rollout: RolloutEngine
    sampling: SamplingParams
    evaluator: Evaluator
    masked_ids: list[int]  # that a teacher's tokenizer has for other tokens
    folders: dict[str, HfFolder]  # of student and teachers, by their key in the recipe

    @property
    def positions(self) -> dict[str, int]:
        """`HfFolder.max_positions` by the model's key."""
        return {key: folder.max_positions for key, folder in self.folders.items()}


def build_components(
    recipe: Recipe,
    parallel: ParallelState,
    folder: RunFolder,
    *,
    stop_signal: Callable[[], int],
    log: Callable[[str], None],
) -> Components:
    """Build everything but the prompts and the progress of the run.

    stop_signal: returns the number of a received signal that asks the run to stop, or 0.
    Raises UserError if student and teacher do not fit together.
    """
    student_folder = HfFolder.open(recipe.student.model, "student.model")
    teacher_folders = open_teacher_folders(recipe, student_folder)
    colocated = [name for name, one in recipe.named_teachers().items() if one.placement == "colocated"]
    student_layout, *others = model_layouts(parallel.layout, [student_folder, *(teacher_folders[n] for n in colocated)])
    check_supported(student_folder.config, student_layout, f"student.model: {recipe.student.model}")
    vocab_size = common_vocab_size([student_folder, *teacher_folders.values()])

    precision, options = recipe.student.precision, recipe.optimizer
    model = build_model(student_folder.config, student_layout, DTYPES[precision], recompute=recipe.student.recompute)
    load_hf(model, student_folder, parallel)
    log(attention_in_use(model.config))
    layouts = dict(zip(colocated, others, strict=True))
    teachers = build_teachers(
        TeacherContext(
            recipe,
            parallel,
            student_folder,
            teacher_folders,
            layouts,
            vocab_size,
            logs=folder.teachers,
            stop_signal=stop_signal,
            report=log,
            failures=folder.failures,
        )
    )

    ddp = megatron_optimizer.wrap_ddp(model, distributed=options.distributed, overlap=options.overlap)
    optimizer = megatron_optimizer.build_optimizer(ddp, options)
    student = StudentTrainer(
        ddp,
        optimizer,
        parallel,
        vocab_size=vocab_size,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
        failures_folder=folder.failures,
    )
    terminals = {
        name: TerminalMap.of_folders(one, student_folder, teacher_folders[name])
        for name, one in recipe.named_teachers().items()
    }
    masked_ids = sorted({token for terminal in terminals.values() for token in terminal.masked_ids})
    if masked_ids:
        log(f"{len(masked_ids)} ids are other tokens in a teacher's tokenizer and left out: {masked_ids[:8]}")
    rollout: RolloutEngine
    if recipe.rollout.engine == "local":
        rollout = LocalRollout(
            model,
            parallel,
            vocab_size=vocab_size,
            batch_size=recipe.rollout.batch_size,
            stop_signal=stop_signal,
            masked_ids=masked_ids,
        )
    else:
        context = ServedRolloutContext(
            vocab_size=vocab_size,
            batch_tokens=recipe.train.micro_batch_tokens,
            precision=recipe.student.precision,
            logs=folder.servers,
            scratch=folder.weights,
            compute_logprobs=student.logprobs,
            stop_signal=stop_signal,
            report=log,
            masked_ids=masked_ids,
        )
        memory = TrainerMemory(ddp, optimizer)
        rollout = ServedRollout(recipe.servers, recipe.weight_sync, context, parallel, model, student_folder, memory)
    eos_ids = [folder.eos_ids for folder in (student_folder, *teacher_folders.values())]
    stop_ids = tuple(sorted({*itertools.chain(*eos_ids), *recipe.rollout.stop_token_ids}))
    if not stop_ids:
        log(
            "warning: no configuration and no tokenizer names an end token: every response is as long as "
            "rollout.max_response_tokens; name one in rollout.stop_token_ids"
        )
    tokenizer = student_folder.tokenizer()
    return Components(
        student_folder,
        vocab_size,
        tokenizer,
        model,
        student,
        teachers,
        rollout,
        SamplingParams(recipe.rollout.temperature, recipe.rollout.top_p, recipe.rollout.max_response_tokens, stop_ids),
        build_evaluator(recipe, parallel, rollout, student_folder, tokenizer, stop_ids, log),
        masked_ids,
        {folder.name: folder for folder in (student_folder, *teacher_folders.values())},
    )


def build_prompt_builder(data: DataConfig, tokenizer: Any, teachers: Sequence[str] = ("",)) -> PromptBuilder:
    """Return the builder of training prompts. teachers: names of the teachers that prompts may select."""
    return PromptBuilder(
        tokenizer,
        template=data.template,
        suffix=data.suffix,
        field=data.prompt_field,
        max_tokens=data.max_prompt_tokens,
        teachers=teachers,
        teacher_field=data.teacher_field,
    )


def build_evaluator(
    recipe: Recipe,
    parallel: ParallelState,
    rollout: RolloutEngine,
    student: HfFolder,
    tokenizer: Any,
    stop_ids: tuple[int, ...],
    log: Callable[[str], None],
) -> Evaluator:
    """Load the recipe's benchmarks, to be generated by the rollout engine.

    data.max_prompt_tokens limits training prompts only: a benchmark problem is left out only if its response does not
    fit behind it.
    """
    evaluation, positions = recipe.evaluation, student.max_positions
    builder = PromptBuilder(
        tokenizer,
        template=recipe.data.template,
        suffix=evaluation.suffix,
        field="problem",
        max_tokens=check_length(positions, evaluation.max_response_tokens, "evaluation.max_response_tokens=")
        if evaluation.benchmarks
        else positions,
        limit="the student's positions less evaluation.max_response_tokens",
    )
    return Evaluator(
        rollout,
        parallel,
        tokenizer,
        [
            Benchmark.load(source, builder, evaluation.problems, log if parallel.is_main else None)
            for source in sources_by_name(evaluation.benchmarks).values()
        ],
        evaluation.samples,
        SamplingParams(evaluation.temperature, evaluation.top_p, evaluation.max_response_tokens, stop_ids),
        evaluation.seed,
    )
