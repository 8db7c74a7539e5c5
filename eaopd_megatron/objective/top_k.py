"""The k largest logits of each token over vocabulary shards: larger logit first, then lower id, on every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from eaopd_megatron.objective.vocab_parallel import Shard

BLOCK = 64  # columns under one maximum: the k largest logits lie in the k blocks with the largest maxima
SPARE = 16  # candidates beyond k: equal logits at the k-th place are settled among them, without reading the row again


def shard_top_k(logits: Tensor, shard: Shard, k: int) -> tuple[Tensor, Tensor]:
    """This rank's k best: (ids [n, k] of the whole vocabulary, logits [n, k] in the input's precision).

    A rank with fewer than k valid columns fills up with id vocab_size and logit -inf. Order is left to `first_k`.
    """
    n, valid = logits.shape[0], shard.valid
    ids = torch.full((n, k), shard.vocab_size, dtype=torch.int64, device=logits.device)
    values = torch.full((n, k), -torch.inf, dtype=logits.dtype, device=logits.device)
    if valid == 0:
        return ids, values
    kept, wanted = min(k, valid), min(k + SPARE, valid)
    open_ties = torch.empty(n, dtype=torch.bool, device=logits.device)
    found = torch.empty(n, wanted, dtype=logits.dtype, device=logits.device)
    columns = torch.empty(n, wanted, dtype=torch.int64, device=logits.device)
    for part in shard.chunks(n, logits.device):
        row = logits[part, :valid]
        if row.dtype in (torch.bfloat16, torch.float16):
            row = row.float()  # reductions are several times faster
        found[part], columns[part], open_ties[part] = _candidates(row, kept, wanted)
    order = _order(found, columns)[:, :kept]
    ids[:, :kept] = columns.gather(1, order) + shard.first
    values[:, :kept] = found.gather(1, order)
    if bool(open_ties.any()):
        again = open_ties.nonzero()[:, 0]
        for part in shard.chunks(len(again), logits.device):
            index = again[part]
            settled = _settle(logits[index, :valid], kept)
            ids[index, :kept] = settled + shard.first
            values[index, :kept] = logits[index, :valid].gather(1, settled)
    return ids, values


def first_k(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """Positions [n, k] of the k best of candidates [n, c], best first; ids settle equal values."""
    return _order(values, ids)[:, :k]


def _order(values: Tensor, ids: Tensor) -> Tensor:
    """Positions sorted by value downwards, then by id upwards."""
    by_id = ids.argsort(dim=1, stable=True)
    return by_id.gather(1, values.gather(1, by_id).argsort(dim=1, descending=True, stable=True))


def _candidates(row: Tensor, k: int, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and columns that include the k best of [c, valid], and rows where equal values may have been missed."""
    c, valid = row.shape
    blocks = valid // BLOCK
    if blocks < 2 * wanted:
        values, columns = row.topk(wanted, dim=1)
        return values, columns, _undecided(values, k, valid)
    whole = blocks * BLOCK
    chosen = row[:, :whole].unflatten(1, (blocks, BLOCK)).amax(2).topk(wanted, dim=1).indices
    within = torch.arange(BLOCK, device=row.device)
    columns = (chosen[:, :, None] * BLOCK + within).flatten(1)
    columns = torch.cat([columns, torch.arange(whole, valid, device=row.device).expand(c, -1)], dim=1)
    values, position = row.gather(1, columns).topk(wanted, dim=1)
    # A block left behind has no logit above those of the chosen maxima, so equal logits that it hides show here, too.
    return values, columns.gather(1, position), _undecided(values, k, columns.shape[1])


def _undecided(values: Tensor, k: int, available: int) -> Tensor:
    """Whether the k-th value, largest first, equals the last one taken: others like it may have been left behind."""
    if values.shape[1] == available:
        return torch.zeros(values.shape[0], dtype=torch.bool, device=values.device)
    return ~(values[:, k - 1] > values[:, -1])  # NaN counts as undecided


def _settle(row: Tensor, k: int) -> Tensor:
    """Columns [c, k] of the k best of every row, from the whole row."""
    row = torch.where(row.isnan(), torch.inf, row.float() if row.dtype in (torch.bfloat16, torch.float16) else row)
    last = row.topk(k, dim=1).values[:, -1:]
    above, equal = row > last, row == last
    taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    columns = taken.nonzero()[:, 1].view(-1, k)
    return columns.gather(1, _order(row.gather(1, columns), columns))
