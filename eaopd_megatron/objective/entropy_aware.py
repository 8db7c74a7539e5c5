"""The entropy-aware loss of arXiv 2603.07079 over vocabulary shards: the public call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from eaopd_megatron.objective.checks import Checks, require_shape
from eaopd_megatron.objective.gradient import Recipe, once, write_gradient
from eaopd_megatron.objective.partial_stats import (
    Wanted,
    check_top_k,
    contribution,
    from_both,
    from_top_k,
    join,
    wanted_of,
)
from eaopd_megatron.objective.settings import Objective, Signal
from eaopd_megatron.objective.teacher import TeacherLogits, TeacherTopK
from eaopd_megatron.objective.token_losses import TokenLosses, TokenStatistics, check_old_logprobs, check_tokens, judge
from eaopd_megatron.objective.vocab_parallel import Shard, Softmax


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
    once. Of the teacher's logits only the rows that the gradient needs are kept: with a sampled reverse term or none,
    those whose gate is open, and none at all without an exact term. Raises ValueError, on all ranks alike, naming
    argument and row: a teacher that cannot serve the objective, shapes that disagree, ids outside the vocabulary, NaN
    logits, top-k log-probs that are not normalised, a negative entropy.
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
    n, checks = student_logits.shape[0], Checks()
    check_tokens(checks, n, vocab_size, tokens=tokens, teacher_tokens=teacher_tokens)
    check_old_logprobs(checks, n, old_logprobs)
    top_k = teacher if isinstance(teacher, TeacherTopK) else None
    teacher_logits = None
    if isinstance(teacher, TeacherTopK):
        check_top_k(teacher, n, objective, vocab_size, checks)
    else:
        teacher_logits = teacher.logits.detach()
        require_shape("teacher.logits", teacher_logits, tuple(student_logits.shape), "student_logits has")
        if not teacher_logits.dtype.is_floating_point:
            raise ValueError(f"teacher.logits: {teacher_logits.dtype}, expected floating point")
    checks.run()
    with torch.no_grad():
        tokens = tokens.long()
        asked = tokens if teacher_tokens is None else teacher_tokens.long()
        wanted = wanted_of(objective, top_k, tokens, asked, vocab_size)
        rows, careful = contribution(student_logits.detach(), teacher_logits, shard, wanted)
        whole = join(shard.exchange(rows))
        if top_k is not None:
            seen = from_top_k(whole, wanted, top_k, vocab_size, checks, "student_logits")
        else:
            seen = from_both(whole, checks, "student_logits", "teacher.logits")
        losses, recipe = judge(objective, seen, shard, tokens, old_logprobs, careful=careful)
        kept = None
        if teacher_logits is not None and student_logits.requires_grad:
            kept, recipe = _keep(teacher_logits, recipe)
    loss = _WithGradient.apply(student_logits, kept, _Value(losses.loss), recipe, inplace_backward)
    return replace(losses, loss=loss)


@torch.no_grad()
def token_statistics(
    logits: Tensor, tokens: Tensor, *, vocab_size: int, group: ProcessGroup | None = None, chunk: int | None = None
) -> TokenStatistics:
    """Log-prob of each sampled token and entropy, without gradient, in one collective.

    logits: [n, columns of this rank], unchanged; tokens: [n] ids. On a CPU the log-probs have the
    bits of `TokenLosses.student_logprob`, on a GPU its value up to rounding.
    """
    shard = Shard.of("logits", logits, vocab_size, group, chunk)
    checks = Checks()
    check_tokens(checks, logits.shape[0], vocab_size, tokens=tokens)
    checks.run()
    rows, _ = contribution(logits.detach(), None, shard, Wanted(tokens.long()[:, None]))
    whole = join(shard.exchange(rows))
    softmax = Softmax(*whole["student"])
    checks.refuse_broken("logits", softmax.broken)
    checks.run()
    return TokenStatistics(softmax.logprob(whole["asked"])[0], softmax.entropy)


def _keep(teacher: Tensor, recipe: Recipe) -> tuple[Tensor | None, Recipe]:
    """The teacher's logits that the gradient needs."""
    if recipe.coefficients.ratio:
        return teacher, recipe
    if recipe.coefficients.teacher is None:
        return None, recipe
    rows = recipe.coefficients.teacher.nonzero()[:, 0]
    if len(rows) == len(teacher):
        return teacher, recipe
    return teacher[rows], replace(recipe, teacher_rows=rows)


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
        recipe = once(ctx, "entropy_aware_loss")
        student, teacher = ctx.saved_tensors
        out = student.detach() if ctx.inplace else torch.empty_like(student)
        write_gradient(recipe, student.detach(), teacher, upstream, out)
        return out, None, None, None, None
