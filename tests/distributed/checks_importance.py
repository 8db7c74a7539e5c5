"""Checks of test_training.py: the weights of stale samples, against dense fp64 on one process."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.data.types import Sample
from eaopd_megatron.objective import Objective, TeacherLogits
from eaopd_megatron.objective.dense_reference import dense_loss
from eaopd_megatron.training.measurement import MetricAccumulator
from tests.distributed.groups import model_parallel
from tests.distributed.training_cases import Built, built, grad, samples
from tests.tiny_models import on_disk

CLIP = 1.5
OBJECTIVE = Objective.preset("eopd")


@dataclass
class Reference:
    """old: π_old's log-probs of each sample's response. The figures are means over stale tokens."""

    old: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    weight: float
    clipped: float


def drift(sample: Sample) -> torch.Tensor:
    """How much more probable each of its tokens has become since it was sampled, in nats."""
    return torch.linspace(-1.0, 1.0, len(sample.response_ids) + 2, dtype=torch.float64)[1:-1]


def reference(student: str, teacher: str) -> Reference:
    """transformers in fp64; every third sample is stale, and its losses are multiplied by hand."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    frozen = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    old, weights, total, tokens = [], [], torch.zeros((), dtype=torch.float64), 0
    for index, sample in enumerate(samples(model.config.vocab_size)):
        rows = slice(len(sample.prompt.token_ids) - 1, -1)
        logits, scores = (of(torch.tensor([sample.token_ids])).logits[0, rows] for of in (model, frozen))
        ids = torch.tensor(sample.response_ids)
        size = logits.shape[1]
        out = dense_loss(logits, TeacherLogits(scores.detach()), ids, objective=OBJECTIVE, vocab_size=size)
        weight = drift(sample).exp().clamp(max=CLIP) if index % 3 == 0 else torch.ones(len(ids))
        weights += weight.tolist() if index % 3 == 0 else []
        old.append(out.student_logprob.detach())
        total = total + (weight * out.loss).sum()
        tokens += len(ids)
    (total / tokens).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    clipped = sum(weight == CLIP for weight in weights)
    assert 0 < clipped < len(weights)  # or one side of the minimum would be untested
    gradients = on_disk((name, grad(p).float()) for name, p in model.named_parameters())
    return Reference(old, gradients, sum(weights) / len(weights), clipped / len(weights))


def updated(made: Built, mine: list[Sample]) -> MetricAccumulator:
    averages = MetricAccumulator()
    made.scorer.submit(mine)
    made.learner.update(
        made.scorer.wait(mine),
        made.scorer,
        objective=OBJECTIVE,
        learning_rate=0.0,  # the next update meets the same weights
        importance_clip=CLIP,
        update=0,
        metrics=averages,
    )
    return averages


def check_stale_samples_are_weighted_and_fresh_ones_are_not(
    group: dist.ProcessGroup, student: str, teacher: str
) -> None:
    """Several samples a micro-batch, stale ones beside fresh ones."""
    expected = reference(student, teacher)
    for layout in (ParallelLayout(1), ParallelLayout(2), ParallelLayout(2, sequence_parallel=True, context_parallel=2)):
        with model_parallel(layout) as parallel:
            made = built(student, {"": teacher}, OBJECTIVE, parallel, budget=20, signal="topk")
            mine = samples(made.folder.vocab_size)[parallel.dp_rank :: parallel.dp_size]
            mine = [
                replace(sample, rollout_logprobs=(expected.old[sample.index] - drift(sample)).tolist())
                for sample in made.learner.recompute_old_logprobs(mine)
            ]
            plain = updated(made, mine).reduce(dist.group.WORLD)
            untouched = made.gradients(parallel)
            assert not [name for name in plain if "importance" in name]

            mine = [replace(sample, stale=sample.index % 3 == 0) for sample in mine]
            figures = updated(made, mine).reduce(dist.group.WORLD)
            for name, tensor in made.gradients(parallel).items():
                gap = float((tensor - expected.gradients[name]).abs().max())
                assert gap <= 1e-5, (layout, name, gap)
            assert abs(figures["rollout/importance_weight"] - expected.weight) < 1e-4
            assert abs(figures["rollout/importance_clipped"] - expected.clipped) < 1e-9
            assert abs(figures["objective/loss"] - plain["objective/loss"]) < 1e-9  # as the objective gives it

            for fresh in (True, False):
                changed = []
                for sample in mine:
                    assert sample.old_logprobs is not None
                    stale = not fresh and sample.index % 3 == 0
                    unlike = torch.full((len(sample.response_ids),), -30.0)
                    logprobs = (sample.old_logprobs if stale else unlike).tolist()
                    changed.append(replace(sample, stale=stale, rollout_logprobs=logprobs))
                updated(made, changed)
                for name, tensor in made.gradients(parallel).items():
                    assert torch.equal(tensor, untouched[name]), (layout, fresh, name)
