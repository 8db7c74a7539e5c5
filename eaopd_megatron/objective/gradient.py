"""The gradient over this rank's student logits, chunk by chunk, without a collective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .terms import Coefficients
from .vocab_parallel import Shard, Softmax, longest, shift, times, zero_at


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


def write_gradient(recipe: Recipe, student: Tensor, teacher: Tensor | None, upstream: Tensor, out: Tensor) -> None:
    """Write upstream[:, None] · d loss / d student into ``out`` [n, columns]; zero in padded columns.

    teacher: its logits, wanted where an exact term is part of the loss. ``out`` may be ``student`` itself.
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
    parts = list(shard.chunks(student.shape[0], student.device))
    buffers = torch.empty(3 if needs_teacher else 2, longest(parts) * valid, dtype=dtype, device=student.device)
    for part in parts:
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
            shift(teacher[part, :valid], recipe.teacher.maximum[part], third[0])
        if ratio is not None:
            factor = first.sub_(third[0]).mul_(ratio[part, None])
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
            result.sub_(third[0].exp_().mul_(on_teacher[part, None]))
        if kept is not None:
            if inside is not None:
                zero_at(result, kept.columns[part], kept.held[part])
                result.scatter_add_(1, kept.columns[part], torch.where(kept.held[part], inside, 0.0))
            result.scatter_add_(1, kept.columns[part], kept.added[part])
        if at_token is not None:
            result.scatter_add_(1, token[part], at_token[part])
        if result is not target:
            target.copy_(result)


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
