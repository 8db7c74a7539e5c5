"""One rank of `eaopd doctor RECIPE`: the student generates a few responses, which its teachers score.

Uses the training's components (rollout engine, teachers) up to the objective, in a temporary run folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from eaopd_megatron.config import Recipe
from eaopd_megatron.data.sources import load_problems
from eaopd_megatron.data.types import MicroBatch, Prompt, Sample
from eaopd_megatron.diagnostics.eos_check import RESULTS_FILE, EosCheckResult, ResponseEnd
from eaopd_megatron.distributed import parallel_state as groups
from eaopd_megatron.distributed.heartbeat import heartbeat_monitor
from eaopd_megatron.distributed.parallel_state import ParallelState, gather_objects
from eaopd_megatron.megatron.forward import gather_context_parallel
from eaopd_megatron.megatron.pipeline import micro_batches_by_teacher
from eaopd_megatron.models.supported import check_context
from eaopd_megatron.objective import TeacherHidden, TeacherTopK, linear_token_statistics, token_statistics
from eaopd_megatron.rollout.interface import GenerationRequest
from eaopd_megatron.teacher.base import TeacherSignal
from eaopd_megatron.teacher.build import open_teacher_folders
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.training.components import Components, build_components, build_prompt_builder
from eaopd_megatron.training.run_folder import RunFolder
from eaopd_megatron.utils.log import log_rank0

PROMPTS = 16
"""Prompts per teacher."""
_MAX_RESPONSE_TOKENS = 512
"""Maximum response length in tokens, unless the recipe's is shorter."""


def eos_check_on_rank(recipe: Recipe) -> None:
    """Run the check on this rank; the main rank writes RESULTS_FILE into the run's folder."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    minutes = recipe.distributed.timeout_minutes
    parallel, store = groups.init_distributed(recipe.student.parallel_layout, seed=recipe.seed, timeout_minutes=minutes)
    with heartbeat_monitor(store, parallel.rank, parallel.world_size):
        folder = RunFolder(Path(recipe.run.folder))
        components = build_components(recipe, parallel, folder, stop_signal=lambda: 0, log=log_rank0)
        try:
            results = eos_check_results(recipe, components, parallel)
        finally:
            components.rollout.close()
            components.teachers.close()
    if parallel.is_main:
        (folder.path / RESULTS_FILE).write_text(json.dumps([asdict(result) for result in results]))
    groups.shutdown_distributed()


def eos_check_results(recipe: Recipe, components: Components, parallel: ParallelState) -> list[EosCheckResult]:
    """Return the result of each teacher, equal on every rank. Collective."""
    prompts, student = _prompts(recipe, components), components.student_folder
    folders = open_teacher_folders(recipe, student)
    maps = {
        name: TerminalMap.of_folders(config, student, folders[name]) for name, config in recipe.named_teachers().items()
    }
    local = _response_ends(recipe, components, parallel, prompts, maps)
    gathered = gather_objects(local, parallel.world_size)
    return [
        EosCheckResult(
            name,
            options.model,
            maps[name].kind,
            maps[name].student_id,
            maps[name].teacher_id,
            sum(prompt.teacher == name for prompt in prompts),
            _limit(recipe),
            [end for ends in gathered for end in ends[name]],
        )
        for name, options in recipe.named_teachers().items()
    ]


def _prompts(recipe: Recipe, components: Components) -> list[Prompt]:
    """Return the first PROMPTS prompts of each teacher."""
    problems = load_problems(recipe.data.source, recipe.data.split)
    names = list(recipe.named_teachers())
    prompts, _ = build_prompt_builder(recipe.data, components.tokenizer, names).build(problems, recipe.data.source)
    return [p for name in names for p in islice((p for p in prompts if p.teacher == name), PROMPTS)]


def _limit(recipe: Recipe) -> int:
    return min(_MAX_RESPONSE_TOKENS, recipe.rollout.max_response_tokens)


def _response_ends(
    recipe: Recipe,
    components: Components,
    parallel: ParallelState,
    prompts: Sequence[Prompt],
    maps: Mapping[str, TerminalMap],
) -> dict[str, list[ResponseEnd]]:
    """Generate, score and return the ends of this rank's responses that stopped, by teacher.

    Of the ranks of a data-parallel replica only one has any.
    """
    limit, count = _limit(recipe), len(prompts)
    longest_prompt = max(len(prompt.token_ids) for prompt in prompts)
    check_context(recipe, components.positions, longest_prompt)
    longest = longest_prompt + limit
    components.rollout.open(prompts, longest)
    components.teachers.open(longest)
    components.rollout.update_weights(0)
    request = GenerationRequest(
        prompts,
        [(recipe.seed, "doctor", i) for i in range(count)],
        range(parallel.dp_rank, count, parallel.dp_size),
        replace(components.sampling, max_new_tokens=limit),
    )
    stopped: list[Sample] = []
    for part in components.rollout.collect(components.rollout.submit(request)):
        stopped += [sample for sample in part if sample.finish_reason == "stop"]
    components.rollout.finish_generation()
    components.teachers.submit(stopped)
    scored = components.teachers.wait(stopped)
    batches = micro_batches_by_teacher(scored, recipe.train.micro_batch_tokens, parallel, components.teachers.names)
    signal_of = components.teachers.micro_batch_signals(batches)
    ends_by_teacher: dict[str, list[ResponseEnd]] = {name: [] for name in recipe.named_teachers()}
    for index, batch in enumerate(batches if parallel.is_last_stage else []):
        ends = _micro_batch_ends(batch, signal_of(index), components, parallel, maps[batch.teacher])
        if parallel.reports_metrics and not parallel.cp_rank:
            ends_by_teacher[batch.teacher] += ends
    return ends_by_teacher


def _micro_batch_ends(
    batch: MicroBatch, signal: TeacherSignal, components: Components, parallel: ParallelState, terminal: TerminalMap
) -> list[ResponseEnd]:
    """Return the ends of a micro-batch's samples. Collective over the ranks of the last pipeline stage."""
    ids = components.teachers.target_ids(batch)
    shard = {"vocab_size": components.vocab_size, "group": parallel.tp_group}
    plain = _logprob(signal, terminal.swap_ids(batch.target_ids), shard)
    ids = batch.target_ids if ids is None else ids
    mapped = signal.token_logprob if isinstance(signal, TeacherTopK) else _logprob(signal, ids, shard)
    per_token = gather_context_parallel(batch, torch.stack([mapped, plain], 1), parallel)
    last = [part[-1].tolist() for part in batch.split_by_sample(per_token)]
    return [(s.response_ids[-1], *both) for s, both in zip(batch.samples, last, strict=True)]


def _logprob(signal: TeacherSignal, ids: torch.Tensor, shard: dict[str, Any]) -> torch.Tensor:
    """Return the teacher's log-probs (nats) of ids [n]: [n], nan for ids outside the top-k."""
    if isinstance(signal, TeacherTopK):
        listed = torch.where(signal.ids == ids[:, None], signal.logprobs, -torch.inf).amax(1)
        return listed.masked_fill(listed.isinf(), torch.nan)
    if isinstance(signal, TeacherHidden):
        return linear_token_statistics(signal.hidden, signal.head_weight, ids, **shard).logprob
    return token_statistics(signal.logits, ids, **shard).logprob
