"""Checks of the trainer on ranks: rollout, teacher and update at several layouts, against transformers on one
process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from eaopd_megatron.checkpoint.hf_export import gather_hf_tensors
from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_hf
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.config.schema import OptimizerConfig
from eaopd_megatron.data.packing import collate
from eaopd_megatron.data.types import MicroBatch, Prompt, Sample, SamplingParams
from eaopd_megatron.errors import StopRequested
from eaopd_megatron.megatron import optimizer as megatron_optimizer
from eaopd_megatron.megatron.model import ModelChunks, build_model, wait_param_gather
from eaopd_megatron.megatron.pipeline import packing_for, run_forward_backward
from eaopd_megatron.objective import Objective
from eaopd_megatron.rollout.interface import GenerationRequest
from eaopd_megatron.rollout.local import LocalRollout
from eaopd_megatron.teacher.base import TeacherRouter
from eaopd_megatron.teacher.colocated import ColocatedTeacher
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.training.measurement import MetricAccumulator
from eaopd_megatron.training.step import StudentTrainer
from tests.distributed import training_cases
from tests.distributed.groups import model_parallel
from tests.distributed.training_cases import compare, reference, samples, teacher_logprobs, trained


def check_an_update_is_the_same_at_every_layout(
    group: dist.ProcessGroup,
    student: str,
    teacher: str | dict[str, str],
    preset: str,
    layouts: str,
    **options: Any,
) -> None:
    """The loss is divided by the tokens of the whole mini-batch: however ranks and micro-batches cut it.

    teacher: one, or several by name, whose samples take turns.
    """
    objective = Objective.preset(preset)
    teachers = {"": teacher} if isinstance(teacher, str) else teacher
    expected = reference(student, teachers, objective)
    clipped = 0.0
    for layout in getattr(training_cases, layouts):
        with model_parallel(layout) as parallel:
            found = trained(student, teachers, objective, parallel, **options)
            clipped += sum(value for name, value in found.metrics.items() if name.startswith("clip"))
            compare(found, expected, f"{preset} {layout} {options}")
    if objective.reverse_kl == "sampled":
        assert clipped > 0  # or the second update's ratio would be untested


def check_a_rank_without_a_sample_changes_nothing(group: dist.ProcessGroup, student: str, teacher: str) -> None:
    """Of several data-parallel ranks one has every sample, in several micro-batches, and the others no token.

    Overlapped, the last micro-batch starts the reduction of the gradients, also where it is empty.
    """
    folder, teacher_folder = HfFolder.open(student), HfFolder.open(teacher)
    everything = samples(folder.vocab_size)[:4]
    for layout in (
        ParallelLayout(1),
        ParallelLayout(pipeline_parallel=2, virtual_pipeline=2),
        ParallelLayout(context_parallel=2),
    ):
        with model_parallel(layout) as parallel:
            results = []
            teacher_model = build_model(teacher_folder.config, layout, torch.float32)
            load_hf(teacher_model, teacher_folder, parallel)
            for share, overlap in ((True, False), (False, False), (False, True)):
                model = build_model(folder.config, layout, torch.float32)
                load_hf(model, folder, parallel)
                ddp = megatron_optimizer.wrap_ddp(model, distributed=overlap, overlap=overlap, bucket_size=5000)
                optimizer = megatron_optimizer.build_optimizer(
                    ddp,
                    OptimizerConfig(lr=1e-3, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8, clip_grad=1.0),
                )
                common: dict[str, Any] = {"vocab_size": folder.vocab_size, "micro_batch_tokens": 9}
                learner = StudentTrainer(ddp, optimizer, parallel, failures_folder=Path("unused"), **common)
                terminal = TerminalMap("none", -1, -1)
                scorer = TeacherRouter(
                    {
                        "": ColocatedTeacher(
                            teacher_model, parallel, signal="topk", top_k=16, terminal=terminal, **common
                        )
                    }
                )
                here, last = parallel.dp_rank, parallel.dp_size - 1
                mine = everything[here :: parallel.dp_size] if share else (everything if here == last else [])
                scorer.submit(mine)
                mine = learner.recompute_old_logprobs(scorer.wait(mine))
                averages = MetricAccumulator()
                options: dict[str, Any] = {"learning_rate": 1e-3, "importance_clip": 2.0, "update": 0}
                learner.update(mine, scorer, objective=Objective.preset("eopd"), metrics=averages, **options)
                norm = averages.reduce(dist.group.WORLD)["optimizer/grad_norm"]
                weights = {name: wait_param_gather(p).detach().clone() for name, p in model.global_parameters().items()}
                results.append((norm, weights))
            norm, weights = results[0]
            for other_norm, other_weights in results[1:]:
                assert norm > 0 and abs(norm - other_norm) < 1e-5 * norm, (layout, norm, other_norm)
                for name, tensor in weights.items():
                    assert torch.allclose(tensor, other_weights[name], atol=1e-5), (layout, name)


def loss_on_rows(ddp: ModelChunks, batch: MicroBatch, mine: torch.Tensor) -> torch.Tensor:
    """Add the gradient of the chosen rows' squares; returns those rows."""
    seen = []

    def last(index: int, rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows[mine])
        return rows[mine].square().sum()

    run_forward_backward(ddp, [batch], last)
    return seen[0]


