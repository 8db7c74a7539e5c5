"""The gradient over this rank's student logits, chunk by chunk, without a collective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .terms import Coefficients
from .vocab_parallel import Shard, Softmax, longest, shift, zero_at


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
    at_kept = columns = held = inside = None
    if c.target is not None and recipe.kept_ids is not None:
        columns, held = shard.locate(recipe.kept_ids)
        at_kept = torch.where(held & (upstream != 0)[:, None], -upstream[:, None] * c.target, 0.0)
        inside = None if c.kappa_inside is None else scaled(c.kappa_inside, recipe.student.total)

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
        kept_values = None
        if inside is not None and columns is not None and held is not None:
            kept_values = result.gather(1, columns[part])
        if needs_teacher:
            assert teacher is not None and recipe.teacher is not None
            shift(teacher[part, :valid], recipe.teacher.maximum[part], third[0])
        if ratio is not None:
            factor = first.sub_(third[0]).mul_(ratio[part, None])
            if kept_values is not None and inside is not None and columns is not None:
                kept_values = kept_values * (factor.gather(1, columns[part]) + inside[part, None])
            factor.add_(kappa[part, None])
            if recipe.careful:
                factor.masked_fill_(result == 0, 0)
            result.mul_(factor)
        else:
            if kept_values is not None and inside is not None:
                kept_values = kept_values * inside[part, None]
            result.mul_(kappa[part, None])
        if on_teacher is not None:
            result.sub_(third[0].exp_().mul_(on_teacher[part, None]))
        if at_kept is not None and columns is not None and held is not None:
            if kept_values is not None:
                zero_at(result, columns[part], held[part])
                result.scatter_add_(1, columns[part], torch.where(held[part], kept_values, 0.0))
            result.scatter_add_(1, columns[part], at_kept[part])
        if at_token is not None:
            result.scatter_add_(1, token[part], at_token[part])
        if result is not target:
            target.copy_(result)
