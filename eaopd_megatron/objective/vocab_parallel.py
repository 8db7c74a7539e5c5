"""Statistics of softmax distributions over vocabulary shards: one packed all-gather a micro-batch, whatever the chunk
size.

A rank holds ``columns`` logits of every token: the ids [rank · columns, (rank + 1) · columns), of which those below the
true vocabulary size are valid. With s, t the student's and the teacher's logits and m^r the maximum over a rank's valid
columns, each rank sums

    Z_s = sum e^(s - m_s)        A_s = sum e^(s - m_s) (s - m_s)        G_s = sum e^(s - m_s) D
    Z_t = sum e^(t - m_t)        A_t = sum e^(t - m_t) (t - m_t)        G_t = sum e^(t - m_t) D

with the gap D = (s - m_s) - (t - m_t), and all ranks merge these with the weights e^(m^r - m), m the maximum over the
vocabulary. Every rank merges the same numbers in the same order, so the result has the same bits everywhere. G_s is
A_s - C_st of the usual cross sums; where student and teacher are close it keeps the digits that this difference loses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from eaopd_megatron.objective.backend import kernels_for
from eaopd_megatron.objective.checks import require_matrix

CPU_CHUNK_ELEMENTS = 1 << 17  # per thread: the four buffers of a chunk then fit a core's second-level cache
GPU_CHUNK_ELEMENTS = 1 << 25
MAX_VOCABULARY = 1 << 24  # ids travel as fp32, which is exact up to here


def times(weight: Tensor, value: Tensor) -> Tensor:
    """weight · value with 0 · (anything) = 0."""
    return torch.where(weight == 0, 0.0, weight * value)


@dataclass(frozen=True)
class Shard:
    """This rank's part of the vocabulary, and the group over which the parts are spread."""

    columns: int
    vocab_size: int
    group: ProcessGroup | None
    first: int  # id of the first column
    ranks: int
    chunk: int | None = None  # tokens worked at together; None: what suits the caches

    @classmethod
    def of(
        cls, name: str, logits: Tensor, vocab_size: int, group: ProcessGroup | None, chunk: int | None = None
    ) -> Shard:
        """The shard of ``logits`` [n, columns]; errors speak of the argument ``name``. group None: one rank."""
        require_matrix(name, logits, "[n, columns]")
        return cls.of_columns(name, logits.shape[1], vocab_size, group, chunk)

    @classmethod
    def of_columns(
        cls, name: str, columns: int, vocab_size: int, group: ProcessGroup | None, chunk: int | None = None
    ) -> Shard:
        """The shard of a rank that owns ``columns`` ids, padding included."""
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk: {chunk} is not at least 1")
        ranks = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        if not 0 < vocab_size <= min(columns * ranks, MAX_VOCABULARY):
            raise ValueError(
                f"vocab_size: {vocab_size} is not in 1..{min(columns * ranks, MAX_VOCABULARY)} "
                f"({name} has {columns} columns on each of {ranks} ranks)"
            )
        return cls(columns, vocab_size, group, rank * columns, ranks, chunk)

    def block(self, columns: slice) -> Shard:
        """Some of this rank's columns as a shard of their own, which is alone."""
        width = columns.stop - columns.start
        return replace(self, columns=width, first=self.first + columns.start, group=None, ranks=1, chunk=None)

    @property
    def valid(self) -> int:
        """Columns of this rank that are no padding; may be 0."""
        return min(max(self.vocab_size - self.first, 0), self.columns)

    def locate(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's column of each id and whether it holds the id; a column is valid even where it does not."""
        column = ids - self.first
        owned = (column >= 0) & (column < self.valid)
        return column.clamp(0, max(self.valid - 1, 0)), owned

    def chunks(self, count: int, device: torch.device) -> Iterator[slice]:
        """Slices of ``count`` tokens to work at, one after another."""
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        chunk = self.chunk
        if chunk is None:
            elements = CPU_CHUNK_ELEMENTS * threads if device.type == "cpu" else GPU_CHUNK_ELEMENTS
            chunk = max(1, elements // max(self.valid, 1))
        # Torch splits the sum of a single row between threads, in another order than a row among others.
        least = 1 if threads == 1 else 2
        start, chunk = 0, max(chunk, least)
        while start < count:
            stop = count if count - start - chunk < least else start + chunk
            yield slice(start, stop)
            start = stop

    def exchange(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All ranks' rows: name -> [r, n] becomes name -> [ranks, r, n]. One collective, also for no tokens."""
        if self.ranks == 1:
            return {name: row[None] for name, row in rows.items()}
        names = sorted(rows)  # ranks may have found theirs in another order
        sizes = [rows[name].shape[0] for name in names]
        packed = torch.cat([rows[name] for name in names])
        count = packed.shape[1]
        if count == 0:  # not every backend moves empty tensors
            packed = packed.new_zeros(packed.shape[0], 1)
        gathered = packed.new_empty(self.ranks, *packed.shape)
        dist.all_gather(list(gathered.unbind(0)), packed, group=self.group)
        return dict(zip(names, gathered[:, :, :count].split(sizes, dim=1), strict=True))


@dataclass(frozen=True)
class Softmax:
    """A softmax over the whole vocabulary in numbers of a token, each [n]."""

    maximum: Tensor
    total: Tensor  # Z
    weighted: Tensor  # A

    @property
    def log_total(self) -> Tensor:
        """L = log Z."""
        return self.total.log()

    @property
    def entropy(self) -> Tensor:
        """In nats."""
        return self.log_total - self.weighted / self.total

    def logprob(self, logits: Tensor) -> Tensor:
        """Log-prob of logits [..., n]."""
        return logits - self.maximum - self.log_total

    @property
    def broken(self) -> Tensor:
        """Rows whose logits hold NaN or +inf, or -inf alone."""
        finite = self.maximum.isfinite() & self.total.isfinite() & self.weighted.isfinite()
        return ~(finite & (self.total > 0))


def longest(parts: list[slice]) -> int:
    """Tokens of the largest chunk."""
    return max((part.stop - part.start for part in parts), default=0)


def shift(logits: Tensor, maximum: Tensor, out: Tensor) -> None:
    """out = logits - maximum in out's precision. Never writes to the caller's logits."""
    if logits.dtype == out.dtype:
        torch.sub(logits, maximum[:, None], out=out)
    else:
        out.copy_(logits).sub_(maximum[:, None])


def partial_sums(
    student: Tensor,
    teacher: Tensor | None,
    shard: Shard,
    *,
    dtype: torch.dtype,
    leave_out: tuple[Tensor, Tensor] | None = None,
    finite: bool = False,
) -> tuple[dict[str, Tensor], bool]:
    """This rank's sums, ready for `Shard.exchange`, and whether its logits hold -inf.

    student, teacher: [n, columns]. leave_out: (columns, held) [n, k] of ids whose probability is to be left out of the
    additional sums "student_rest" and "teacher_rest". finite: -inf is no logit here, so that it need not be looked for.
    The sums: "student" and "teacher" [3, n]: m, Z, A; "gap" [2, n]: G_s, G_t; the rests [1, n].
    """
    rows = _partial_sums(student, teacher, shard, dtype, leave_out, careful=False)
    careful = not finite and bool(torch.cat(list(rows.values())).isnan().any())
    if careful:  # a logit of -inf makes 0 · inf, which counts as 0; rare, so the quick pass does not look for it
        rows = _partial_sums(student, teacher, shard, dtype, leave_out, careful=True)
    return rows, careful


def _partial_sums(
    student: Tensor,
    teacher: Tensor | None,
    shard: Shard,
    dtype: torch.dtype,
    leave_out: tuple[Tensor, Tensor] | None,
    careful: bool,
) -> dict[str, Tensor]:
    n, valid = student.shape[0], shard.valid
    lowest = torch.finfo(dtype).min
    sides = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    rows = {name: torch.zeros(3, n, dtype=dtype, device=student.device) for name in sides}
    if teacher is not None:
        rows["gap"] = torch.zeros(2, n, dtype=dtype, device=student.device)
    if leave_out is not None:
        rows |= {f"{name}_rest": torch.zeros(1, n, dtype=dtype, device=student.device) for name in sides}
    if valid == 0:
        for name in sides:
            rows[name][0] = -torch.inf  # weight 0 in the merge
        return rows
    kernels = kernels_for(student, teacher)
    if kernels is not None:
        kernels.fill_sums(rows, student, teacher, valid, leave_out, careful)
        return rows
    parts = list(shard.chunks(n, student.device))
    buffers = torch.empty(len(sides) + 2, longest(parts) * valid, dtype=dtype, device=student.device)

    def dot(weights: Tensor, values: Tensor, product: Tensor, out: Tensor) -> None:
        torch.mul(weights, values, out=product)
        if careful:
            product.masked_fill_(weights == 0, 0)
        torch.sum(product, 1, out=out)

    for part in parts:
        size = part.stop - part.start
        exps, product, *shifted = (buffer[: size * valid].view(size, valid) for buffer in buffers)
        for (name, logits), d in zip(sides.items(), shifted, strict=True):
            local, maximum = logits[part, :valid], rows[name][0, part]
            if local.dtype != dtype:
                local = d.copy_(local)
            torch.amax(local, 1, out=maximum)
            if careful:
                maximum.clamp_(min=lowest)
            torch.sub(local, maximum[:, None], out=d)
        for index, (name, d) in enumerate(zip(sides, shifted, strict=True)):
            torch.exp(d, out=exps)
            torch.sum(exps, 1, out=rows[name][1, part])
            dot(exps, d, product, rows[name][2, part])
            if teacher is not None:
                gap = shifted[0] if index else d.sub_(shifted[1])
                dot(exps, gap, product, rows["gap"][index, part])
            if leave_out is not None:
                zero_at(exps, leave_out[0][part], leave_out[1][part])
                torch.sum(exps, 1, out=rows[f"{name}_rest"][0, part])
    return rows


def zero_at(values: Tensor, columns: Tensor, held: Tensor) -> None:
    """Set values[i, columns[i, j]] to 0 where held[i, j], in place. Multiplies: columns that are not held collide."""
    values.scatter_reduce_(1, columns, (~held).to(values.dtype), "prod")


def look_up(logits: Tensor, shard: Shard, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """This shard's logits under ids [n, k], as [k, n], and 0 where it does not hold the id: shards' add up."""
    if shard.valid == 0:
        return torch.zeros(ids.shape, dtype=dtype, device=logits.device).T
    columns, held = shard.locate(ids)
    return torch.where(held, logits.gather(1, columns).to(dtype), 0.0).T


def merge(parts: Tensor) -> tuple[Softmax, Tensor, Tensor]:
    """All ranks' m, Z, A [ranks, 3, n] -> the softmax, and each rank's e^(m^r - m) and m^r - m [ranks, n]."""
    maximum = parts[:, 0].amax(0)
    delta = parts[:, 0] - maximum
    alpha = delta.exp()
    total = (alpha * parts[:, 1]).sum(0)
    weighted = times(alpha, parts[:, 2] + delta * parts[:, 1]).sum(0)
    return Softmax(maximum, total, weighted), alpha, delta


def merge_gap(gap: Tensor, total: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
    """G over the vocabulary [n] from all ranks' G and Z [ranks, n]; shift: by how much D grows, delta_s - delta_t."""
    return times(alpha, gap + shift * total).sum(0)
