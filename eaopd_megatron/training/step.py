"""The student: π_old, and one update of a mini-batch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from eaopd_megatron.data.packing import micro_batches
from eaopd_megatron.data.samples import MicroBatch, Sample
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron import optimizer as megatron_optimizer
from eaopd_megatron.megatron.forward import head_of, hidden_grad, hidden_rows, logits_of
from eaopd_megatron.megatron.groups import Parallel
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
from eaopd_megatron.teacher.colocated import ColocatedTeacher
from eaopd_megatron.training.averages import Averages


class Student:
    """The trained model with its optimiser. All tensor-parallel ranks call it with the same samples."""

    def __init__(
        self,
        ddp: Any,  # Megatron-Core's DistributedDataParallel
        optimizer: Any,
        parallel: Parallel,
        *,
        vocab_size: int,
        budget: int,
        multiple: int,
        failures: Path,
    ) -> None:
        self.ddp, self.optimizer, self.parallel = ddp, optimizer, parallel
        self.budget, self.multiple, self.failures = budget, multiple, failures
        self._shard: dict[str, Any] = {"vocab_size": vocab_size, "group": parallel.tp_group}

    @torch.no_grad()
    def recompute_old_logprobs(self, samples: Sequence[Sample]) -> None:
        """π_old of every response token, by the trainer itself: the rollout engine's log-probs come from other
        kernels."""
        for batch in self._cut(samples):
            found = linear_token_statistics(
                hidden_rows(self.ddp, batch.token_ids, batch.rows), head_of(self.ddp), batch.tokens, **self._shard
            )
            for sample, logprobs in zip(batch.samples, batch.split(found.logprob), strict=True):
                sample.old_logprobs = logprobs

    def update(
        self,
        samples: Sequence[Sample],
        teacher: ColocatedTeacher,
        *,
        objective: Objective,
        learning_rate: float,
        update: int,
        metrics: Averages,
    ) -> None:
        """One optimiser step on this rank's share of a mini-batch.

        The gradient is that of Σ L_t / (valid response tokens of the whole mini-batch over all data-parallel ranks),
        however the micro-batches are cut: each adds its sum, and the division comes last.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        tokens = torch.zeros(1, dtype=torch.int, device=self.parallel.device)
        batches = list(self._cut(samples))
        for number, batch in enumerate(batches):
            old = None
            if batch.samples[0].old_logprobs is not None:
                old = batch.gather([s.old_logprobs for s in batch.samples if s.old_logprobs is not None])
            out = self._loss(batch, teacher, objective, old, update)
            with megatron_optimizer.micro_batch(self.ddp, last=number == len(batches) - 1):
                out.loss.sum().backward()
            tokens += len(batch.tokens)
            _measure(metrics, batch, out, old)
        megatron_optimizer.finish_gradients(self.ddp, tokens)
        megatron_optimizer.set_learning_rate(self.optimizer, learning_rate)
        done, norm = megatron_optimizer.step(self.optimizer)
        if not done:
            raise UserError(
                f"update {update}: the gradient norm is {norm}; lower optimizer.lr or look at the last rollouts"
            )
        metrics.add("optimizer/grad_norm", torch.tensor([norm]))
        metrics.add("optimizer/lr", torch.tensor([learning_rate]))

    def _loss(
        self, batch: MicroBatch, teacher: ColocatedTeacher, objective: Objective, old: torch.Tensor | None, update: int
    ) -> TokenLosses:
        """The objective on a micro-batch: from hidden states, or, where the teacher gives logits, on logits."""
        signal = teacher.signal(batch)
        options = {"teacher_tokens": teacher.labels(batch), "objective": objective, **self._shard}
        if isinstance(signal, TeacherLogits):
            rows = logits_of(self.ddp, batch.token_ids).flatten(0, 1)[batch.rows]
        else:
            rows = hidden_rows(self.ddp, batch.token_ids, batch.rows)
        try:
            if isinstance(signal, TeacherLogits):
                out = entropy_aware_loss(rows, signal, batch.tokens, old, **options)
            else:
                head, mode = head_of(self.ddp), hidden_grad(self.ddp)
                out = linear_entropy_aware_loss(rows, head, signal, batch.tokens, old, hidden_grad=mode, **options)
        except ValueError as error:  # raised alike on every tensor-parallel rank
            self._refuse(batch, _broken(rows) | _broken(_seen(signal)), update, str(error))
        if not torch.isfinite(out.loss).all():
            self._refuse(batch, _broken(out.loss[:, None]), update, "the loss is not finite")
        return out

    def _cut(self, samples: Sequence[Sample]) -> Iterator[MicroBatch]:
        return micro_batches(samples, self.budget, self.parallel.device, self.multiple)

    def _refuse(self, batch: MicroBatch, bad: torch.Tensor, update: int, why: str) -> NoReturn:
        """Save the offending sample and stop: training on would lose the model, skipping it would hide the cause."""
        flags = bad.int()
        if self.parallel.tp_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.parallel.tp_group)
        token = int(flags.argmax())
        sample = batch.sample_of(token)
        path = self.failures / f"update_{update:06d}_rank_{self.parallel.rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(sample.record("") | {"token": token, "why": why}))
        where = f"update {update}, rank {self.parallel.rank}"
        raise UserError(f"{where}: {why} (prompt {sample.prompt.id}); the sample is saved in {path}")


def _broken(rows: torch.Tensor) -> torch.Tensor:
    """[n] bool: rows [n, ...] with a number that is not finite."""
    return ~torch.isfinite(rows).flatten(1).all(-1)


def _seen(signal: TeacherTopK | TeacherHidden | TeacherLogits) -> torch.Tensor:
    """What the teacher said, [n, ...]."""
    if isinstance(signal, TeacherTopK):
        return signal.logprobs
    return signal.hidden if isinstance(signal, TeacherHidden) else signal.logits


def _measure(metrics: Averages, batch: MicroBatch, out: Any, old: torch.Tensor | None) -> None:
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
        ("teacher/terminal_logprob", out.teacher_logprob, batch.last_tokens()),
        ("student/entropy", out.student_entropy, None),
        ("student/entropy_gated", out.student_entropy, gated),
        ("student/entropy_ungated", out.student_entropy, ~gated),
    ):
        metrics.add(name, values, where)
    metrics.minimum("objective/kl_min", out.forward_kl)
    engine = batch.gather([torch.tensor(s.rollout_logprobs) for s in batch.samples])
    metrics.add("rollout/logprob_gap", (engine - (out.student_logprob if old is None else old)).abs())
