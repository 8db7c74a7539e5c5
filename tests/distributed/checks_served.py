"""Checks of a teacher on an SGLang server against the same teacher on the ranks themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.config.schema import TeacherConfig
from eaopd_megatron.data.countdown import EOS_ID
from eaopd_megatron.data.prompts import PromptBuilder
from eaopd_megatron.data.sources import load_problems
from eaopd_megatron.data.types import Prompt, Sample, SamplingParams
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron.model import build_model
from eaopd_megatron.megatron.pipeline import micro_batches
from eaopd_megatron.objective import Objective, TeacherTopK, TokenLosses, linear_entropy_aware_loss
from eaopd_megatron.rollout.local import LocalRollout
from eaopd_megatron.teacher.base import TeacherModel
from eaopd_megatron.teacher.colocated import ColocatedTeacher
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.remote import RemoteTeacher
from eaopd_megatron.teacher.served import ServedBackend
from tests.distributed.groups import model_parallel

MAPS_AND_K = (("none", 112), ("swap", 16), ("label", 4))
OTHER_STOP = 20
"""End token of the teacher under the maps."""
WIDTH = 8
Losses = tuple[TokenLosses, torch.Tensor, torch.Tensor]
"""Losses of a micro-batch, its hidden states [n, WIDTH] and the head."""


def responses(folder: HfFolder, parallel: ParallelState) -> list[Sample]:
    """Return this data-parallel rank's share of 24 responses, and an empty response."""
    builder = PromptBuilder(folder.tokenizer(), template="raw", suffix="", field="problem", max_tokens=64)
    prompts, _ = builder.build(load_problems("countdown", "train")[:24], "countdown")
    model = build_model(folder.config, parallel.layout, torch.float32)
    load_hf(model, folder, parallel)
    rollout = LocalRollout(model, parallel, vocab_size=folder.vocab_size, batch_size=64)
    mine = range(parallel.dp_rank, len(prompts), parallel.dp_size)
    keys: list[tuple[int | str, ...]] = [("served", i) for i in mine]
    samples = rollout.generate([prompts[i] for i in mine], keys, SamplingParams(1.0, 1.0, 16, (EOS_ID,)), 0)
    indexed = [replace(sample, index=index) for index, sample in zip(mine, samples, strict=True)]
    return [*indexed, Sample(Prompt("empty", (1, 2), {}), [], "length", [], 0, 1000 + parallel.dp_rank)]


def losses(
    teacher: TeacherModel, samples: Sequence[Sample], objective: Objective, parallel: ParallelState
) -> list[Losses]:
    """Return the losses of each micro-batch for a student with random hidden states."""
    teacher.submit(samples)
    batches = micro_batches(teacher.wait(samples), 100, parallel)
    signal_of = teacher.micro_batch_signals(batches)
    found = []
    for index, batch in enumerate(batches if parallel.is_last_stage else []):
        random = torch.Generator().manual_seed(index)
        hidden = torch.randn(len(batch.target_ids), WIDTH, generator=random).requires_grad_()
        head = torch.randn(256 // parallel.tp_size, WIDTH, generator=random.manual_seed(parallel.tp_rank))
        head.requires_grad_()
        signal = signal_of(index)
        assert isinstance(signal, TeacherTopK)
        out = linear_entropy_aware_loss(
            hidden,
            head,
            signal,
            batch.target_ids,
            None,
            teacher_tokens=teacher.target_ids(batch),
            objective=objective,
            vocab_size=112,
            group=parallel.tp_group,
        )
        found.append((out, hidden, head))
    return found


def check_a_served_teacher_says_another_loss(group: dist.ProcessGroup, student: str, teacher: str, url: str) -> None:
    """Loss and gradient equal a colocated teacher's on each token whose gate the bounds decide: on all tokens if the
    top-k is the whole vocabulary."""
    folder, teacher_folder = HfFolder.open(student), HfFolder.open(teacher)
    for layout in (ParallelLayout(2, sequence_parallel=True, context_parallel=2), ParallelLayout(pipeline_parallel=2)):
        with model_parallel(layout) as parallel:
            samples = responses(folder, parallel)
            for kind, k in MAPS_AND_K:
                terminal = TerminalMap(kind, EOS_ID, OTHER_STOP)
                row_map = terminal.row_map()
                model = build_model(teacher_folder.config, layout, torch.float32, untie=row_map is not None)
                load_hf(model, teacher_folder, parallel, row_map=row_map)
                colocated = ColocatedTeacher(
                    model, parallel, vocab_size=112, signal="topk", top_k=k, terminal=terminal, micro_batch_tokens=100
                )
                source = ServedBackend(teacher_folder, vocab_size=112, k=k, terminal=terminal, connections=4)
                served = RemoteTeacher(
                    parallel,
                    source,
                    TeacherConfig(model=teacher, placement="served", urls=[url]),
                    stop_signal=lambda: 0,
                    report=print,
                )
                served.start(64)
                served.open()
                objective = Objective.preset("eopd", top_k=k)
                try:
                    compare(
                        losses(served, samples, objective, parallel),
                        losses(colocated, samples, objective, parallel),
                        k,
                    )
                finally:
                    served.close()


def compare(found: Sequence[Losses], expected: Sequence[Losses], k: int) -> None:
    counts = torch.zeros(3)
    for (one, hidden, head), (other, other_hidden, other_head) in zip(found, expected, strict=True):
        certain = ~one.gate_ambiguous
        assert k < 112 or certain.all()
        torch.testing.assert_close(one.teacher_logprob, other.teacher_logprob, atol=1e-5, rtol=1e-5)
        assert torch.equal(one.gate[certain], other.gate[certain])
        torch.testing.assert_close(one.loss[certain], other.loss[certain], atol=1e-5, rtol=1e-5)
        for out in (one, other):
            (out.loss * certain).sum().div(len(certain)).backward()
        torch.testing.assert_close(hidden.grad, other_hidden.grad, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(head.grad, other_head.grad, atol=1e-5, rtol=1e-5)
        counts += torch.tensor([certain.sum(), (~certain).sum(), one.gate[certain].sum()]).float()
    dist.all_reduce(counts)
    assert counts[0] > counts[1] and counts[2] > 0, counts
    assert k > 4 or counts[1] > 0, counts  # else the bounds are not tested
