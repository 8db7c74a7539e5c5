"""The gradient over this rank's student logits, chunk by chunk, without a collective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eaopd_megatron.objective.backend import kernels_for
from eaopd_megatron.objective.vocab_parallel import Shard, Softmax, longest, shift, times, zero_at

if TYPE_CHECKING:
    from eaopd_megatron.objective.token_losses import Coefficients


@dataclass(frozen=True)
class Recipe:
    """All that the gradient needs besides the logits; numbers of a token, replicated on every rank."""

    shard: Shard
    student: Softmax
    teacher: Softmax | None
    coefficients: Coefficients
    tokens: Tensor  # [n] ids
    kept_ids: Tensor | None  # [n, k] ids
    careful: bool  # whether this rank's logits hold -inf
    teacher_rows: Tensor | None = None  # rows, ascending, of which the teacher's logits are there; None: of all

    def of(self, rows: Tensor) -> Recipe:
        """The same for some of the tokens, of all of which the teacher's logits are there."""
        return replace(
            self,
            student=_rows(self.student, rows),
            teacher=None if self.teacher is None else _rows(self.teacher, rows),
            coefficients=_rows(self.coefficients, rows),
            tokens=self.tokens[rows],
            kept_ids=None if self.kept_ids is None else self.kept_ids[rows],
        )


def once(ctx: Any, name: str) -> Recipe:
    """The recipe of a call's gradient; RuntimeError where it is wanted again, or with a derivative of its own."""
    if torch.is_grad_enabled():  # create_graph=True: a derivative of the gradient would be wanted
        raise RuntimeError(f"{name}: its gradient has no derivative; use no create_graph=True")
    recipe, ctx.recipe = ctx.recipe, None
    if recipe is None:
        raise RuntimeError(f"{name}: backward ran already; call the loss again for another backward")
    return recipe


