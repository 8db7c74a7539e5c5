"""The entropy-aware loss from hidden states and output heads: logits are computed tile by tile and never stored.

A tile is the product of some rows of the hidden states and a block of the head's rows. Forward merges the statistics of
all tiles and then, in one collective, those of the ranks. Backward computes the tiles and their gradient, and adds its
products with the head and with the hidden states to fp32 sums. The teacher's tiles are computed again only for the
rows that need them.

Everything is fp32 whatever the inputs' precision (fp64 for fp64 inputs). Products of bf16 inputs are summed in fp32 and
the logits not rounded, as an output layer's are, which would move a log-prob by 0.01 or more. Only the gradient over a
tile's logits has the inputs' precision: it is a factor of the next products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from eaopd_megatron.objective.checks import InputChecks, require_matrix, require_shape
from eaopd_megatron.objective.entropy_aware import (
    BackwardContext,
    require_servable,
    take_saved,
    token_statistics_of,
    write_gradient,
)
from eaopd_megatron.objective.partial_stats import (
    PartialStats,
    ReducedStats,
    StatsRequest,
    compute_partial_stats,
    merge_partial_stats,
)
from eaopd_megatron.objective.settings import GPU_TILE_ELEMENTS, Objective
from eaopd_megatron.objective.teacher import TeacherHidden, TeacherTopK, check_teacher_top_k
from eaopd_megatron.objective.token_losses import TokenLosses, TokenStatistics, compute_token_losses
from eaopd_megatron.objective.vocab_parallel import VocabShard

HiddenGrad = Literal["all_reduce", "partial"]

# Rows and elements of a tile: large enough for matrix products at full speed. On a CPU: elements per thread.
_CPU_ROWS, CPU_TILE_ELEMENTS = 1024, 1 << 20
_GPU_ROWS = 2048
_WIDE_TILE_ELEMENTS = 1 << 24  # where S is selected from the tiles, which is faster in whole rows
_LOGITS = ("student_hidden · student_head_weight", "teacher.hidden · teacher.head_weight")  # what errors call them


def linear_entropy_aware_loss(
    student_hidden: Tensor,
    student_head_weight: Tensor,
    teacher: TeacherHidden | TeacherTopK,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    *,
    teacher_tokens: Tensor | None = None,
    objective: Objective,
    vocab_size: int,
    group: ProcessGroup | None = None,
    chunk: int | None = None,
    hidden_grad: HiddenGrad = "all_reduce",
) -> TokenLosses:
    """Return `entropy_aware_loss` of the logits student_hidden @ student_head_weight.T, which are never stored.

    student_hidden       [tokens, hidden], replicated over the group; unchanged, as the weights are
    student_head_weight  [vocab/tp, hidden], this rank's rows of the output head, padded to tp * columns, same dtype
    teacher              `TeacherHidden` with a head of as many rows, or `TeacherTopK`
    chunk                rows of hidden states processed together; None: chosen for the device. Affects time and memory
    hidden_grad          "all_reduce": the gradient of student_hidden is summed over the group; "partial": it is this
                         rank's part, for a caller whose backward sums the parts (the gather under sequence parallelism)

    The other arguments are those of `entropy_aware_loss`. The gradient of student_head_weight covers this rank's rows,
    is summed in fp32 and cast to the weight's dtype; padded rows get zero. One collective in forward; one in backward,
    which sums the gradient of student_hidden ("partial": none). An input that requires no gradient costs none. Memory
    beyond inputs and gradients: a tile's logits and buffers, an fp32 sum of the head's size, an fp32 copy of the hidden
    states' gradient if it is summed over the group, and up to `MAX_EXCHANGE_BYTES_PER_TOKEN` per rank. Raises what
    `entropy_aware_loss` raises.
    """
    if not isinstance(teacher, TeacherHidden | TeacherTopK):
        raise ValueError(f"teacher: {type(teacher).__name__}, expected TeacherHidden or TeacherTopK")
    require_servable(objective, "topk" if isinstance(teacher, TeacherTopK) else "hidden")
    if hidden_grad not in get_args(HiddenGrad):
        raise ValueError(f"hidden_grad: {hidden_grad!r} is not one of {', '.join(get_args(HiddenGrad))}")
    student, shard = _student(student_hidden, student_head_weight, "student_", vocab_size, group, chunk)
    n, checks = student.hidden.shape[0], InputChecks()
    checks.tokens((n,), vocab_size, "the student has rows", tokens=tokens, teacher_tokens=teacher_tokens)
    checks.old_logprobs(n, old_logprobs)
    top_k, full = None, None
    if isinstance(teacher, TeacherTopK):
        top_k = teacher
        check_teacher_top_k(teacher, n, objective, vocab_size, checks)
    else:
        full = _HiddenAndHead(teacher.hidden.detach(), teacher.head_weight.detach())
        full.check("teacher.")
        require_shape("teacher.hidden", full.hidden, (n, full.hidden.shape[1]), "student_hidden has rows")
        shape = (shard.columns, full.hidden.shape[1])
        reference = "student_head_weight has rows and teacher.hidden columns"
        require_shape("teacher.head_weight", full.weight, shape, reference)
    checks.raise_first()
    with torch.no_grad():
        tokens = tokens.long()
        teacher_ids = tokens if teacher_tokens is None else teacher_tokens.long()
        request = StatsRequest.for_objective(objective, top_k, tokens, teacher_ids, vocab_size)
        merged = merge_partial_stats(shard.all_gather(_tiled_partial_stats(student, full, shard, request)))
        stats = ReducedStats.from_merged(merged, request, top_k, vocab_size, checks, _LOGITS)
        losses, coefficients = compute_token_losses(objective, stats, old_logprobs)
        saved = BackwardContext(shard, stats.student, stats.teacher, coefficients, tokens, has_neg_inf=False)
    if full is not None and not coefficients.reverse and coefficients.forward is None:
        full = None
    kept = (None, None) if full is None else (full.hidden, full.weight)
    arguments = (losses.loss,), saved, hidden_grad == "all_reduce"
    loss = _WithGradient.apply(student_hidden, student_head_weight, *kept, *arguments)
    return replace(losses, loss=loss)


@torch.no_grad()
def linear_token_statistics(
    hidden: Tensor,
    head_weight: Tensor,
    tokens: Tensor,
    *,
    vocab_size: int,
    group: ProcessGroup | None = None,
    chunk: int | None = None,
) -> TokenStatistics:
    """Return `token_statistics` of the logits hidden @ head_weight.T, which are never stored. One collective.

    hidden: [tokens, hidden], replicated; head_weight: [vocab/tp, hidden]; tokens: [tokens] ids. For the same rows and
    chunk the log-probs are bitwise equal to those of `linear_entropy_aware_loss`.
    """
    student, shard = _student(hidden, head_weight, "", vocab_size, group, chunk)
    checks = InputChecks()
    checks.tokens((len(hidden),), vocab_size, "the student has rows", tokens=tokens)
    checks.raise_first()
    partial = _tiled_partial_stats(student, None, shard, StatsRequest(tokens.long()[:, None]))
    return token_statistics_of(merge_partial_stats(shard.all_gather(partial)), checks, "hidden · head_weight")


@dataclass(frozen=True)
class _HiddenAndHead:
    """Hidden states [tokens, hidden] and this rank's rows of the head [vocab/tp, hidden]."""

    hidden: Tensor
    weight: Tensor

    @property
    def logits_dtype(self) -> torch.dtype:
        return torch.promote_types(self.hidden.dtype, torch.float32)

    def check(self, prefix: str) -> None:
        """Raise ValueError unless they can be multiplied."""
        require_matrix(f"{prefix}hidden", self.hidden, "[n, h]")
        require_matrix(f"{prefix}head_weight", self.weight, "[columns, h]")
        if self.weight.dtype != self.hidden.dtype:
            raise ValueError(
                f"{prefix}head_weight: {self.weight.dtype}, expected {self.hidden.dtype} as {prefix}hidden"
            )

    def tile(self, hidden: Tensor, block: slice, memory: Tensor) -> Tensor:
        """Return the logits [rows, block] of some hidden states [rows, hidden], written into `memory`."""
        shape = len(hidden), block.stop - block.start
        return product_into(memory[: shape[0] * shape[1]].view(shape), hidden, self.weight[block].T)


