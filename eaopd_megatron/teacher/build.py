"""A recipe's teachers, built on this rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eaopd_megatron.checkpoint.hf_folder import HfFolder, check_same_tokenizer
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config import Recipe
from eaopd_megatron.config.tree import Teacher as Options
from eaopd_megatron.megatron.architecture import check_config
from eaopd_megatron.megatron.fp8 import check_fp8
from eaopd_megatron.megatron.groups import Layout, Parallel
from eaopd_megatron.megatron.model import DTYPES, ModelChunks, build_model
from eaopd_megatron.teacher.colocated import ColocatedTeacher
from eaopd_megatron.teacher.interface import Teacher
from eaopd_megatron.teacher.several import Teachers
from eaopd_megatron.teacher.terminal import TerminalMap


def open_folders(recipe: Recipe, student: HfFolder) -> dict[str, HfFolder]:
    """Each teacher's folder by its name. Raises UserError for one that is not there or has another tokenizer."""
    folders = {}
    for name, options in recipe.named_teachers().items():
        key = f"teachers.{name}" if name else "teacher"
        if options.precision == "fp8" and options.placement == "colocated":
            check_fp8(f"{key}.precision")
        folders[name] = HfFolder.open(options.model, f"{key}.model")
        check_same_tokenizer(folders[name], student)
    return folders


def layouts_of(layout: Layout, models: Sequence[HfFolder]) -> list[Layout]:
    """The layout of each model on the same ranks: expert parallelism is that of those that have experts."""
    dense = ["experts" not in folder.family.sizes(folder.config) for folder in models]
    if all(dense):  # what cannot be used is refused, not ignored
        return [layout] * len(models)
    return [layout.without_experts() if without else layout for without in dense]


def build_teachers(
    recipe: Recipe,
    parallel: Parallel,
    student: HfFolder,
    folders: Mapping[str, HfFolder],
    layouts: Mapping[str, Layout],
    vocab_size: int,
) -> Teachers:
    """Every teacher of the recipe. layouts: of those that are colocated. vocab_size: the models' common one."""
    named: dict[str, Teacher] = {}
    for name, options in recipe.named_teachers().items():
        terminal = TerminalMap.between(options.terminal_map, student.eos_ids, folders[name].eos_ids)
        model = _colocated_model(options, parallel, student, folders[name], layouts[name], terminal)
        named[name] = ColocatedTeacher(
            model,
            parallel,
            vocab_size=vocab_size,
            signal=recipe.signal(options),
            top_k=min(recipe.objective.build().top_k, vocab_size),
            terminal=terminal,
            budget=recipe.train.micro_batch_tokens,
            offload=options.offload == "weights",
        )
    return Teachers(named)


def _colocated_model(
    options: Options,
    parallel: Parallel,
    student: HfFolder,
    folder: HfFolder,
    layout: Layout,
    terminal: TerminalMap,
) -> ModelChunks:
    """Its output layer has the student's rows and shards: the objective takes both models' logits side by side."""
    check_config(folder.config, layout, options.model)
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
