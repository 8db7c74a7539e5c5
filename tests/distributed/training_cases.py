"""The trainer on ranks and its reference by transformers in one process, shared by the checks of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from eaopd_megatron.data.types import MicroBatch, Prompt, Sample
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.megatron import optimizer as megatron_optimizer
from eaopd_megatron.megatron.model import ModelChunks, build_model
from eaopd_megatron.objective import Objective, TeacherLogits, entropy_aware_loss, linear_entropy_aware_loss
from eaopd_megatron.teacher.base import TeacherModel, TeacherRouter, TeacherSignal
from eaopd_megatron.teacher.build import model_layouts
from eaopd_megatron.teacher.colocated import ColocatedTeacher
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.training.measurement import MetricAccumulator
from eaopd_megatron.training.step import StudentTrainer
from tests.tiny_models import on_disk

TENSOR_LAYOUTS = (ParallelLayout(2), ParallelLayout(4))


ROUTED_LAYOUTS = (ParallelLayout(2), ParallelLayout(pipeline_parallel=2, virtual_pipeline=2))


SIMPLE_LAYOUTS = (ParallelLayout(1), ParallelLayout(2), ParallelLayout(2, sequence_parallel=True), ParallelLayout(4))


WIDE_LAYOUTS = (
    ParallelLayout(pipeline_parallel=2),
    ParallelLayout(pipeline_parallel=2, virtual_pipeline=2),
    ParallelLayout(2, sequence_parallel=True, pipeline_parallel=2),
    ParallelLayout(context_parallel=2),
    ParallelLayout(2, sequence_parallel=True, context_parallel=2),
    ParallelLayout(pipeline_parallel=2, virtual_pipeline=2, context_parallel=2),
)


EXPERT_LAYOUTS = (
    ParallelLayout(expert_parallel=2),
    ParallelLayout(2, sequence_parallel=True, expert_parallel=2),
    ParallelLayout(2, sequence_parallel=True, pipeline_parallel=2, expert_tensor_parallel=2),
    ParallelLayout(context_parallel=2, expert_parallel=2),
    ParallelLayout(pipeline_parallel=2, virtual_pipeline=2, expert_parallel=2),
)


Elsewhere = Callable[[HfFolder, HfFolder, ParallelState], TeacherModel]
"""Student's and teacher's folder → the teacher, which is not on these ranks."""
RATES = (3e-3, 2e-3, 1e-3)


COUNT = 12  # samples of an iteration


MINI = 4


EPS = 1e-5  # AdamW divides by the gradient: with 1e-8 a rounding error of one that is near zero becomes a whole step


@dataclass
class Trained:
    """What a layout's run of three updates left. gradients: the first update's, clipped."""

    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    metrics: dict[str, float]


def samples(vocab_size: int, teachers: Sequence[str] = ("",)) -> list[Sample]:
    """Prompts and responses of unequal lengths, the same on every rank; one response is a single token. teachers: of
    whom the prompts are, in turns."""
    random = torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=random).tolist()

    made = []
    for index in range(COUNT):
        prompt = Prompt(str(index), tuple(ids(2 + index % 3)), {}, teachers[index % len(teachers)])
        response = ids(1 + (index * 5) % 8)
        made.append(Sample(prompt, response, "stop", [0.0] * len(response), 0, index))
    return made


def grad(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def reference(student: str, teachers: dict[str, str], objective: Objective) -> Trained:
    """transformers, torch's AdamW, one process, no padding, full logits."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    frozen = {name: AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32) for name, at in teachers.items()}
    size = min(one.config.vocab_size for one in (model, *frozen.values()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.999), eps=EPS, weight_decay=0.01)
    everything = samples(size, list(teachers))
    metrics: dict[str, float] = {}
    gradients: dict[str, torch.Tensor] = {}

    def logits(of: torch.nn.Module, sample: Sample) -> torch.Tensor:
        return of(torch.tensor([sample.token_ids])).logits[0, len(sample.prompt.token_ids) - 1 : -1, :size]

    with torch.no_grad():
        old = [
            logits(model, s).log_softmax(-1).gather(-1, torch.tensor(s.response_ids)[:, None])[:, 0] for s in everything
        ]
        scores = [logits(frozen[s.prompt.teacher], s) for s in everything]
    for update, rate in enumerate(RATES):
        optimizer.zero_grad()
        total, tokens = torch.zeros(()), 0
        of_each = {name: [torch.zeros(0)] for name in teachers}
        for i in range(update * MINI, (update + 1) * MINI):
            sample = everything[i]
            out = entropy_aware_loss(
                logits(model, sample),
                TeacherLogits(scores[i]),
                torch.tensor(sample.response_ids),
                old[i],
                objective=objective,
                vocab_size=size,
            )
            total = total + out.loss.sum()
            tokens += len(sample.response_ids)
            of_each[sample.prompt.teacher].append(out.loss.detach())
        (total / tokens).backward()
        metrics[f"norm/{update}"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        metrics[f"loss/{update}"] = float(total.detach()) / tokens
        for name, losses in of_each.items() if len(teachers) > 1 else ():
            metrics[f"loss/{update}/{name}"] = float(torch.cat(losses).mean())
            metrics[f"tokens/{update}/{name}"] = float(torch.cat(losses).numel())
        gradients = gradients or on_disk((name, grad(p).clone()) for name, p in model.named_parameters())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    weights = on_disk((name, p.detach()) for name, p in model.named_parameters())
    return Trained(weights, gradients, metrics)


@dataclass
class Built:
    """A student with its optimiser, and its teacher, on this rank. vocab_size: the common one."""

    folder: HfFolder
    vocab_size: int
    model: ModelChunks
    learner: StudentTrainer
    scorer: TeacherRouter

    def teacher_models(self) -> list[ModelChunks]:
        return [one.model for one in self.scorer.teachers.values() if isinstance(one, ColocatedTeacher)]

    def gradients(self, parallel: ParallelState) -> dict[str, torch.Tensor]:
        """The last update's, clipped, under transformers' names on the first rank. Collective."""
        buffers = {name: getattr(p, "main_grad") for name, p in self.model.global_parameters().items()}  # noqa: B009
        return {name: tensor.clone() for name, tensor in gather_hf_tensors(buffers, self.folder, parallel)}


def built(
    student: str,
    teachers: dict[str, str],
    objective: Objective,
    parallel: ParallelState,
    *,
    budget: int,
    signal: str,
    offload: bool = False,
    elsewhere: Elsewhere | None = None,
) -> Built:
    folder, *teacher_folders = (HfFolder.open(path) for path in (student, *teachers.values()))
    layout, *layouts = model_layouts(parallel.layout, [folder, *teacher_folders])
    model = build_model(folder.config, layout, torch.float32)
    load_hf(model, folder, parallel)
    ddp = megatron_optimizer.wrap_ddp(model)
    optimizer = megatron_optimizer.build_optimizer(
        ddp, OptimizerConfig(lr=1.0, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=EPS, clip_grad=1.0)
    )
    vocab_size = min(one.vocab_size for one in (folder, *teacher_folders))
    common: dict[str, Any] = {"vocab_size": vocab_size, "micro_batch_tokens": budget}
    learner = StudentTrainer(ddp, optimizer, parallel, failures_folder=Path("unused"), **common)
    common |= {"signal": signal, "top_k": objective.top_k, "terminal": TerminalMap("none", -1, -1), "offload": offload}
    scorers: dict[str, TeacherModel] = {}
    for name, teacher_folder, teacher_layout in zip(teachers, teacher_folders, layouts, strict=True):
        if elsewhere is not None:
            scorers[name] = elsewhere(folder, teacher_folder, parallel)
            continue
        frozen = build_model(teacher_folder.config, teacher_layout, torch.float32, output_vocab=folder.vocab_size)
        load_hf(frozen, teacher_folder, parallel)
        scorers[name] = ColocatedTeacher(frozen, parallel, **common)
    return Built(folder, vocab_size, model, learner, TeacherRouter(scorers))


def trained(
    student: str,
    teachers: dict[str, str],
    objective: Objective,
    parallel: ParallelState,
    *,
    offload: bool = False,
    share: bool = True,
    **cut: Any,
) -> Trained:
    """Three updates through the project's own path. share: of several data-parallel ranks each has some samples, or
    else the last one has them all. cut: budget, signal and, where the teacher is not on these ranks, `elsewhere`."""
    made = built(student, teachers, objective, parallel, offload=offload, **cut)
    learner, scorer = made.learner, made.scorer
    owner = parallel.dp_size - 1

    def is_mine(index: int) -> bool:
        return (index % MINI % parallel.dp_size if share else owner) == parallel.dp_rank

    everything = samples(made.vocab_size, list(teachers))
    mine = [sample for sample in everything if is_mine(sample.index)]
    scorer.open(max(len(sample.token_ids) for sample in everything))
    for part in (mine[:2], mine[2:]):  # as they are written
        scorer.submit(part)
    mine = learner.recompute_old_logprobs(scorer.wait(mine))
    found: dict[str, float] = {}
    gradients: dict[str, torch.Tensor] = {}
    for update, rate in enumerate(RATES):
        averages = MetricAccumulator()
        batch = [s for s in mine if s.index // MINI == update]
        options: dict[str, Any] = {"learning_rate": rate, "importance_clip": 2.0, "update": update}
        learner.update(batch, scorer, objective=objective, metrics=averages, **options)
        figures = averages.reduce(dist.group.WORLD)
        found |= {f"loss/{update}": figures["objective/loss"], f"norm/{update}": figures["optimizer/grad_norm"]}
        found[f"clip/{update}"] = figures["objective/clip_fraction"]
        for name in teachers if len(teachers) > 1 else ():
            found[f"loss/{update}/{name}"] = figures[f"teachers/{name}/loss"]
            found[f"tokens/{update}/{name}"] = figures[f"teachers/{name}/tokens"]
        if update == 0:
            gradients = made.gradients(parallel)
        for teacher_model in made.teacher_models():
            away = [parameter.untyped_storage().nbytes() == 0 for parameter in teacher_model.parameters()]
            assert all(away) if offload else not any(away)
    scorer.close()
    return Trained(
        dict(gather_hf_tensors(dict(made.model.global_parameters()), made.folder, parallel)), gradients, found
    )


def compare(found: Trained, expected: Trained, what: str) -> None:
    for name, value in expected.metrics.items():
        limit = 1e-5 if name.startswith("loss") else 2e-5
        assert abs(found.metrics[name] - value) <= limit * max(1.0, abs(value)), (
            what,
            name,
            found.metrics[name],
            value,
        )
    for name, tensor in found.gradients.items():
        gap = float((tensor - expected.gradients[name]).abs().max())
        assert gap <= 1e-5, (what, name, gap, float(expected.gradients[name].abs().max()))
    for name, tensor in found.weights.items():
        gap = float((tensor - expected.weights[name]).abs().max())
        assert gap <= 1e-4, (what, name, gap)


def teacher_logprobs(
    scorer: TeacherModel, said: TeacherSignal, batch: MicroBatch, vocab_size: int, parallel: ParallelState
) -> torch.Tensor:
    """log p(y) [n], as the objective makes it of what the teacher said, in a vocabulary padded to 256 columns."""
    columns, n = 256 // parallel.tp_size, len(batch.target_ids)
    options: dict[str, Any] = {
        "teacher_tokens": scorer.target_ids(batch),
        "objective": Objective.preset("opd"),
        "vocab_size": vocab_size,
        "group": parallel.tp_group,
    }
    if isinstance(said, TeacherLogits):
        out = entropy_aware_loss(torch.zeros(n, columns), said, batch.target_ids, None, **options)
    else:
        hidden, head = torch.zeros(n, 8), torch.zeros(columns, 8)
        out = linear_entropy_aware_loss(hidden, head, said, batch.target_ids, None, **options)
    return out.teacher_logprob
