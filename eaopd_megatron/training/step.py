"""The student: π_old, and one optimizer update on a mini-batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from eaopd_megatron.data.types import MicroBatch, Prompt, Sample
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron import optimizer as megatron_optimizer
from eaopd_megatron.megatron.forward import (
    gather_context_parallel,
    hidden_grad_reduction,
    output_weight,
    response_logits,
)
from eaopd_megatron.megatron.model import ModelChunks
from eaopd_megatron.megatron.pipeline import (
    broadcast_from_last_stage,
    micro_batches,
    micro_batches_by_teacher,
    run_forward,
    run_forward_backward,
)
from eaopd_megatron.objective import (
    Objective,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    TokenLosses,
    entropy_aware_loss,
    linear_entropy_aware_loss,
    linear_token_statistics,
)
from eaopd_megatron.teacher.base import TeacherRouter, TeacherSignal
from eaopd_megatron.training.measurement import MetricAccumulator


@dataclass(frozen=True)
class ImportanceWeights:
    """Importance weights of a micro-batch's n response tokens on this rank, each [n].

    values: fp32, exactly 1 for fresh tokens. stale, clipped: bool.
    """

    values: torch.Tensor
    stale: torch.Tensor
    clipped: torch.Tensor

    @classmethod
    def of(cls, batch: MicroBatch, old: torch.Tensor | None, clip: float) -> ImportanceWeights | None:
        """Return the weights, or None if no sample is stale. old: [n], π_old's log-probs computed by the trainer.

        Raises ValueError for a stale sample without old_logprobs.
        """
        if not any(sample.stale for sample in batch.samples):
            return None
        if old is None:
            raise ValueError("stale samples need old_logprobs: call recompute_old_logprobs before update")
        stale = batch.gather_local([torch.full((len(s.response_ids),), s.stale) for s in batch.samples])
        ratio = (old - batch.rollout_logprobs()).exp()
        return cls(torch.where(stale, ratio.clamp(max=clip), 1.0).detach(), stale, stale & (ratio > clip))


class StudentTrainer:
    """The trained model and its optimizer. All ranks of a model replica call it with the same samples."""

    def __init__(
        self,
        ddp: ModelChunks,  # wrapped in DDP
        optimizer: Any,
        parallel: ParallelState,
        *,
        vocab_size: int,
        micro_batch_tokens: int,
        failures_folder: Path,
    ) -> None:
        self.ddp, self.optimizer, self.parallel = ddp, optimizer, parallel
        self.micro_batch_tokens, self.failures_folder = micro_batch_tokens, failures_folder
        self._shard: dict[str, Any] = {"vocab_size": vocab_size, "group": parallel.tp_group}

    def recompute_old_logprobs(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples with `old_logprobs`, π_old's log-prob (nats) of every response token, on every rank.

        The rollout engine's log-probs come from other kernels, so the trainer computes them itself.
        """
        batches = micro_batches(samples, self.micro_batch_tokens, self.parallel)
        logprobs_of: dict[int, torch.Tensor] = {}

        def last_stage(index: int, rows: torch.Tensor) -> None:
            statistics = linear_token_statistics(
                rows, output_weight(self.ddp), batches[index].target_ids, **self._shard
            )
            logprobs_of[index] = gather_context_parallel(batches[index], statistics.logprob, self.parallel)

        run_forward(self.ddp, batches, last_stage)
        lengths = [len(s.response_ids) for s in samples]
        logprobs = torch.empty(sum(lengths), device=self.parallel.device)
        if logprobs_of:
            logprobs = torch.cat([logprobs_of[index] for index in range(len(batches))])
        parts = broadcast_from_last_stage(logprobs, self.parallel).split(lengths)
        return [replace(sample, old_logprobs=part) for sample, part in zip(samples, parts, strict=True)]

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probs (nats) of every token after the first. Collective; same tokens on every rank."""
        sample = Sample(Prompt("", tuple(token_ids[:1]), {}), list(token_ids[1:]), "length", [], 0)
        (sample,) = self.recompute_old_logprobs([sample])
        assert sample.old_logprobs is not None
        return sample.old_logprobs.tolist()

    def update(
        self,
        samples: Sequence[Sample],
        teachers: TeacherRouter,
        *,
        objective: Objective,
        learning_rate: float,
        importance_clip: float,
        update: int,
        metrics: MetricAccumulator,
    ) -> None:
        """Run one optimizer step on this rank's share of a mini-batch.

        The gradient is that of Σ L_t / (valid response tokens of the mini-batch over all data-parallel ranks),
        independently of the split into micro-batches: each adds its sum, and the division comes last. The loss L_t of a
        stale sample is multiplied by min(π_old/π_rollout, importance_clip), which needs `recompute_old_logprobs`.
        Raises UserError if the loss or the gradient norm is not finite.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = micro_batches_by_teacher(samples, self.micro_batch_tokens, self.parallel, teachers.names)
        signal_of = teachers.micro_batch_signals(batches)
        tokens = torch.zeros(1, dtype=torch.int, device=self.parallel.device)

        def last_stage(index: int, rows: torch.Tensor) -> torch.Tensor:
            batch, old = batches[index], None
            if batch.samples and batch.samples[0].old_logprobs is not None:
                old = batch.gather_local([s.old_logprobs for s in batch.samples if s.old_logprobs is not None])
            labels = teachers.target_ids(batch)
            out = self._loss(batch, rows, signal_of(index), labels, objective, old, update)
            weights = ImportanceWeights.of(batch, old, importance_clip)
            tokens.add_(len(batch.target_ids))
            if batch.samples and self.parallel.reports_metrics:
                _add_metrics(metrics, batch, out, old, weights)
            return (out.loss if weights is None else out.loss * weights.values).sum()

        run_forward_backward(self.ddp, batches, last_stage)
        megatron_optimizer.finalize_gradients(self.ddp, tokens)
        megatron_optimizer.set_learning_rate(self.optimizer, learning_rate)
        done, norm = megatron_optimizer.optimizer_step(self.optimizer)
        if not done:
            raise UserError(
                f"update {update}: the gradient norm is {norm}; lower optimizer.lr or look at the last rollouts"
            )
        if self.parallel.reports_metrics:
            metrics.add("optimizer/grad_norm", torch.tensor([norm]))
            metrics.add("optimizer/lr", torch.tensor([learning_rate]))

    def _loss(
        self,
        batch: MicroBatch,
        rows: torch.Tensor,
        signal: TeacherSignal,
        labels: torch.Tensor | None,
        objective: Objective,
        old: torch.Tensor | None,
        update: int,
    ) -> TokenLosses:
        """Compute the objective from hidden states [n, h]; with a teacher that gives logits, from logits [n, vocab]."""
        options = {"teacher_tokens": labels, "objective": objective, **self._shard}
        if isinstance(signal, TeacherLogits):
            rows = response_logits(self.ddp, rows)
        try:
            if isinstance(signal, TeacherLogits):
                out = entropy_aware_loss(rows, signal, batch.target_ids, old, **options)
            else:
                head, mode = output_weight(self.ddp), hidden_grad_reduction(self.ddp)
                out = linear_entropy_aware_loss(rows, head, signal, batch.target_ids, old, hidden_grad=mode, **options)
        except ValueError as error:  # raised alike on every tensor-parallel rank
            self._reject(batch, _is_not_finite(rows) | _is_not_finite(_signal_values(signal)), update, str(error))
        if not torch.isfinite(out.loss).all():
            self._reject(batch, _is_not_finite(out.loss[:, None]), update, "the loss is not finite")
        return out

    def _reject(self, batch: MicroBatch, bad: torch.Tensor, update: int, why: str) -> NoReturn:
        """Save the offending sample and stop.

        Training on would ruin the model, and skipping the sample would hide the cause.
        """
        flags = bad.int()
        if self.parallel.tp_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.parallel.tp_group)
        where = f"update {update}, rank {self.parallel.rank}"
        if not len(flags):
            raise UserError(f"{where}: {why}")
        token = int(flags.argmax())
        sample = batch.sample_of(token)
        path = self.failures_folder / f"update_{update:06d}_rank_{self.parallel.rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(sample.record("") | {"token": token, "why": why}))
        raise UserError(f"{where}: {why} (prompt {sample.prompt.id}); the sample is saved in {path}")


