"""The entropy-aware loss of arXiv 2603.07079 over vocabulary shards, and its gradient over this rank's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from eaopd_megatron.objective import triton_launch
from eaopd_megatron.objective.checks import InputChecks, require_shape
from eaopd_megatron.objective.partial_stats import (
    ReducedStats,
    StatsRequest,
    compute_partial_stats,
    merge_partial_stats,
)
from eaopd_megatron.objective.settings import Objective, Signal
from eaopd_megatron.objective.teacher import TeacherLogits, TeacherTopK, check_teacher_top_k
from eaopd_megatron.objective.token_losses import Coefficients, TokenLosses, TokenStatistics, compute_token_losses
from eaopd_megatron.objective.vocab_parallel import (
    Softmax,
    VocabShard,
    max_chunk_size,
    subtract_max,
    zero_columns,
    zero_safe_mul,
)

PerToken = TypeVar("PerToken", Softmax, Coefficients)


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
    """Return the loss of each token under `objective`, with the exact gradient over this rank's logits.

    student_logits    [tokens, vocab/tp], this rank's shard of the vocabulary padded to tp * columns; unchanged
    teacher           `TeacherLogits`, sharded alike, or `TeacherTopK`
    tokens            [tokens] ids of the sampled tokens y
    old_logprobs      [tokens] nats, log pi_old(y); None: the student's current ones, without gradient
    teacher_tokens    [tokens] ids whose log p(y) is read from `TeacherLogits`, where they differ from `tokens`;
                      a `TeacherTopK` holds that log-prob already
    vocab_size        size without padding; padded columns get zero gradient
    group             tensor-parallel group; None: a single rank holds the vocabulary
    chunk             tokens processed together; None: sized for the caches. Affects time and memory, not the result
    inplace_backward  write the gradient over student_logits instead of allocating it; nothing else may read them then

    One collective in forward, none in backward; every rank of the group must call, also with 0 tokens. The gradient can
    be taken once. Backward keeps only those rows of the teacher's logits that it needs: with a sampled reverse term or
    none, the rows whose gate is open; without an exact term, none. Raises ValueError on all ranks, naming argument and
    row: a teacher that cannot serve the objective, shapes that disagree, ids outside the vocabulary, NaN logits, top-k
    log-probs that are not normalised, a negative entropy.
    """
    if not isinstance(teacher, TeacherLogits | TeacherTopK):
        raise ValueError(f"teacher: {type(teacher).__name__}, expected TeacherLogits or TeacherTopK")
    require_servable(objective, "topk" if isinstance(teacher, TeacherTopK) else "logits")
    if inplace_backward and student_logits.is_leaf and student_logits.requires_grad:
        raise ValueError("inplace_backward: student_logits is a leaf, whose values the gradient would destroy")
    shard = VocabShard.from_logits("student_logits", student_logits, vocab_size, group, chunk)
    n, checks = student_logits.shape[0], InputChecks()
    checks.tokens((n,), vocab_size, "the student has rows", tokens=tokens, teacher_tokens=teacher_tokens)
    checks.old_logprobs(n, old_logprobs)
    top_k, teacher_logits = None, None
    if isinstance(teacher, TeacherTopK):
        top_k = teacher
        check_teacher_top_k(teacher, n, objective, vocab_size, checks)
    else:
        teacher_logits = teacher.logits.detach()
        require_shape("teacher.logits", teacher_logits, tuple(student_logits.shape), "student_logits has")
        if not teacher_logits.dtype.is_floating_point:
            raise ValueError(f"teacher.logits: {teacher_logits.dtype}, expected floating point")
    checks.raise_first()
    with torch.no_grad():
        tokens = tokens.long()
        teacher_ids = tokens if teacher_tokens is None else teacher_tokens.long()
        request = StatsRequest.for_objective(objective, top_k, tokens, teacher_ids, vocab_size)
        partial, has_neg_inf = compute_partial_stats(student_logits.detach(), teacher_logits, shard, request)
        merged = merge_partial_stats(shard.all_gather(partial))
        names = ("student_logits", "teacher.logits")
        stats = ReducedStats.from_merged(merged, request, top_k, vocab_size, checks, names)
        losses, coefficients = compute_token_losses(objective, stats, old_logprobs)
        saved = BackwardContext(shard, stats.student, stats.teacher, coefficients, tokens, has_neg_inf)
        kept_logits = None
        if teacher_logits is not None and student_logits.requires_grad:
            kept_logits, saved = _keep_needed_rows(teacher_logits, saved)
    loss = _WithGradient.apply(student_logits, kept_logits, (losses.loss,), saved, inplace_backward)
    return replace(losses, loss=loss)


@torch.no_grad()
def token_statistics(
    logits: Tensor, tokens: Tensor, *, vocab_size: int, group: ProcessGroup | None = None, chunk: int | None = None
) -> TokenStatistics:
    """Return log q(y) and the entropy of each token, without gradient, in one collective.

    logits: [tokens, vocab/tp], unchanged; tokens: [tokens] ids. On a CPU the log-probs are bitwise equal to
    `TokenLosses.student_logprob`, on a GPU up to rounding.
    """
    shard = VocabShard.from_logits("logits", logits, vocab_size, group, chunk)
    checks = InputChecks()
    checks.tokens((len(logits),), vocab_size, "the student has rows", tokens=tokens)
    checks.raise_first()
    partial, _ = compute_partial_stats(logits.detach(), None, shard, StatsRequest(tokens.long()[:, None]))
    return token_statistics_of(merge_partial_stats(shard.all_gather(partial)), checks, "logits")


def token_statistics_of(merged: dict[str, Tensor], checks: InputChecks, name: str) -> TokenStatistics:
    """Return log q(y) and the entropy from merged statistics; errors call the logits `name`."""
    softmax = Softmax(*merged["student"])
    checks.refuse_non_finite(name, softmax.has_nan_or_inf)
    checks.raise_first()
    return TokenStatistics(softmax.logprob(merged["gathered"])[0], softmax.entropy)


def require_servable(objective: Objective, signal: Signal) -> None:
    """Raise ValueError if a teacher that gives `signal` cannot serve the objective."""
    refusal = objective.refusal(signal)
    if refusal is not None:
        raise ValueError(f"objective: {refusal}")


@dataclass(frozen=True)
class BackwardContext:
    """What the gradient needs besides the logits; replicated on every rank but for shard and has_neg_inf."""

    shard: VocabShard
    student: Softmax
    teacher: Softmax | None
    coefficients: Coefficients
    tokens: Tensor  # [tokens] ids
    has_neg_inf: bool  # whether this rank's logits hold -inf
    teacher_rows: Tensor | None = None  # ascending rows whose teacher logits were kept; None: all

    def select_rows(self, rows: Tensor) -> BackwardContext:
        """Return the context of some of the tokens, for all of which the teacher's logits are available."""
        return replace(
            self,
            student=_select_rows(self.student, rows),
            teacher=None if self.teacher is None else _select_rows(self.teacher, rows),
            coefficients=_select_rows(self.coefficients, rows),
            tokens=self.tokens[rows],
        )


