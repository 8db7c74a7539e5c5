"""Softmax statistics and exact top-k over vocabulary shards.

A rank holds `columns` = padded vocabulary / tp logits of every token: the ids [rank * columns, (rank + 1) * columns).
Ids below vocab_size are valid, the others padding. With s, t the student's and the teacher's logits, m a rank's maximum
over its valid columns and D = (s - m_s) - (t - m_t), each rank computes per token

    Z_s = sum e^(s - m_s)        A_s = sum e^(s - m_s) (s - m_s)        G_s = sum e^(s - m_s) D
    Z_t = sum e^(t - m_t)        A_t = sum e^(t - m_t) (t - m_t)        G_t = sum e^(t - m_t) D

and all ranks merge these with the weights alpha^r = e^(m^r - m), where m is the maximum over the whole vocabulary. All
merge the same numbers in the same order, so the results are bitwise equal on every rank. G_s equals A_s - C_st of the
usual cross sum C_st = sum e^(s - m_s) (t - m_t); where student and teacher are close it keeps the digits that this
difference would cancel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from eaopd_megatron.objective import triton_launch
from eaopd_megatron.objective.checks import require_matrix

_CPU_CHUNK_ELEMENTS = 1 << 17  # per thread: a chunk's four buffers fit a core's second-level cache
_GPU_CHUNK_ELEMENTS = 1 << 25
_MAX_VOCAB_SIZE = 1 << 24  # ids are exchanged as fp32, which represents integers exactly up to here
TOP_K_BLOCK = 64  # columns per block maximum: the k largest logits lie in the k blocks with the largest maxima
TOP_K_SPARE = 16  # candidates beyond k, so that ties at rank k are mostly resolved without reading the row again


def zero_safe_mul(weight: Tensor, value: Tensor) -> Tensor:
    """Return weight * value with 0 * inf = 0 * nan = 0."""
    return torch.where(weight == 0, 0.0, weight * value)


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns of the vocabulary, and the tensor-parallel group that holds the others."""

    columns: int
    vocab_size: int
    group: ProcessGroup | None
    vocab_start_index: int
    tp_size: int
    chunk: int | None = None  # tokens processed together; None: sized for the caches

    @classmethod
    def from_logits(
        cls, name: str, logits: Tensor, vocab_size: int, group: ProcessGroup | None, chunk: int | None = None
    ) -> VocabShard:
        """Return the shard of `logits` [tokens, vocab/tp]; errors call them `name`. group None: a single rank."""
        require_matrix(name, logits, "[n, columns]")
        return cls.from_columns(name, logits.shape[1], vocab_size, group, chunk)

    @classmethod
    def from_columns(
        cls, name: str, columns: int, vocab_size: int, group: ProcessGroup | None, chunk: int | None = None
    ) -> VocabShard:
        """Return the shard of a rank with `columns` ids, padding included. Raise ValueError for impossible sizes."""
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk: {chunk} is not at least 1")
        tp_size = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        if not 0 < vocab_size <= min(columns * tp_size, _MAX_VOCAB_SIZE):
            raise ValueError(
                f"vocab_size: {vocab_size} is not in 1..{min(columns * tp_size, _MAX_VOCAB_SIZE)} "
                f"({name} has {columns} columns on each of {tp_size} ranks)"
            )
        return cls(columns, vocab_size, group, rank * columns, tp_size, chunk)

    def column_block(self, block: slice) -> VocabShard:
        """Return some of this rank's columns as a shard without a group."""
        start = self.vocab_start_index + block.start
        width = block.stop - block.start
        return replace(self, columns=width, vocab_start_index=start, group=None, tp_size=1, chunk=None)

    @property
    def num_valid(self) -> int:
        """Number of this rank's columns that are not padding; may be 0."""
        return min(max(self.vocab_size - self.vocab_start_index, 0), self.columns)

    def local_columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's column of each id, clamped to a valid one, and whether this rank owns the id."""
        column = ids - self.vocab_start_index
        owned = (column >= 0) & (column < self.num_valid)
        return column.clamp(0, max(self.num_valid - 1, 0)), owned

    def row_chunks(self, num_tokens: int, device: torch.device) -> Iterator[slice]:
        """Yield slices of the tokens that are processed together."""
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        chunk = self.chunk
        if chunk is None:
            elements = _CPU_CHUNK_ELEMENTS * threads if device.type == "cpu" else _GPU_CHUNK_ELEMENTS
            chunk = max(1, elements // max(self.num_valid, 1))
        # torch splits the sum of a single row between threads, which adds in another order than for several rows
        smallest = 1 if threads == 1 else 2
        start, chunk = 0, max(chunk, smallest)
        while start < num_tokens:
            stop = num_tokens if num_tokens - start - chunk < smallest else start + chunk
            yield slice(start, stop)
            start = stop

    def all_gather(self, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather every rank's rows in one collective, also for 0 tokens: each [r, tokens] becomes [tp, r, tokens]."""
        if self.tp_size == 1:
            return {name: rows[None] for name, rows in stats.items()}
        names = sorted(stats)  # the same order on every rank
        sizes = [stats[name].shape[0] for name in names]
        packed = torch.cat([stats[name] for name in names])
        num_tokens = packed.shape[1]
        if num_tokens == 0:  # not every backend transfers empty tensors
            packed = packed.new_zeros(packed.shape[0], 1)
        gathered = packed.new_empty(self.tp_size, *packed.shape)
        dist.all_gather(list(gathered.unbind(0)), packed, group=self.group)
        return dict(zip(names, gathered[:, :, :num_tokens].split(sizes, dim=1), strict=True))


@dataclass(frozen=True)
class Softmax:
    """A softmax over the whole vocabulary, in sums per token, each [tokens]."""

    max_logit: Tensor  # m
    sum_exp: Tensor  # Z
    sum_exp_x_shifted: Tensor  # A

    @property
    def log_sum_exp(self) -> Tensor:
        """L = log Z, of the logits shifted by their maximum."""
        return self.sum_exp.log()

    @property
    def entropy(self) -> Tensor:
        """H = L - A / Z, in nats."""
        return self.log_sum_exp - self.sum_exp_x_shifted / self.sum_exp

    def logprob(self, logits: Tensor) -> Tensor:
        """Return the log-probs (nats) of logits [..., tokens]."""
        return logits - self.max_logit - self.log_sum_exp

    @property
    def has_nan_or_inf(self) -> Tensor:
        """Whether a row of logits holds NaN or +inf, or -inf alone."""
        finite = self.max_logit.isfinite() & self.sum_exp.isfinite() & self.sum_exp_x_shifted.isfinite()
        return ~(finite & (self.sum_exp > 0))


def max_chunk_size(chunks: list[slice]) -> int:
    """Return the number of tokens in the largest chunk."""
    return max((chunk.stop - chunk.start for chunk in chunks), default=0)


def subtract_max(logits: Tensor, max_logit: Tensor, out: Tensor) -> None:
    """Set out = logits - max_logit[:, None] in the precision of `out`, which must not be the caller's logits."""
    if logits.dtype == out.dtype:
        torch.sub(logits, max_logit[:, None], out=out)
    else:
        out.copy_(logits).sub_(max_logit[:, None])


def partial_sums(
    student: Tensor,
    teacher: Tensor | None,
    shard: VocabShard,
    *,
    dtype: torch.dtype,
    exclude: tuple[Tensor, Tensor] | None = None,
    assume_finite: bool = False,
) -> tuple[dict[str, Tensor], bool]:
    """Return this rank's sums for `VocabShard.all_gather`, and whether its logits hold -inf.

    student, teacher: [tokens, vocab/tp]. exclude: (columns, owned) [tokens, k] of ids that are left out of the tail
    sums. assume_finite: skip the check for -inf.

    The sums: "student" and "teacher" [3, tokens]: m, Z, A; "gap" [2, tokens]: G_s, G_t; with `exclude` also
    "student_tail" and "teacher_tail" [1, tokens]: Z without the excluded ids.
    """
    sums = _partial_sums(student, teacher, shard, dtype, exclude, has_neg_inf=False)
    has_neg_inf = not assume_finite and bool(torch.cat(list(sums.values())).isnan().any())
    if has_neg_inf:  # e^-inf * inf gives NaN where 0 is meant; rare, so the fast pass does not look for it
        sums = _partial_sums(student, teacher, shard, dtype, exclude, has_neg_inf=True)
    return sums, has_neg_inf


def _partial_sums(
    student: Tensor,
    teacher: Tensor | None,
    shard: VocabShard,
    dtype: torch.dtype,
    exclude: tuple[Tensor, Tensor] | None,
    has_neg_inf: bool,
) -> dict[str, Tensor]:
    n, valid = student.shape[0], shard.num_valid
    lowest = torch.finfo(dtype).min
    logits = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    sums = {name: torch.zeros(3, n, dtype=dtype, device=student.device) for name in logits}
    if teacher is not None:
        sums["gap"] = torch.zeros(2, n, dtype=dtype, device=student.device)
    if exclude is not None:
        sums |= {f"{name}_tail": torch.zeros(1, n, dtype=dtype, device=student.device) for name in logits}
    if valid == 0:
        for name in logits:
            sums[name][0] = -torch.inf  # weight 0 in the merge
        return sums
    if triton_launch.uses_kernels(student, teacher):
        triton_launch.launch_sums(sums, student, teacher, valid, exclude, has_neg_inf)
        return sums
    chunks = list(shard.row_chunks(n, student.device))
    buffers = torch.empty(len(logits) + 2, max_chunk_size(chunks) * valid, dtype=dtype, device=student.device)

    def dot(weights: Tensor, values: Tensor, product: Tensor, out: Tensor) -> None:
        torch.mul(weights, values, out=product)
        if has_neg_inf:
            product.masked_fill_(weights == 0, 0)
        torch.sum(product, 1, out=out)

    for chunk in chunks:
        size = chunk.stop - chunk.start
        exp, product, *shifted = (buffer[: size * valid].view(size, valid) for buffer in buffers)
        for (name, values), d in zip(logits.items(), shifted, strict=True):
            local, max_logit = values[chunk, :valid], sums[name][0, chunk]
            if local.dtype != dtype:
                local = d.copy_(local)
            torch.amax(local, 1, out=max_logit)
            if has_neg_inf:
                max_logit.clamp_(min=lowest)
            torch.sub(local, max_logit[:, None], out=d)
        for index, (name, d) in enumerate(zip(logits, shifted, strict=True)):
            torch.exp(d, out=exp)
            torch.sum(exp, 1, out=sums[name][1, chunk])
            dot(exp, d, product, sums[name][2, chunk])
            if teacher is not None:
                gap = shifted[0] if index else d.sub_(shifted[1])  # D overwrites s - m_s, which is not needed again
                dot(exp, gap, product, sums["gap"][index, chunk])
            if exclude is not None:
                zero_columns(exp, exclude[0][chunk], exclude[1][chunk])
                torch.sum(exp, 1, out=sums[f"{name}_tail"][0, chunk])
    return sums


def zero_columns(values: Tensor, columns: Tensor, owned: Tensor) -> None:
    """Set values[i, columns[i, j]] = 0 where owned[i, j], in place.

    It multiplies by 0 or 1, since clamped columns of ids that are not owned may collide with owned ones.
    """
    values.scatter_reduce_(1, columns, (~owned).to(values.dtype), "prod")


def gather_local_logits(logits: Tensor, shard: VocabShard, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return this shard's logits of ids [tokens, k] as [k, tokens], 0 where it does not own the id: shards add up."""
    if shard.num_valid == 0:
        return torch.zeros(ids.shape, dtype=dtype, device=logits.device).T
    columns, owned = shard.local_columns(ids)
    return torch.where(owned, logits.gather(1, columns).to(dtype), 0.0).T


def merge_softmax(parts: Tensor) -> tuple[Softmax, Tensor, Tensor]:
    """Merge all shards' m, Z, A [shards, 3, tokens].

    Returns the softmax, and each shard's alpha = e^(m^r - m) and delta = m^r - m, [shards, tokens].
    """
    max_logit = parts[:, 0].amax(0)
    delta = parts[:, 0] - max_logit
    alpha = delta.exp()
    sum_exp = (alpha * parts[:, 1]).sum(0)
    sum_exp_x_shifted = zero_safe_mul(alpha, parts[:, 2] + delta * parts[:, 1]).sum(0)
    return Softmax(max_logit, sum_exp, sum_exp_x_shifted), alpha, delta


def merge_gap(gap: Tensor, sum_exp: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
    """Merge all shards' G and Z [shards, tokens] into G [tokens]; shift = delta_s - delta_t is the increase of D."""
    return zero_safe_mul(alpha, gap + shift * sum_exp).sum(0)


def shard_top_k(logits: Tensor, shard: VocabShard, k: int) -> tuple[Tensor, Tensor]:
    """Return this rank's k largest logits of each token: (vocabulary ids, logits), each [tokens, k], unordered.

    Ties go to the lower id, on every layout. A rank with fewer than k valid columns pads with id vocab_size and logit
    -inf. `top_k_positions` orders them.
    """
    n, valid = logits.shape[0], shard.num_valid
    ids = torch.full((n, k), shard.vocab_size, dtype=torch.int64, device=logits.device)
    values = torch.full((n, k), -torch.inf, dtype=logits.dtype, device=logits.device)
    if valid == 0:
        return ids, values
    count, num_candidates = min(k, valid), min(k + TOP_K_SPARE, valid)
    unresolved = torch.empty(n, dtype=torch.bool, device=logits.device)
    candidates = torch.empty(n, num_candidates, dtype=logits.dtype, device=logits.device)
    columns = torch.empty(n, num_candidates, dtype=torch.int64, device=logits.device)
    for chunk in shard.row_chunks(n, logits.device):
        rows = logits[chunk, :valid]
        if rows.dtype in (torch.bfloat16, torch.float16):
            rows = rows.float()  # reductions are several times faster
        candidates[chunk], columns[chunk], unresolved[chunk] = _top_k_candidates(rows, count, num_candidates)
    order = _order(candidates, columns)[:, :count]
    ids[:, :count] = columns.gather(1, order) + shard.vocab_start_index
    values[:, :count] = candidates.gather(1, order)
    if bool(unresolved.any()):
        remaining = unresolved.nonzero()[:, 0]
        for chunk in shard.row_chunks(len(remaining), logits.device):
            index = remaining[chunk]
            exact = _top_k_with_ties(logits[index, :valid], count)
            ids[index, :count] = exact + shard.vocab_start_index
            values[index, :count] = logits[index, :valid].gather(1, exact)
    return ids, values


def top_k_positions(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """Return the positions [tokens, k] of the k largest candidates [tokens, c], largest first, ties by lower id."""
    return _order(values, ids)[:, :k]


def _order(values: Tensor, ids: Tensor) -> Tensor:
    """Return positions sorted by descending value, then by ascending id."""
    by_id = ids.argsort(dim=1, stable=True)
    return by_id.gather(1, values.gather(1, by_id).argsort(dim=1, descending=True, stable=True))


def _top_k_candidates(rows: Tensor, k: int, num_candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return values and columns that include the top-k of [c, valid], and the rows where ties may have been missed."""
    c, valid = rows.shape
    num_blocks = valid // TOP_K_BLOCK
    if num_blocks < 2 * num_candidates:
        values, columns = rows.topk(num_candidates, dim=1)
        return values, columns, _has_unresolved_ties(values, k, valid)
    blocked = num_blocks * TOP_K_BLOCK
    maxima = rows[:, :blocked].unflatten(1, (num_blocks, TOP_K_BLOCK)).amax(2)
    blocks = maxima.topk(num_candidates, dim=1).indices
    within = torch.arange(TOP_K_BLOCK, device=rows.device)
    columns = (blocks[:, :, None] * TOP_K_BLOCK + within).flatten(1)
    columns = torch.cat([columns, torch.arange(blocked, valid, device=rows.device).expand(c, -1)], dim=1)
    values, position = rows.gather(1, columns).topk(num_candidates, dim=1)
    # a block left out has no logit above the selected maxima, so ties that it hides show among the candidates, too
    return values, columns.gather(1, position), _has_unresolved_ties(values, k, columns.shape[1])


def _has_unresolved_ties(values: Tensor, k: int, available: int) -> Tensor:
    """Return whether the k-th largest value equals the last candidate, so that equal ones may have been left out."""
    if values.shape[1] == available:
        return torch.zeros(values.shape[0], dtype=torch.bool, device=values.device)
    return ~(values[:, k - 1] > values[:, -1])  # NaN counts as unresolved


def _top_k_with_ties(rows: Tensor, k: int) -> Tensor:
    """Return the columns [c, k] of the top-k of each row, computed from the whole row."""
    rows = torch.where(rows.isnan(), torch.inf, rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows)
    kth = rows.topk(k, dim=1).values[:, -1:]
    above, equal = rows > kth, rows == kth
    selected = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    columns = selected.nonzero()[:, 1].view(-1, k)
    return columns.gather(1, _order(rows.gather(1, columns), columns))
