"""Pack samples into micro-batches: sequences one after another, with padding only for alignment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from eaopd_megatron.data.types import MicroBatch, Sample


@dataclass(frozen=True)
class Packing:
    """How sequences are aligned, and which part of them a rank computes.

    Context parallelism splits every sequence into 2·cp_size chunks, and rank r computes chunks r and 2·cp_size−1−r, so
    that causal attention costs each rank the same. Sequence parallelism splits a rank's tokens by the tensor-parallel
    size.
    """

    sp_size: int = 1  # tensor-parallel size under sequence parallelism, else 1
    cp_size: int = 1  # context-parallel size
    cp_rank: int = 0

    @property
    def sequence_multiple(self) -> int:
        """Divisor of the length of each sequence."""
        return 1 if self.cp_size == 1 else 2 * self.cp_size

    @property
    def total_multiple(self) -> int:
        """Divisor of the tokens of a micro-batch."""
        return math.lcm(self.sequence_multiple, self.sp_size * self.cp_size)


def group_by_teacher(samples: Sequence[Sample], teachers: Sequence[str]) -> Iterator[tuple[str, list[Sample]]]:
    """Yield each teacher's name, in this order, and its samples, in theirs. A teacher may have none."""
    for name in teachers:
        yield name, [sample for sample in samples if sample.prompt.teacher == name]


def split_into_micro_batches(
    samples: Sequence[Sample], budget: int, packing: Packing = Packing()
) -> Iterator[list[Sample]]:
    """Yield runs of consecutive samples with at most `budget` tokens after alignment, and at least one sample."""
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


def collate(
    samples: Sequence[Sample], device: torch.device, packing: Packing = Packing(), teacher: str = ""
) -> MicroBatch:
    """Pack samples into this rank's micro-batch. Without samples it holds a dummy sequence and no response token.

    Position t−1 predicts token t, so the logits of a response start at the prompt's last token. They are located on
    full sequences, before context parallelism splits them.
    """
    lengths = [_round_up(len(s.token_ids), packing.sequence_multiple) for s in samples]
    padding = -sum(lengths) % packing.total_multiple if samples else packing.total_multiple
    if padding:
        lengths.append(padding)  # a sequence of its own, which no response attends to
    ends = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.zeros(int(ends[-1]), dtype=torch.long)
    row_parts, target_parts = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]
    for start, sample in zip(ends.tolist(), samples, strict=False):
        ids[start : start + len(sample.token_ids)] = torch.tensor(sample.token_ids)
        first = start + len(sample.prompt.token_ids) - 1
        row_parts.append(torch.arange(first, first + len(sample.response_ids)))
        target_parts.append(torch.tensor(sample.response_ids, dtype=torch.long))
    rows, targets, local_indices = torch.cat(row_parts), torch.cat(target_parts), None
    positions = torch.arange(len(ids)) - ends[:-1].repeat_interleave(ends.diff())
    if packing.cp_size > 1:
        shard = cp_shard_indices(ends, packing.cp_size, packing.cp_rank)
        place = torch.full((len(ids),), -1).index_copy(0, shard, torch.arange(len(shard)))
        local = (place[rows] >= 0).nonzero().squeeze(1)
        rows, targets = place[rows[local]], targets[local]
        ids, positions, local_indices = ids[shard], positions[shard], local.to(device)
    return MicroBatch(
        list(samples),
        ids[None].to(device),
        positions[None].to(device),
        ends.int().to(device),
        max(lengths),
        rows.to(device),
        targets.to(device),
        local_indices,
        teacher,
    )


def cp_shard_indices(ends: torch.Tensor, size: int, rank: int) -> torch.Tensor:
    """Return the packed positions [T/size] that context-parallel rank `rank` of `size` computes, in its order.

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