def take_saved(ctx: Any, name: str) -> BackwardContext:
    """Return the context of a backward pass. Raise RuntimeError on a second pass or under create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name}: its gradient has no derivative; use no create_graph=True")
    saved, ctx.saved = ctx.saved, None
    if saved is None:
        raise RuntimeError(f"{name}: backward ran already; call the loss again for another backward")
    return saved


def write_gradient(
    saved: BackwardContext, student: Tensor, teacher: Tensor | None, upstream: Tensor, out: Tensor
) -> None:
    """Write upstream[:, None] * d loss / d student into `out` [tokens, vocab/tp], with zeros in padded columns.

    teacher: the logits of saved.teacher_rows, for an exact forward term, or of all rows, for an exact reverse term.
    `out` may be `student` itself.
    """
    shard, c = saved.shard, saved.coefficients
    valid = shard.num_valid
    out[:, valid:].zero_()
    if valid == 0:
        return
    dtype = saved.student.sum_exp.dtype
    upstream = upstream.to(dtype)

    def scale(value: Tensor, sum_exp: Tensor | None = None) -> Tensor:
        """Return upstream * value (/ Z). Rows with zero upstream give 0, even where value is inf or nan."""
        factor = upstream if sum_exp is None else upstream / sum_exp
        return torch.where(upstream == 0, 0.0, factor * value)

    kappa = scale(c.kappa, saved.student.sum_exp)
    reverse = scale(torch.full_like(kappa, c.reverse), saved.student.sum_exp) if c.reverse else None
    forward = scale(c.forward, saved.teacher.sum_exp) if c.forward is not None and saved.teacher else None
    token_column, token_owned = shard.local_columns(saved.tokens[:, None])
    token_addend = None if c.token is None else torch.where(token_owned, -scale(c.token)[:, None], 0.0)
    top_k = _top_k_gradient(saved, upstream, scale)

    needs_teacher = reverse is not None or forward is not None
    other = teacher if needs_teacher else None
    if dtype == torch.float32 and triton_launch.uses_kernels(student, other, out):
        factors = triton_launch.GradientFactors(
            student_max=saved.student.max_logit,
            kappa=kappa,
            reverse=reverse,
            teacher_max=None if saved.teacher is None else saved.teacher.max_logit,
            forward=forward,
            token=None if token_addend is None else (token_column[:, 0], token_addend[:, 0]),
            top_k=None if top_k is None else (top_k.columns, top_k.owned, top_k.addend),
            top_k_kappa=None if top_k is None else top_k.kappa,
        )
        triton_launch.launch_gradient(factors, student, other, saved.teacher_rows, valid, saved.has_neg_inf, out)
        if saved.teacher_rows is not None:
            factors, without = replace(factors, forward=None), torch.ones_like(kappa, dtype=torch.bool)
            without[saved.teacher_rows] = False
            others = without.nonzero()[:, 0]
            triton_launch.launch_gradient(factors, student, None, others, valid, saved.has_neg_inf, out)
        return
    chunks = list(shard.row_chunks(student.shape[0], student.device))
    num_buffers = 3 if needs_teacher else 2
    buffers = torch.empty(num_buffers, max_chunk_size(chunks) * valid, dtype=dtype, device=student.device)
    for chunk, (teacher_slice, rows) in zip(chunks, _teacher_slices(saved, chunks), strict=True):
        size = chunk.stop - chunk.start
        shifted, spare, *third = (buffer[: size * valid].view(size, valid) for buffer in buffers)
        target = out[chunk, :valid]
        result = target if target.dtype == dtype else spare

        subtract_max(student[chunk, :valid], saved.student.max_logit[chunk], shifted)
        torch.exp(shifted, out=result)  # q_j Z_s
        inside = None  # q_j Z_s times its kappa inside S, where that differs
        if top_k is not None and top_k.kappa is not None:
            inside = result.gather(1, top_k.columns[chunk])
        if needs_teacher:
            assert teacher is not None and saved.teacher is not None
            if rows is not None:
                third[0] = third[0][: len(rows)]
            max_logit = saved.teacher.max_logit[chunk if rows is None else rows]
            subtract_max(teacher[teacher_slice, :valid], max_logit, third[0])
        if reverse is not None:
            factor = shifted.sub_(third[0]).mul_(reverse[chunk, None])  # w_R D_j
            if saved.has_neg_inf:
                factor.masked_fill_((reverse == 0)[chunk, None], 0)
            if inside is not None and top_k is not None and top_k.kappa is not None:
                inside = zero_safe_mul(inside, factor.gather(1, top_k.columns[chunk]) + top_k.kappa[chunk, None])
            factor.add_(kappa[chunk, None])
            if saved.has_neg_inf:
                factor.masked_fill_(result == 0, 0)
            result.mul_(factor)
        else:
            if inside is not None and top_k is not None and top_k.kappa is not None:
                inside = inside * top_k.kappa[chunk, None]
            result.mul_(kappa[chunk, None])
        if forward is not None:  # - w_p p_j
            if rows is None:
                result.sub_(third[0].exp_().mul_(forward[chunk, None]))
            else:
                result.index_add_(0, rows - chunk.start, third[0].exp_().mul_(forward[rows, None]), alpha=-1)
        if top_k is not None:
            if inside is not None:
                zero_columns(result, top_k.columns[chunk], top_k.owned[chunk])
                result.scatter_add_(1, top_k.columns[chunk], torch.where(top_k.owned[chunk], inside, 0.0))
            result.scatter_add_(1, top_k.columns[chunk], top_k.addend[chunk])
        if token_addend is not None:
            result.scatter_add_(1, token_column[chunk], token_addend[chunk])
        if result is not target:
            target.copy_(result)


def _select_rows(values: PerToken, rows: Tensor) -> PerToken:
    """Return a dataclass of values per token, for some of the tokens."""
    taken: dict[str, Any] = {name: value[rows] for name, value in vars(values).items() if isinstance(value, Tensor)}
    return replace(values, **taken)


def _teacher_slices(saved: BackwardContext, chunks: list[slice]) -> list[tuple[slice, Tensor | None]]:
    """Return each chunk's slice of the kept teacher logits, and the rows these belong to (None: the whole chunk)."""
    if saved.teacher_rows is None:
        return [(chunk, None) for chunk in chunks]
    ends = torch.tensor([chunk.stop for chunk in chunks], device=saved.teacher_rows.device)
    stops = torch.searchsorted(saved.teacher_rows, ends).tolist()
    slices = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
    return [(part, saved.teacher_rows[part]) for part in slices]


