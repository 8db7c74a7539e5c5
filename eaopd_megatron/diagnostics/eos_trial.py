"""One rank of `eaopd doctor RECIPE`: a handful of responses by the recipe's student, scored by its teachers.

It goes the way that training goes, rollout and teachers of any kind included, up to the objective. No run's folder is
touched: what a run would write goes to a temporary one.
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
import torch.distributed as dist

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import Recipe
from eaopd_megatron.data.sources import load_problems
from eaopd_megatron.data.types import MicroBatch, Prompt, Sample
from eaopd_megatron.diagnostics.eos_check import RESULTS_FILE, EosCheckResult, ResponseEnd
from eaopd_megatron.distributed import parallel_state as groups
from eaopd_megatron.distributed.heartbeat import heartbeat_monitor
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.forward import gather_context_parallel
from eaopd_megatron.megatron.pipeline import micro_batches_by_teacher
from eaopd_megatron.objective import TeacherHidden, TeacherTopK, linear_token_statistics, token_statistics
from eaopd_megatron.rollout.interface import GenerationRequest
from eaopd_megatron.teacher.base import TeacherSignal
from eaopd_megatron.teacher.build import open_teacher_folders
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.training.components import Components, build_components, build_prompt_builder
from eaopd_megatron.training.run_folder import RunFolder
from eaopd_megatron.utils.log import log_rank0

PROMPTS = 16
"""Of each teacher."""
TOKENS = 512
"""The longest response, where the recipe's are not shorter."""


def eos_check_on_rank(recipe: Recipe) -> None:
    """The main rank writes run.folder/FOUND."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    minutes = recipe.distributed.timeout_minutes
    parallel, store = groups.init_distributed(recipe.student.parallel_layout, seed=recipe.seed, timeout_minutes=minutes)
    with heartbeat_monitor(store, parallel.rank, parallel.world_size):
        folder = RunFolder(Path(recipe.run.folder))
        parts = build_components(recipe, parallel, folder, stop_signal=lambda: 0, log=log_rank0)
        try:
            found = eos_check_results(recipe, parts, parallel)
        finally:
            parts.rollout.close()
            parts.teachers.close()
    if parallel.is_main:
        (folder.path / RESULTS_FILE).write_text(json.dumps([asdict(agreement) for agreement in found]))
    groups.shutdown_distributed()


def eos_check_results(recipe: Recipe, parts: Components, parallel: ParallelState) -> list[EosCheckResult]:
    """Of each teacher, on every rank. Collective."""
    prompts, maps = _prompts(recipe, parts), _maps(recipe, parts.student_folder)
    mine = _ends(recipe, parts, parallel, prompts, maps)
    everything = [mine] * parallel.world_size
    dist.all_gather_object(everything, mine)
    return [
        EosCheckResult(
            name,
            options.model,
            maps[name].kind,
            maps[name].student_id,
            maps[name].teacher_id,
            sum(prompt.teacher == name for prompt in prompts),
            _limit(recipe),
            [end for ends in everything for end in ends[name]],
        )
        for name, options in recipe.named_teachers().items()
    ]


def _prompts(recipe: Recipe, parts: Components) -> list[Prompt]:
    """The first PROMPTS of each teacher."""
    problems = load_problems(recipe.data.source, recipe.data.split)
    names = list(recipe.named_teachers())
    prompts, _ = build_prompt_builder(recipe.data, parts.tokenizer, names).build(problems, recipe.data.source)
    return [p for name in names for p in islice((p for p in prompts if p.teacher == name), PROMPTS)]


def _limit(recipe: Recipe) -> int:
    return min(TOKENS, recipe.rollout.max_response_tokens)


def _maps(recipe: Recipe, student: HfFolder) -> dict[str, TerminalMap]:
    """Of each teacher."""
    return {
        name: TerminalMap.between(options.terminal_map, student.eos_ids, folder.eos_ids)
        for (name, options), folder in zip(
            recipe.named_teachers().items(), open_teacher_folders(recipe, student).values(), strict=True
        )
    }


def _ends(
    recipe: Recipe,
    parts: Components,
    parallel: ParallelState,
    prompts: Sequence[Prompt],
    maps: Mapping[str, TerminalMap],
) -> dict[str, list[ResponseEnd]]:
    """Of each teacher, those of this rank's responses that stopped, on one rank of each data-parallel copy."""
    limit, count = _limit(recipe), len(prompts)
    longest = max(len(prompt.token_ids) for prompt in prompts) + limit
    parts.rollout.open(prompts, longest)
    parts.teachers.open(longest)
    parts.rollout.update_weights(0)
    wanted = GenerationRequest(
        prompts,
        [(recipe.seed, "doctor", i) for i in range(count)],
        range(parallel.dp_rank, count, parallel.dp_size),
        replace(parts.sampling, max_new_tokens=limit),
    )
    stopped: list[Sample] = []
    for part in parts.rollout.collect(parts.rollout.submit(wanted)):
        stopped += [sample for sample in part if sample.finish_reason == "stop"]
    parts.rollout.finish_generation()
    parts.teachers.submit(stopped)
    scored = parts.teachers.wait(stopped)
    batches = micro_batches_by_teacher(scored, recipe.train.micro_batch_tokens, parallel, parts.teachers.names)
    signal_of = parts.teachers.micro_batch_signals(batches)
    found: dict[str, list[ResponseEnd]] = {name: [] for name in recipe.named_teachers()}
    for index, batch in enumerate(batches if parallel.is_last_stage else []):
        ends = _ends_of(batch, signal_of(index), parts, parallel, maps[batch.teacher])
        if parallel.reports_metrics and not parallel.cp_rank:
            found[batch.teacher] += ends
    return found


def _ends_of(
    batch: MicroBatch, signal: TeacherSignal, parts: Components, parallel: ParallelState, terminal: TerminalMap
) -> list[ResponseEnd]:
    """Of the samples of a micro-batch. Collective over the ranks of the stage."""
    labels = parts.teachers.target_ids(batch)
    shard = {"vocab_size": parts.vocab_size, "group": parallel.tp_group}
    plain = _logprob(signal, terminal.swap_ids(batch.target_ids), shard)
    mapped = (
        signal.token_logprob
        if isinstance(signal, TeacherTopK)
        else _logprob(signal, batch.target_ids if labels is None else labels, shard)
    )
    per_token = gather_context_parallel(batch, torch.stack([mapped, plain], 1), parallel)
    last = [part[-1].tolist() for part in batch.split_by_sample(per_token)]
    return [(s.response_ids[-1], *both) for s, both in zip(batch.samples, last, strict=True)]


def _logprob(signal: TeacherSignal, ids: torch.Tensor, shard: dict[str, Any]) -> torch.Tensor:
    """[n] the teacher's log-prob of ids [n]; nan where a top-k does not have it."""
    if isinstance(signal, TeacherTopK):
        listed = torch.where(signal.ids == ids[:, None], signal.logprobs, -torch.inf).amax(1)
        return listed.masked_fill(listed.isinf(), torch.nan)
    if isinstance(signal, TeacherHidden):
        return linear_token_statistics(signal.hidden, signal.head_weight, ids, **shard).logprob
    return token_statistics(signal.logits, ids, **shard).logprob