def write_gradient(recipe: Recipe, student: Tensor, teacher: Tensor | None, upstream: Tensor, out: Tensor) -> None:
    """Write upstream[:, None] · d loss / d student into ``out`` [n, columns]; zero in padded columns.

    teacher: the logits of recipe.teacher_rows, wanted where an exact term is part of the loss; those of all rows where
    that is the reverse one. ``out`` may be ``student`` itself.
    """
    shard, c = recipe.shard, recipe.coefficients
    valid = shard.valid
    out[:, valid:].zero_()
    if valid == 0:
        return
    dtype = recipe.student.total.dtype
    upstream = upstream.to(dtype)

    def scaled(value: Tensor, total: Tensor | None = None) -> Tensor:
        """upstream · value (/ Z), a row that does not count being 0 whatever its value."""
        factor = upstream if total is None else upstream / total
        return torch.where(upstream == 0, 0.0, factor * value)

    kappa = scaled(c.kappa, recipe.student.total)
    ratio = scaled(torch.full_like(kappa, c.ratio), recipe.student.total) if c.ratio else None
    on_teacher = scaled(c.teacher, recipe.teacher.total) if c.teacher is not None and recipe.teacher else None
    token, owned = shard.locate(recipe.tokens[:, None])
    at_token = None if c.token is None else torch.where(owned, -scaled(c.token)[:, None], 0.0)
    kept = _at_kept(recipe, upstream, scaled)

    needs_teacher = ratio is not None or on_teacher is not None
    other = teacher if needs_teacher else None
    kernels = kernels_for(student, other, out) if dtype == torch.float32 else None
    if kernels is not None:
        numbers = kernels.Numbers(
            student_maximum=recipe.student.maximum,
            kappa=kappa,
            ratio=ratio,
            teacher_maximum=None if recipe.teacher is None else recipe.teacher.maximum,
            on_teacher=on_teacher,
            token=None if at_token is None else (token[:, 0], at_token[:, 0]),
            kept=None if kept is None else (kept.columns, kept.held, kept.added),
            kappa_inside=None if kept is None else kept.factor,
        )
        kernels.fill_gradient(numbers, student, other, recipe.teacher_rows, valid, recipe.careful, out)
        return
    parts = list(shard.chunks(student.shape[0], student.device))
    buffers = torch.empty(3 if needs_teacher else 2, longest(parts) * valid, dtype=dtype, device=student.device)
    for part, (there, rows) in zip(parts, _teacher_rows(recipe, parts), strict=True):
        size = part.stop - part.start
        first, second, *third = (buffer[: size * valid].view(size, valid) for buffer in buffers)
        target = out[part, :valid]
        result = target if target.dtype == dtype else second

        shift(student[part, :valid], recipe.student.maximum[part], first)
        torch.exp(first, out=result)
        inside = None  # q_j times its factor in S, where that is another one
        if kept is not None and kept.factor is not None:
            inside = result.gather(1, kept.columns[part])
        if needs_teacher:
            assert teacher is not None and recipe.teacher is not None
            if rows is not None:
                third[0] = third[0][: len(rows)]
            shift(teacher[there, :valid], recipe.teacher.maximum[part if rows is None else rows], third[0])
        if ratio is not None:
            factor = first.sub_(third[0]).mul_(ratio[part, None])
            if recipe.careful:
                factor.masked_fill_((ratio == 0)[part, None], 0)
            if inside is not None and kept is not None and kept.factor is not None:
                inside = times(inside, factor.gather(1, kept.columns[part]) + kept.factor[part, None])
            factor.add_(kappa[part, None])
            if recipe.careful:
                factor.masked_fill_(result == 0, 0)
            result.mul_(factor)
        else:
            if inside is not None and kept is not None and kept.factor is not None:
                inside = inside * kept.factor[part, None]
            result.mul_(kappa[part, None])
        if on_teacher is not None:
            if rows is None:
                result.sub_(third[0].exp_().mul_(on_teacher[part, None]))
            else:
                result.index_add_(0, rows - part.start, third[0].exp_().mul_(on_teacher[rows, None]), alpha=-1)
        if kept is not None:
            if inside is not None:
                zero_at(result, kept.columns[part], kept.held[part])
                result.scatter_add_(1, kept.columns[part], torch.where(kept.held[part], inside, 0.0))
            result.scatter_add_(1, kept.columns[part], kept.added[part])
        if at_token is not None:
            result.scatter_add_(1, token[part], at_token[part])
        if result is not target:
            target.copy_(result)


def _rows(numbers: Any, rows: Tensor) -> Any:
    """A dataclass of numbers of a token, for some of the tokens."""
    taken = {name: value[rows] for name, value in vars(numbers).items() if isinstance(value, Tensor)}
    return replace(numbers, **taken)


def _teacher_rows(recipe: Recipe, parts: list[slice]) -> list[tuple[slice, Tensor | None]]:
    """Where each chunk's rows of the teacher's logits lie, and which rows they are; None: all of the chunk."""
    if recipe.teacher_rows is None:
        return [(part, None) for part in parts]
    ends = torch.tensor([part.stop for part in parts], device=recipe.teacher_rows.device)
    stops = torch.searchsorted(recipe.teacher_rows, ends).tolist()
    places = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
    return [(there, recipe.teacher_rows[there]) for there in places]


@dataclass(frozen=True)
class _Kept:
    """What the top-k terms change at this rank's columns of S."""

    columns: Tensor  # [n, k]
    held: Tensor  # [n, k]
    added: Tensor  # [n, k]
    factor: Tensor | None  # [n], of e^(s - m), with a tail bucket


def _at_kept(recipe: Recipe, upstream: Tensor, scaled: Callable[..., Tensor]) -> _Kept | None:
    c = recipe.coefficients
    if c.target is None or recipe.kept_ids is None:
        return None
    columns, held = recipe.shard.locate(recipe.kept_ids)
    added = torch.where(held & (upstream != 0)[:, None], -upstream[:, None] * c.target, 0.0)
    factor = None if c.kappa_inside is None else scaled(c.kappa_inside, recipe.student.total)
    return _Kept(columns, held, added, factor)
