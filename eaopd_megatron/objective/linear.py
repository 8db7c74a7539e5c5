"""The entropy-aware loss from hidden states and output heads: logits are made tile by tile and never kept.

A tile is the product of some rows of the hidden states and a block of the head's rows: what its logits say of each
token joins that of the tiles beside it, and one collective joins the ranks'. Backward makes the tiles again, writes the
gradient over them, and adds their products with the head and the hidden states to fp32 sums. The teacher's tiles are
made again only for the rows that need them.

Logits have the inputs' precision, as those of an output layer have: bf16 inputs give bf16 logits, and the same values
as `entropy_aware_loss` on the layer's output up to the order in which a product adds. All else is fp32 (fp64 for fp64).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from eaopd_megatron.objective.checks import Checks, require_matrix, require_shape
from eaopd_megatron.objective.gradient import Recipe, once, write_gradient
from eaopd_megatron.objective.partial_stats import (
    Rows,
    Wanted,
    check_top_k,
    contribution,
    from_both,
    from_top_k,
    join,
    wanted_of,
)
from eaopd_megatron.objective.settings import GPU_TILE_ELEMENTS, Objective, Signal
from eaopd_megatron.objective.teacher import TeacherHidden, TeacherTopK
from eaopd_megatron.objective.token_losses import TokenLosses, TokenStatistics, check_old_logprobs, check_tokens, judge
from eaopd_megatron.objective.vocab_parallel import Shard, Softmax

HiddenGrad = Literal["all_reduce", "partial"]

# Rows and elements of a tile: large enough for products at full speed. On a CPU, elements a thread.
CPU_ROWS, CPU_TILE_ELEMENTS = 1024, 1 << 20
GPU_ROWS = 2048
WIDE_TILE_ELEMENTS = 1 << 24  # where S is to be found, which is quicker in whole rows than in pieces of them
STUDENT, TEACHER = "student_hidden · student_head_weight", "teacher.hidden · teacher.head_weight"


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
    """`entropy_aware_loss` of the logits student_hidden · student_head_weightᵀ, which are never stored.

    student_hidden  [n, h], the same on every rank of the group; unchanged, as the weights are
    student_head_weight  [columns, h], this rank's rows of the output head, padded to ranks · columns, in the same dtype
    teacher         TeacherHidden with a head of the same columns, or TeacherTopK
    chunk           rows of hidden states worked at together; None: what suits the machine. Changes time and memory
    hidden_grad     "all_reduce": the gradient of student_hidden is summed over the group; "partial": it is this rank's
                    part, for a caller whose own backward sums the parts (the gather under sequence parallelism)
    The other arguments are those of `entropy_aware_loss`.

    The gradient of student_head_weight is this rank's rows, summed in fp32 and given in the weight's precision; those
    of padding are 0. One collective forward; backward one that sums the gradient of student_hidden, with "partial"
    none. An input that wants no gradient costs none. Memory beyond inputs and gradients: a tile's logits and buffers,
    an fp32 sum of the head's size, an fp32 copy of the gradient that is summed over the group, and up to 0.3 kB a token
    and rank for the exchange. Raises what `entropy_aware_loss` raises.
    """
    if not isinstance(teacher, TeacherHidden | TeacherTopK):
        raise ValueError(f"teacher: {type(teacher).__name__}, expected TeacherHidden or TeacherTopK")
    signal: Signal = "topk" if isinstance(teacher, TeacherTopK) else "hidden"
    refusal = objective.refusal(signal)
    if refusal is not None:
        raise ValueError(f"objective: {refusal}")
    if hidden_grad not in get_args(HiddenGrad):
        raise ValueError(f"hidden_grad: {hidden_grad!r} is not one of {', '.join(get_args(HiddenGrad))}")
    student, shard = _student(student_hidden, student_head_weight, "student_", vocab_size, group, chunk)
    n, checks = student.hidden.shape[0], Checks()
    check_tokens(checks, n, vocab_size, tokens=tokens, teacher_tokens=teacher_tokens)
    check_old_logprobs(checks, n, old_logprobs)
    top_k = teacher if isinstance(teacher, TeacherTopK) else None
    full = None
    if isinstance(teacher, TeacherTopK):
        check_top_k(teacher, n, objective, vocab_size, checks)
    else:
        full = _Side(teacher.hidden.detach(), teacher.head_weight.detach())
        full.check("teacher.")
        require_shape("teacher.hidden", full.hidden, (n, full.hidden.shape[1]), "student_hidden has rows")
        columns = (shard.columns, full.hidden.shape[1])
        require_shape(
            "teacher.head_weight", full.weight, columns, "student_head_weight has rows and teacher.hidden columns"
        )
    checks.run()
    with torch.no_grad():
        tokens = tokens.long()
        asked = tokens if teacher_tokens is None else teacher_tokens.long()
        wanted = wanted_of(objective, top_k, tokens, asked, vocab_size)
        whole = join(shard.exchange(_contribution(student, full, shard, wanted)))
        if top_k is not None:
            seen = from_top_k(whole, wanted, top_k, vocab_size, checks, STUDENT)
        else:
            seen = from_both(whole, checks, STUDENT, TEACHER)
        losses, recipe = judge(objective, seen, shard, tokens, old_logprobs, careful=False)
    if full is not None and not recipe.coefficients.ratio and recipe.coefficients.teacher is None:
        full = None
    kept = (None, None) if full is None else (full.hidden, full.weight)
    loss = _WithGradient.apply(
        student_hidden, student_head_weight, *kept, _Rest(losses.loss, recipe, hidden_grad == "all_reduce")
    )
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
    """`token_statistics` of the logits hidden · head_weightᵀ, which are never stored. One collective.

    hidden: [n, h], the same on every rank; head_weight: [columns, h]; tokens: [n] ids. For the same rows and chunk the
    log-probs have the bits of `linear_entropy_aware_loss`.
    """
    side, shard = _student(hidden, head_weight, "", vocab_size, group, chunk)
    checks = Checks()
    check_tokens(checks, len(hidden), vocab_size, tokens=tokens)
    checks.run()
    whole = join(shard.exchange(_contribution(side, None, shard, Wanted(tokens.long()[:, None]))))
    softmax = Softmax(*whole["student"])
    checks.refuse_broken("hidden · head_weight", softmax.broken)
    checks.run()
    return TokenStatistics(softmax.logprob(whole["asked"])[0], softmax.entropy)


@dataclass(frozen=True)
class _Side:
    """Hidden states [n, h] and this rank's rows of the head [columns, h]."""

    hidden: Tensor
    weight: Tensor

    def check(self, prefix: str) -> None:
        """Refuse what cannot be multiplied."""
        require_matrix(f"{prefix}hidden", self.hidden, "[n, h]")
        require_matrix(f"{prefix}head_weight", self.weight, "[columns, h]")
        if self.weight.dtype != self.hidden.dtype:
            raise ValueError(
                f"{prefix}head_weight: {self.weight.dtype}, expected {self.hidden.dtype} as {prefix}hidden"
            )

    def tile(self, hidden: Tensor, block: slice, memory: Tensor) -> Tensor:
        """Logits [c, block] of some of the hidden states [c, h], in ``memory``."""
        shape = len(hidden), block.stop - block.start
        return torch.mm(hidden, self.weight[block].T, out=memory[: shape[0] * shape[1]].view(shape))


