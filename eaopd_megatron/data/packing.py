"""Samples → packed micro-batches: sequences one after another, without padding but for alignment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from eaopd_megatron.data.types import MicroBatch, Sample


@dataclass(frozen=True)
class Packing:
    """How sequences are aligned, and which part of them a rank computes.

    Context parallelism cuts every sequence into 2·size chunks, and rank r computes chunks r and 2·size−1−r, so that
    causal attention costs each rank the same. Sequence parallelism cuts a rank's tokens by the tensor-parallel size.
    """

    sp_size: int = 1  # tensor-parallel size under sequence parallelism, else 1
    cp_size: int = 1  # context-parallel size
    cp_rank: int = 0

    @property
    def sequence_multiple(self) -> int:
        """What must divide the length of a sequence."""
        return 1 if self.cp_size == 1 else 2 * self.cp_size

    @property
    def total_multiple(self) -> int:
        """What must divide the tokens of a micro-batch."""
        return math.lcm(self.sequence_multiple, self.sp_size * self.cp_size)


def split_into_micro_batches(
    samples: Sequence[Sample], budget: int, packing: Packing = Packing()
) -> Iterator[list[Sample]]:
    """Consecutive samples that are together, aligned, within `budget` tokens; at least one a micro-batch."""
    batch: list[Sample] = []
    total = 0
    for sample in samples:
        length = _round_up(len(sample.token_ids), packing.sequence_multiple)
        if batch and total + length > budget:
            yield batch
            batch, total = [], 0
        batch.append(sample)
        total += length
    if batch:
        yield batch


def collate(samples: Sequence[Sample], device: torch.device, packing: Packing = Packing()) -> MicroBatch:
    """This rank's part of the packed samples; of none, one dummy sequence and no response token.

    Position t−1 predicts token t, so the rows of a response start at the prompt's last token: they are found on whole
    sequences, before context parallelism cuts them.
    """
    lengths = [_round_up(len(s.token_ids), packing.sequence_multiple) for s in samples]
    missing = -sum(lengths) % packing.total_multiple if samples else packing.total_multiple
    if missing:
        lengths.append(missing)  # a sequence of its own, which no response sees
    ends = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.zeros(int(ends[-1]), dtype=torch.long)
    rows, tokens = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]
    for start, sample in zip(ends.tolist(), samples, strict=False):
        ids[start : start + len(sample.token_ids)] = torch.tensor(sample.token_ids)
        first = start + len(sample.prompt.token_ids) - 1
        rows.append(torch.arange(first, first + len(sample.response_ids)))
        tokens.append(torch.tensor(sample.response_ids, dtype=torch.long))
    chosen_rows, chosen_tokens, kept = torch.cat(rows), torch.cat(tokens), None
    positions = torch.arange(len(ids)) - ends[:-1].repeat_interleave(ends.diff())
    if packing.cp_size > 1:
        mine = cp_shard_indices(ends, packing.cp_size, packing.cp_rank)
        place = torch.full((len(ids),), -1).index_copy(0, mine, torch.arange(len(mine)))
        kept = (place[chosen_rows] >= 0).nonzero().squeeze(1)
        chosen_rows, chosen_tokens = place[chosen_rows[kept]], chosen_tokens[kept]
        ids, positions, kept = ids[mine], positions[mine], kept.to(device)
    return MicroBatch(
        list(samples),
        ids[None].to(device),
        positions[None].to(device),
        ends.int().to(device),
        max(lengths),
        chosen_rows.to(device),
        chosen_tokens.to(device),
        kept,
    )


def cp_shard_indices(ends: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """Packed positions [T/size] that context-parallel rank `rank` of `size` computes, in its order.

    ends [b + 1]: 0 and the end of each sequence, whose lengths 2·size divides.
    """
    chunks = ends.diff() // (2 * size)
    local = torch.arange(int(ends[-1]) // size, device=ends.device)
    sequence = torch.arange(len(chunks), device=ends.device).repeat_interleave(2 * chunks)
    chunk, start = chunks[sequence], ends[:-1][sequence]
    offset = local - start // size
    second = (2 * size - 1 - rank) * chunk + offset - chunk
    return start + torch.where(offset < chunk, rank * chunk + offset, second)


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