def check_a_packed_sequence_sees_no_other(group: dist.ProcessGroup, student: str) -> None:
    """Other tokens in a neighbouring sequence change nothing, and get no gradient."""
    folder = HfFolder.open(student)
    prompt = Prompt("p", (5, 6, 7), {})
    one, other, another = (Sample(prompt, ids, "stop", [], 0) for ids in ([8, 9], [20] * 9, [30] * 9))
    for layout in (
        ParallelLayout(1),
        ParallelLayout(2, sequence_parallel=True, context_parallel=2),
        ParallelLayout(context_parallel=4),
    ):
        with model_parallel(layout) as parallel:
            model = build_model(folder.config, layout, torch.float32)
            load_hf(model, folder, parallel)
            ddp = megatron_optimizer.wrap_ddp(model)
            seen: list[torch.Tensor] = []
            for neighbour in (other, another):
                packing = packing_for(layout, parallel.cp_rank)
                batch = collate([neighbour, one, neighbour], parallel.device, packing)
                mine = torch.isin(batch.target_ids, torch.tensor(one.response_ids))
                ddp.zero_grad_buffer()
                seen.append(loss_on_rows(ddp, batch, mine))
                megatron_optimizer.finalize_gradients(ddp, torch.ones(1))
                buffers = {name: getattr(p, "main_grad") for name, p in model.global_parameters().items()}  # noqa: B009
                gradient = dict(gather_hf_tensors(buffers, folder, parallel)).get("model.embed_tokens.weight")
                if gradient is not None:
                    assert gradient.any(1).nonzero().flatten().tolist() == [5, 6, 7, 8], layout
            assert torch.equal(*seen), layout