@dataclass(frozen=True)
class _Tiles:
    """How n tokens and a shard's valid columns are cut."""

    n: int
    valid: int
    rows: int
    width: int

    @classmethod
    def of(cls, n: int, shard: Shard, device: torch.device, *, wide: bool = False) -> _Tiles:
        """Tiles of a fixed number of elements; fewer rows have wider blocks. wide: one block of all columns."""
        cpu, valid = device.type == "cpu", max(shard.valid, 1)
        elements = CPU_TILE_ELEMENTS * torch.get_num_threads() if cpu else GPU_TILE_ELEMENTS
        rows = CPU_ROWS if cpu else GPU_ROWS
        if wide:
            rows = min(rows, max(elements, WIDE_TILE_ELEMENTS) // valid)
        rows = max(1, min(n, shard.chunk or rows))
        width = max(1, elements // rows)
        return cls(n, shard.valid, rows, valid if wide else min(width - width % 64 or width, valid))

    def blocks(self) -> Iterator[slice]:
        """Blocks of columns."""
        for start in range(0, self.valid, self.width):
            yield slice(start, min(start + self.width, self.valid))

    def memory(self, side: _Side) -> Tensor:
        """Room for the logits of any tile."""
        return side.hidden.new_empty(self.rows * self.width)


def _student(
    hidden: Tensor, weight: Tensor, prefix: str, vocab_size: int, group: ProcessGroup | None, chunk: int | None
) -> tuple[_Side, Shard]:
    side = _Side(hidden.detach(), weight.detach())
    side.check(prefix)
    require_shape(f"{prefix}head_weight", weight, (len(weight), hidden.shape[1]), f"{prefix}hidden has columns")
    return side, Shard.of_columns(f"{prefix}head_weight", len(weight), vocab_size, group, chunk)


def _contribution(student: _Side, teacher: _Side | None, shard: Shard, wanted: Wanted) -> Rows:
    """This rank's contribution, [r, n]."""
    n = len(student.hidden)
    tiles = _Tiles.of(n, shard, student.hidden.device, wide=wanted.k > 0)
    memories = [None if side is None else tiles.memory(side) for side in (student, teacher)]
    blocks = list(tiles.blocks()) or [slice(0, 0)]  # a rank without valid columns contributes weights of 0
    parts: list[Rows] = []
    for start in range(0, max(n, 1), tiles.rows):
        part = slice(start, min(start + tiles.rows, n))
        found: Rows | None = None
        for block in blocks:
            logits = [
                None if side is None or memory is None else side.tile(side.hidden[part], block, memory)
                for side, memory in zip((student, teacher), memories, strict=True)
            ]
            assert logits[0] is not None
            rows, _ = contribution(logits[0], logits[1], shard.block(block), wanted.of(part), finite=True)
            found = rows if found is None else join({name: torch.stack([found[name], rows[name]]) for name in rows})
        assert found is not None
        parts.append(found)
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


@dataclass(frozen=True)
class _Rest:
    """What backward needs besides tensors that autograd watches; hides the loss from its bookkeeping of inputs."""

    loss: Tensor
    recipe: Recipe
    reduce: bool


class _WithGradient(torch.autograd.Function):
    """Gives the loss, computed already, its gradient over hidden states and head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor | None,
        teacher_weight: Tensor | None,
        rest: _Rest,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight)
        ctx.recipe, ctx.reduce = rest.recipe, rest.reduce
        return rest.loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        recipe: Recipe = once(ctx, "linear_entropy_aware_loss")
        hidden, weight, teacher_hidden, teacher_weight = ctx.saved_tensors
        teacher = None if teacher_hidden is None else _Side(teacher_hidden, teacher_weight)
        student = _Side(hidden.detach(), weight.detach())
        reduce = ctx.reduce and recipe.shard.ranks > 1
        # The ranks' parts cancel in part, and so would leave their rounding behind: it comes after their sum.
        dtype = torch.promote_types(hidden.dtype, torch.float32) if reduce else hidden.dtype
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        on_hidden, on_weight = _gradients(recipe, student, teacher, upstream, wanted, dtype)
        if on_hidden is not None and reduce:
            # Not every backend moves empty tensors.
            dist.all_reduce(on_hidden if on_hidden.numel() else upstream.new_zeros(1), group=recipe.shard.group)
            on_hidden = on_hidden.to(hidden.dtype)
        return on_hidden, on_weight, None, None, None


def _gradients(
    recipe: Recipe,
    student: _Side,
    teacher: _Side | None,
    upstream: Tensor,
    wanted: tuple[bool, bool],
    hidden_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """This rank's part of the gradient over the hidden states, and that over its rows of the head, where wanted."""
    shard = recipe.shard
    exact = torch.promote_types(student.hidden.dtype, torch.float32)
    on_hidden = torch.zeros_like(student.hidden, dtype=hidden_dtype) if wanted[0] else None
    on_weight = torch.zeros_like(student.weight, dtype=exact) if wanted[1] else None
    tiles = _Tiles.of(len(student.hidden), shard, student.hidden.device)
    memory = tiles.memory(student)
    teacher_memory = None if teacher is None else tiles.memory(teacher)
    for rows, side in _row_groups(recipe, teacher, upstream) if shard.valid else ():
        for part in rows.split(tiles.rows):
            some, weights, hidden = recipe.of(part), upstream[part], student.hidden[part]
            if side is None:
                some = replace(some, coefficients=replace(some.coefficients, teacher=None))
            teacher_hidden = None if side is None else side.hidden[part]
            sums = torch.zeros_like(hidden, dtype=exact) if wanted[0] else None
            for block in tiles.blocks():
                logits = student.tile(hidden, block, memory)
                teacher_logits = None
                if side is not None and teacher_hidden is not None and teacher_memory is not None:
                    teacher_logits = side.tile(teacher_hidden, block, teacher_memory)
                here = replace(some, shard=shard.block(block))
                write_gradient(here, logits, teacher_logits, weights, out=logits)
                if sums is not None:
                    _add_product(sums, logits, student.weight[block])
                if on_weight is not None:
                    _add_product(on_weight[block], logits.T, hidden)
            if on_hidden is not None and sums is not None:
                on_hidden[part] = sums.to(on_hidden.dtype)
    return on_hidden, None if on_weight is None else on_weight.to(student.weight.dtype)


def _row_groups(recipe: Recipe, teacher: _Side | None, upstream: Tensor) -> list[tuple[Tensor, _Side | None]]:
    """Rows whose gradient needs the teacher's logits, and rows whose gradient does not; not those without weight.

    The first come together, so that the teacher's products stay large.
    """
    counts, needs = upstream != 0, torch.zeros_like(upstream, dtype=torch.bool)
    if teacher is not None and recipe.coefficients.ratio:
        needs = counts
    elif teacher is not None and recipe.coefficients.teacher is not None:
        needs = counts & (recipe.coefficients.teacher != 0)
    groups = (needs.nonzero()[:, 0], teacher), ((counts & ~needs).nonzero()[:, 0], None)
    return [(rows, side) for rows, side in groups if len(rows)]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left · right, where total may have a higher precision than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)  # type: ignore[call-overload]
    else:
        total.add_(left @ right)