@dataclass(frozen=True)
class _Tiling:
    """How n tokens and a shard's valid columns are split into tiles."""

    n: int
    num_valid: int
    rows: int
    width: int

    @classmethod
    def of(cls, n: int, shard: VocabShard, device: torch.device, *, wide: bool = False) -> _Tiling:
        """Return tiles of a fixed number of elements; fewer rows get wider blocks. wide: one block of all columns."""
        cpu, valid = device.type == "cpu", max(shard.num_valid, 1)
        elements = CPU_TILE_ELEMENTS * torch.get_num_threads() if cpu else GPU_TILE_ELEMENTS
        rows = _CPU_ROWS if cpu else _GPU_ROWS
        if wide:
            rows = min(rows, max(elements, _WIDE_TILE_ELEMENTS) // valid)
        rows = max(1, min(n, shard.chunk or rows))
        width = max(1, elements // rows)
        return cls(n, shard.num_valid, rows, valid if wide else min(width - width % 64 or width, valid))

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.num_valid, self.width):
            yield slice(start, min(start + self.width, self.num_valid))

    def allocate(self, factors: _HiddenAndHead) -> Tensor:
        """Return memory for the logits of any tile."""
        return factors.hidden.new_empty(self.rows * self.width, dtype=factors.logits_dtype)


def _student(
    hidden: Tensor, weight: Tensor, prefix: str, vocab_size: int, group: ProcessGroup | None, chunk: int | None
) -> tuple[_HiddenAndHead, VocabShard]:
    student = _HiddenAndHead(hidden.detach(), weight.detach())
    student.check(prefix)
    require_shape(f"{prefix}head_weight", weight, (len(weight), hidden.shape[1]), f"{prefix}hidden has columns")
    return student, VocabShard.from_columns(f"{prefix}head_weight", len(weight), vocab_size, group, chunk)


def _tiled_partial_stats(
    student: _HiddenAndHead, teacher: _HiddenAndHead | None, shard: VocabShard, request: StatsRequest
) -> PartialStats:
    """Return this rank's statistics, each [r, tokens], merged over its tiles."""
    n = len(student.hidden)
    tiling = _Tiling.of(n, shard, student.hidden.device, wide=request.top_k > 0)
    memory = tiling.allocate(student)
    teacher_memory = None if teacher is None else tiling.allocate(teacher)
    blocks = list(tiling.blocks()) or [slice(0, 0)]  # a rank without valid columns contributes weights of 0
    parts: list[PartialStats] = []
    for start in range(0, max(n, 1), tiling.rows):
        rows = slice(start, min(start + tiling.rows, n))
        merged: PartialStats | None = None
        for block in blocks:
            logits, teacher_logits = student.tile(student.hidden[rows], block, memory), None
            if teacher is not None and teacher_memory is not None:
                teacher_logits = teacher.tile(teacher.hidden[rows], block, teacher_memory)
            stats, _ = compute_partial_stats(
                logits, teacher_logits, shard.column_block(block), request.rows(rows), assume_finite=True
            )
            if merged is None:
                merged = stats
            else:
                merged = merge_partial_stats({name: torch.stack([merged[name], stats[name]]) for name in stats})
        assert merged is not None
        parts.append(merged)
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


class _WithGradient(torch.autograd.Function):
    """Attach the gradients over hidden states and head to a loss that is computed already, in a tuple: autograd would
    take a bare tensor for an input."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        loss: tuple[Tensor],
        saved: BackwardContext,
        reduce: bool,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight)
        ctx.saved, ctx.reduce = saved, reduce
        return loss[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = take_saved(ctx, "linear_entropy_aware_loss")
        hidden, weight, teacher_hidden, teacher_weight = ctx.saved_tensors
        teacher = None if teacher_hidden is None else _HiddenAndHead(teacher_hidden, teacher_weight)
        student = _HiddenAndHead(hidden.detach(), weight.detach())
        reduce = ctx.reduce and saved.shard.tp_size > 1
        # the ranks' parts cancel in part, which would leave the rounding of each: it is rounded after the sum
        dtype = torch.promote_types(hidden.dtype, torch.float32) if reduce else hidden.dtype
        needs_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden, grad_weight = _gradients(saved, student, teacher, upstream, needs_grad, dtype)
        if grad_hidden is not None and reduce:
            # not every backend transfers empty tensors
            dist.all_reduce(grad_hidden if grad_hidden.numel() else upstream.new_zeros(1), group=saved.shard.group)
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _gradients(
    saved: BackwardContext,
    student: _HiddenAndHead,
    teacher: _HiddenAndHead | None,
    upstream: Tensor,
    needs_grad: tuple[bool, bool],
    hidden_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Return this rank's part of the hidden states' gradient, and the gradient of its rows of the head, if needed."""
    shard = saved.shard
    accumulate = student.logits_dtype
    grad_hidden = torch.zeros_like(student.hidden, dtype=hidden_dtype) if needs_grad[0] else None
    grad_weight = torch.zeros_like(student.weight, dtype=accumulate) if needs_grad[1] else None
    tiling = _Tiling.of(len(student.hidden), shard, student.hidden.device)
    memory = tiling.allocate(student)
    rounded = memory.dtype != student.hidden.dtype
    gradient_memory = torch.empty_like(memory, dtype=student.hidden.dtype) if rounded else memory
    teacher_memory = None if teacher is None else tiling.allocate(teacher)
    for group_rows, group_teacher in _row_groups(saved, teacher, upstream) if shard.num_valid else ():
        for rows in group_rows.split(tiling.rows):
            saved_rows, upstream_rows, hidden = saved.select_rows(rows), upstream[rows], student.hidden[rows]
            if group_teacher is None:
                saved_rows = replace(saved_rows, coefficients=replace(saved_rows.coefficients, forward=None))
            teacher_hidden = None if group_teacher is None else group_teacher.hidden[rows]
            grad_rows = torch.zeros_like(hidden, dtype=accumulate) if needs_grad[0] else None
            for block in tiling.blocks():
                logits = student.tile(hidden, block, memory)
                teacher_logits = None
                if group_teacher is not None and teacher_hidden is not None and teacher_memory is not None:
                    teacher_logits = group_teacher.tile(teacher_hidden, block, teacher_memory)
                tile_saved = replace(saved_rows, shard=shard.column_block(block))
                gradient = gradient_memory[: logits.numel()].view(logits.shape)
                write_gradient(tile_saved, logits, teacher_logits, upstream_rows, out=gradient)
                if grad_rows is not None:
                    _add_product(grad_rows, gradient, student.weight[block])
                if grad_weight is not None:
                    _add_product(grad_weight[block], gradient.T, hidden)
            if grad_hidden is not None and grad_rows is not None:
                grad_hidden[rows] = grad_rows.to(grad_hidden.dtype)
    return grad_hidden, None if grad_weight is None else grad_weight.to(student.weight.dtype)


def _row_groups(
    saved: BackwardContext, teacher: _HiddenAndHead | None, upstream: Tensor
) -> list[tuple[Tensor, _HiddenAndHead | None]]:
    """Return the rows whose gradient needs the teacher's logits and those that do not, without rows of zero upstream.

    They are grouped so that the teacher's products stay large.
    """
    counts, needs = upstream != 0, torch.zeros_like(upstream, dtype=torch.bool)
    if teacher is not None and saved.coefficients.reverse:
        needs = counts
    elif teacher is not None and saved.coefficients.forward is not None:
        needs = counts & (saved.coefficients.forward != 0)
    groups = (needs.nonzero()[:, 0], teacher), ((counts & ~needs).nonzero()[:, 0], None)
    return [(rows, group_teacher) for rows, group_teacher in groups if len(rows)]


def product_into(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Set out = left @ right, summed in the precision of `out`, which may be higher than theirs. Returns `out`."""
    if out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)  # type: ignore[call-overload,no-any-return]
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, which may have a higher precision than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # type: ignore[call-overload]
    else:
        total.add_(left @ right)
