"""Samples → micro-batches within a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from eaopd_megatron.data.samples import MicroBatch, Sample


def cut(samples: Sequence[Sample], budget: int) -> Iterator[list[Sample]]:
    """Consecutive samples whose padded size (count · longest) stays within `budget` tokens; at least one a
    micro-batch."""
    batch: list[Sample] = []
    longest = 0
    for sample in samples:
        length = len(sample.token_ids)
        if batch and max(longest, length) * (len(batch) + 1) > budget:
            yield batch
            batch, longest = [], 0
        batch.append(sample)
        longest = max(longest, length)
    if batch:
        yield batch


def collate(samples: Sequence[Sample], device: torch.device, multiple: int = 1) -> MicroBatch:
    """Pad on the right to the longest sample, rounded up to `multiple` (sequence parallelism cuts by the
    tensor-parallel size).

    Position t−1 predicts token t, so the rows of a response start at the prompt's last token.
    """
    length = max(len(s.token_ids) for s in samples)
    length = (length + multiple - 1) // multiple * multiple
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    rows, tokens = [], []
    for i, sample in enumerate(samples):
        ids[i, : len(sample.token_ids)] = torch.tensor(sample.token_ids)
        first = i * length + len(sample.prompt.token_ids) - 1
        rows.append(torch.arange(first, first + len(sample.response_ids)))
        tokens.append(torch.tensor(sample.response_ids, dtype=torch.long))
    return MicroBatch(list(samples), ids.to(device), torch.cat(rows).to(device), torch.cat(tokens).to(device))


def micro_batches(
    samples: Sequence[Sample], budget: int, device: torch.device, multiple: int = 1
) -> Iterator[MicroBatch]:
    """`cut` and `collate`."""
    for batch in cut(samples, budget):
        yield collate(batch, device, multiple)