def _is_not_finite(rows: torch.Tensor) -> torch.Tensor:
    """Return [n] bool: rows of [n, ...] that contain inf or nan."""
    return ~torch.isfinite(rows).flatten(1).all(-1)


def _signal_values(signal: TeacherSignal) -> torch.Tensor:
    """Return the values [n, ...] of a teacher's signal."""
    if isinstance(signal, TeacherTopK):
        return signal.logprobs
    return signal.hidden if isinstance(signal, TeacherHidden) else signal.logits


_PER_TEACHER_METRICS = (
    *("objective/loss", "teacher/entropy", "objective/gate_fraction", "objective/forward_kl_gated"),
    "teacher/terminal_logprob",
)
"""Metrics that a recipe with several teachers also records per teacher, as teachers/NAME/loss and so on."""


def _add_metrics(
    metrics: MetricAccumulator, batch: MicroBatch, out: Any, old: torch.Tensor | None, weights: ImportanceWeights | None
) -> None:
    gated = out.gate > 0.5
    for name, values, where in (
        ("objective/loss", out.loss, None),
        ("objective/reverse_kl", out.reverse_kl, None),
        ("objective/forward_kl_gated", out.forward_kl, gated),
        ("objective/forward_kl_ungated", out.forward_kl, ~gated),
        ("objective/gate_fraction", out.gate, None),
        ("objective/gate_ambiguous", out.gate_ambiguous, None),
        ("objective/clip_fraction", out.clipped, None),
        ("teacher/entropy", out.teacher_entropy, None),
        ("teacher/entropy_gated", out.teacher_entropy, gated),
        ("teacher/entropy_ungated", out.teacher_entropy, ~gated),
        ("teacher/terminal_logprob", out.teacher_logprob, batch.is_terminal()),
        ("student/entropy", out.student_entropy, None),
        ("student/entropy_gated", out.student_entropy, gated),
        ("student/entropy_ungated", out.student_entropy, ~gated),
    ):
        metrics.add(name, values, where)
        if batch.teacher and name in _PER_TEACHER_METRICS:
            metrics.add(f"teachers/{batch.teacher}/{name.split('/')[1]}", values, where)
    if batch.teacher:
        metrics.add_count(f"teachers/{batch.teacher}/tokens", len(batch.target_ids))
    metrics.add_minimum("objective/kl_min", out.forward_kl)
    gap = (batch.rollout_logprobs() - (out.student_logprob if old is None else old)).abs()
    if weights is None:
        metrics.add("rollout/logprob_gap", gap)
    else:  # a stale token's gap mostly comes from the weights, not from the engines
        metrics.add("rollout/logprob_gap", gap, ~weights.stale)
        metrics.add("rollout/logprob_gap_stale", gap, weights.stale)
        metrics.add("rollout/importance_weight", weights.values, weights.stale)
        metrics.add("rollout/importance_clipped", weights.clipped, weights.stale)
