"""The entropy-aware loss of arXiv 2603.07079 over vocabulary shards: the public call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .checks import Checks, require_integers, require_shape
from .evidence import from_logits, from_top_k
from .gradient import Recipe, write_gradient
from .settings import Objective, Signal
from .teacher import TeacherLogits, TeacherTopK
from .terms import combine, gate_of
from .vocab_parallel import Shard, look_up, merge, partial_sums


@dataclass(frozen=True)
class TokenLosses:
    """Each [n] and the same on every rank. ``loss`` carries the gradient, the rest is detached. Entropies, KLs: nats.

    reverse_kl is exact where the teacher's whole distribution is given, else the sampled estimate log q(y) - log p(y).
    forward_kl is the objective's; where it has none, the exact one if the teacher's whole distribution is given, else
    the top-k one. teacher_entropy is the lower bound where only top-k log-probs without an entropy are given;
    gate_ambiguous (bool) says that the bounds leave a hard gate open to doubt. clipped (bool): the ratio's clip stops
    the gradient.
    """

    loss: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    gate: Tensor
    gate_ambiguous: Tensor
    student_logprob: Tensor
    teacher_logprob: Tensor
    clipped: Tensor


@dataclass(frozen=True)
class TokenStatistics:
    """log q(y) and the entropy of each token, [n] nats, the same on every rank."""

    logprob: Tensor
    entropy: Tensor


def entropy_aware_loss(
    student_logits: Tensor,
    teacher: TeacherLogits | TeacherTopK,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    *,
    teacher_tokens: Tensor | None = None,
    objective: Objective,
    vocab_size: int,
    group: ProcessGroup | None = None,
    chunk: int | None = None,
    inplace_backward: bool = False,
) -> TokenLosses:
    """Loss of each token under ``objective``, with the exact gradient over this rank's logits.

    student_logits  [n, columns], this rank's shard of the vocabulary padded to ranks · columns; unchanged
    teacher         TeacherLogits in the same layout, or TeacherTopK
    tokens          [n] ids that were sampled
    old_logprobs    [n] nats, log pi_old(y); None: those of the student now, without gradient
    teacher_tokens  [n] ids under which log p(y) is looked up in TeacherLogits, where they differ from tokens;
                    a TeacherTopK holds that log-prob already
    vocab_size      true size; columns beyond it are padding and get a zero gradient
    group           tensor-parallel group; None: the whole vocabulary is here
    chunk           tokens worked at together; None: what suits the caches. Changes time and memory, not the result
    inplace_backward  write the gradient over student_logits instead of into new memory; nothing else may need them then

    One collective forward, none backward; every rank of the group must call, also with n = 0. The gradient can be taken
    once. Raises ValueError, on all ranks alike, naming argument and row: a teacher that cannot serve the objective,
    shapes that disagree, ids outside the vocabulary, NaN logits, top-k log-probs that are not normalised, a negative
    entropy.
    """
    if not isinstance(teacher, TeacherLogits | TeacherTopK):
        raise ValueError(f"teacher: {type(teacher).__name__}, expected TeacherLogits or TeacherTopK")
    signal: Signal = "topk" if isinstance(teacher, TeacherTopK) else "logits"
    refusal = objective.refusal(signal)
    if refusal is not None:
        raise ValueError(f"objective: {refusal}")
    if inplace_backward and student_logits.is_leaf and student_logits.requires_grad:
        raise ValueError("inplace_backward: student_logits is a leaf, whose values the gradient would destroy")
    shard = Shard.of("student_logits", student_logits, vocab_size, group, chunk)
    checks = Checks()
    _check_tokens(checks, student_logits, vocab_size, tokens=tokens, teacher_tokens=teacher_tokens)
    n = student_logits.shape[0]
    if old_logprobs is not None:
        require_shape("old_logprobs", old_logprobs, (n,), "student_logits has rows")
        checks.refuse_logprobs("old_logprobs", old_logprobs)
    with torch.no_grad():
        logits = student_logits.detach()
        tokens = tokens.long()
        if isinstance(teacher, TeacherTopK):
            teacher_logits = None
            seen = from_top_k(logits, teacher, tokens, objective, shard, checks)
        else:
            teacher_logits = teacher.logits.detach()
            asked = tokens if teacher_tokens is None else teacher_tokens.long()
            seen = from_logits(logits, teacher_logits, tokens, asked, objective, shard, checks)
        gate, ambiguous = gate_of(objective, seen.teacher_entropy, seen.entropy_upper)
        combined = combine(
            objective,
            gate=gate,
            student_logprob=seen.student_logprob,
            teacher_logprob=seen.teacher_logprob,
            old_logprobs=None if old_logprobs is None else old_logprobs.detach().to(gate.dtype),
            student=seen.student,
            teacher=seen.teacher,
            gaps=seen.gaps,
            kept=seen.kept,
        )
    recipe = Recipe(
        shard=shard,
        student=seen.student,
        teacher=seen.teacher,
        coefficients=combined.coefficients,
        tokens=tokens,
        kept_ids=None if seen.kept is None else seen.kept.ids,
        careful=seen.careful,
    )
    needs_teacher = bool(combined.coefficients.ratio) or combined.coefficients.teacher is not None
    loss = _WithGradient.apply(
        student_logits, teacher_logits if needs_teacher else None, _Value(combined.loss), recipe, inplace_backward
    )
    return TokenLosses(
        loss=loss,
        teacher_entropy=seen.teacher_entropy,
        student_entropy=seen.student.entropy,
        forward_kl=combined.forward_kl,
        reverse_kl=combined.reverse_kl,
        gate=gate,
        gate_ambiguous=ambiguous,
        student_logprob=seen.student_logprob,
        teacher_logprob=seen.teacher_logprob,
        clipped=combined.clipped,
    )


@torch.no_grad()
def token_statistics(
    logits: Tensor, tokens: Tensor, *, vocab_size: int, group: ProcessGroup | None = None, chunk: int | None = None
) -> TokenStatistics:
    """Log-prob of each sampled token and entropy, without gradient, in one collective.

    logits: [n, columns of this rank], unchanged; tokens: [n] ids. The log-probs have the bits of
    `TokenLosses.student_logprob`.
    """
    shard = Shard.of("logits", logits, vocab_size, group, chunk)
    checks = Checks()
    _check_tokens(checks, logits, vocab_size, tokens=tokens)
    checks.run()
    logits, asked = logits.detach(), tokens.long()[:, None]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    sums = partial_sums(logits, None, shard, dtype=dtype)[0]["student"]
    parts = shard.exchange({"sums": sums, "token": look_up(logits, shard, asked, dtype)})
    softmax = merge(parts["sums"])[0]
    checks.refuse_broken("logits", softmax.broken)
    checks.run()
    return TokenStatistics(softmax.logprob(shard.pick(parts["token"], asked.T))[0], softmax.entropy)


def _check_tokens(checks: Checks, logits: Tensor, vocab_size: int, **ids: Tensor | None) -> None:
    for name, value in ids.items():
        if value is not None:
            require_integers(name, value)
            require_shape(name, value, (logits.shape[0],), "the logits have rows")
            checks.refuse_ids(name, value, vocab_size)


@dataclass(frozen=True)
class _Value:
    """Hides a tensor from autograd's bookkeeping of inputs."""

    tensor: Tensor


class _WithGradient(torch.autograd.Function):
    """Gives the loss, computed already, its gradient over the student's logits."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, loss: _Value, recipe: Recipe, inplace: bool
    ) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.recipe, ctx.inplace = recipe, inplace
        return loss.tensor

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True: a derivative of the gradient would be wanted
            raise RuntimeError("entropy_aware_loss: its gradient has no derivative; use no create_graph=True")
        if ctx.recipe is None:
            raise RuntimeError("entropy_aware_loss: backward ran already; call the loss again for another backward")
        student, teacher = ctx.saved_tensors
        recipe, ctx.recipe = ctx.recipe, None
        out = student.detach() if ctx.inplace else torch.empty_like(student)
        write_gradient(recipe, student.detach(), teacher, upstream, out)
        return out, None, None, None, None