@dataclass(frozen=True)
class _TopKGradient:
    """What the top-k forward terms add at this rank's columns of S."""

    columns: Tensor  # [tokens, k]
    owned: Tensor  # [tokens, k]
    addend: Tensor  # [tokens, k]
    kappa: Tensor | None  # [tokens], with a tail bucket


def _top_k_gradient(saved: BackwardContext, upstream: Tensor, scale: Callable[..., Tensor]) -> _TopKGradient | None:
    c = saved.coefficients
    if c.target is None or c.topk_ids is None:
        return None
    columns, owned = saved.shard.local_columns(c.topk_ids)
    addend = torch.where(owned & (upstream != 0)[:, None], -upstream[:, None] * c.target, 0.0)
    kappa = None if c.top_k_kappa is None else scale(c.top_k_kappa, saved.student.sum_exp)
    return _TopKGradient(columns, owned, addend, kappa)


def _keep_needed_rows(teacher: Tensor, saved: BackwardContext) -> tuple[Tensor | None, BackwardContext]:
    """Return the rows of the teacher's logits that the gradient needs."""
    if saved.coefficients.reverse:
        return teacher, saved
    if saved.coefficients.forward is None:
        return None, saved
    rows = saved.coefficients.forward.nonzero()[:, 0]
    if len(rows) == len(teacher):
        return teacher, saved
    return teacher[rows], replace(saved, teacher_rows=rows)


class _WithGradient(torch.autograd.Function):
    """Attach the gradient over the student's logits to a loss that is computed already, in a tuple: autograd would take
    a bare tensor for an input."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, loss: tuple[Tensor], saved: BackwardContext, inplace: bool
    ) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.saved, ctx.inplace = saved, inplace
        return loss[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = take_saved(ctx, "entropy_aware_loss")
        student, teacher = ctx.saved_tensors
        out = student.detach() if ctx.inplace else torch.empty_like(student)
        write_gradient(saved, student.detach(), teacher, upstream, out)
        return out, None, None, None, None