def state_of_modules(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """What decoding switches, module by module."""
    names = ("training", "sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings", "cp_group")
    return {where: tuple(getattr(m, name, None) for name in names) for where, m in model.named_modules()}


def check_rollouts_are_the_same_at_every_layout(group: dist.ProcessGroup, student: str, layouts: str) -> None:
    """Random numbers belong to samples; the recorded log-probs are the trainer's; any of several ids stops."""
    folder = HfFolder.open(student)
    random = torch.Generator().manual_seed(3)
    prompts = [
        Prompt(str(i), tuple(torch.randint(folder.vocab_size, (1 + i % 5,), generator=random).tolist()), {})
        for i in range(7)
    ]
    keys: list[tuple[int | str, ...]] = [(0, "rollout", 0, i) for i in range(len(prompts))]
    sampling = SamplingParams(1.0, 1.0, 9, stop_token_ids=(3, 11, 20, 40, 41, 42, 43, 44, 45, 46))
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    seen: list[list[list[int]]] = []
    for layout in dict.fromkeys((ParallelLayout(1), *getattr(training_cases, layouts))):
        for batch_size in (3, 16) if layout == ParallelLayout(1) else (3,):
            with model_parallel(layout) as parallel:
                shard = build_model(folder.config, layout, torch.float32)
                load_hf(shard, folder, parallel)
                rollout = LocalRollout(shard, parallel, vocab_size=folder.vocab_size, batch_size=batch_size)
                shard.train()
                before = state_of_modules(shard)
                made = rollout.generate(prompts, keys, sampling, version=4)
                assert state_of_modules(shard) == before  # generation gives the model back as it was
                seen.append([s.response_ids for s in made])
    assert all(ids == seen[0] for ids in seen), seen
    for sample in made:
        stops = [t in sampling.stop_token_ids for t in sample.response_ids]
        assert not any(stops[:-1])
        assert sample.finish_reason == ("stop" if stops[-1] else "length")
        assert stops[-1] or len(sample.response_ids) == sampling.max_new_tokens
        assert len(sample.rollout_logprobs) == len(sample.response_ids)
        with torch.no_grad():
            logits = model(torch.tensor([sample.token_ids])).logits[0, len(sample.prompt.token_ids) - 1 : -1]
        exact = logits.log_softmax(-1).gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        assert torch.allclose(exact, torch.tensor(sample.rollout_logprobs), atol=1e-5)
    assert {s.finish_reason for s in made} == {"stop", "length"}


class _SignalInTheMiddle:
    """A signal that this rank, or none, gets before it looks for the second time."""

    def __init__(self, here: bool) -> None:
        self.here, self.looks = here, 0

    def __call__(self) -> int:
        self.looks += 1
        return 15 if self.here and self.looks > 1 else 0


def check_a_signal_ends_generation_on_every_rank(group: dist.ProcessGroup, student: str, layouts: str) -> None:
    """One rank gets it in the middle of decoding; the model is as before, and generates the same again."""
    folder = HfFolder.open(student)
    prompts = [Prompt(str(i), (5 + i, 6), {}) for i in range(5)]
    keys: list[tuple[int | str, ...]] = [(0, "rollout", 0, i) for i in range(len(prompts))]
    request = GenerationRequest(prompts, keys, range(len(prompts)), SamplingParams(1.0, 1.0, 20, stop_token_ids=()))
    for layout in dict.fromkeys((ParallelLayout(1), *getattr(training_cases, layouts))):
        with model_parallel(layout) as parallel:
            model = build_model(folder.config, layout, torch.float32)
            load_hf(model, folder, parallel)
            signal = _SignalInTheMiddle(parallel.rank == 3)
            calm = LocalRollout(model, parallel, vocab_size=folder.vocab_size, batch_size=3)
            before = next(calm.collect(calm.submit(request)))
            stopped = LocalRollout(model, parallel, vocab_size=folder.vocab_size, batch_size=3, stop_signal=signal)
            try:
                next(stopped.collect(stopped.submit(request)))
                raise AssertionError(layout)
            except StopRequested as asked:
                assert asked.args == (15,)
            again = next(calm.collect(calm.submit(request)))
            assert [one.response_ids for one in again] == [one.response_ids for one in before]


def check_the_terminal_maps_give_the_students_stop_the_teachers_meaning(
    group: dist.ProcessGroup, student: str, teacher: str
) -> None:
    """Student and teacher end with different ids: under swap and label the stop gets the teacher's log-prob of its
    own stop; also where the teacher's output layer has the student's rows."""
    mine, theirs = 7, 90
    teacher_folder = HfFolder.open(teacher)
    size = HfFolder.open(student).vocab_size
    frozen = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    sample = Sample(Prompt("p", (5, 6), {}), [8, 9, mine], "stop", [0.0] * 3, 0)
    with torch.no_grad():
        exact = frozen(torch.tensor([sample.token_ids])).logits[0, 1:-1, :size].log_softmax(-1)
    for kind in ("swap", "label", "none"):
        terminal = TerminalMap.between(kind, [mine], [theirs])
        with model_parallel(ParallelLayout(2)) as parallel:
            row_map = terminal.row_map()
            untie = row_map is not None
            model = build_model(teacher_folder.config, parallel.layout, torch.float32, untie=untie, output_vocab=size)
            load_hf(model, teacher_folder, parallel, row_map=row_map)
            for signal in ("topk", "hidden", "logits"):
                scorer = ColocatedTeacher(
                    model,
                    parallel,
                    vocab_size=size,
                    signal=signal,
                    top_k=size,
                    terminal=terminal,
                    micro_batch_tokens=100,
                )
                scorer.submit([sample])
                batch = collate(scorer.wait([sample]), torch.device("cpu"))
                found = teacher_logprobs(scorer, scorer.micro_batch_signals([batch])(0), batch, size, parallel)
                stop = mine if kind == "none" else theirs
                expected = torch.stack([exact[0, 8], exact[1, 9], exact[2, stop]])
                assert torch.allclose(found, expected, atol=1e-5), (kind, signal)
