"""Tensors side by side in flat buckets of bounded size, so that a server is called once for many of them.

Two buckets take turns: the next one is filled while the last one is sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

GATHERED_COPIES = 3
"""Of a parameter while its Hugging Face tensors are made: its shards, the shards joined, the tensors."""


@dataclass(frozen=True)
class Placed:
    """A tensor in a bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """data: uint8 [bytes], the placed tensors one after the other without gaps."""

    data: torch.Tensor
    placed: Sequence[Placed] = field(default_factory=list)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the data, by name."""
        start = 0
        for one in self.placed:
            yield one.name, self.data[start : start + one.nbytes].view(one.dtype).view(one.shape)
            start += one.nbytes


def capacity(bucket_bytes: int, parameter_bytes: Iterable[int]) -> int:
    """Bytes of a bucket such that two of them, and what gathering a parameter takes, fit into 2 · bucket_bytes.

    parameter_bytes: of each of the model's parameters. Those above a third of a bucket are left out of the account:
    they take their own size beside the buckets.
    """
    most = max((size for size in parameter_bytes if GATHERED_COPIES * size <= bucket_bytes), default=0)
    return bucket_bytes - GATHERED_COPIES * most // 2


def buckets(tensors: Iterable[tuple[str, torch.Tensor]], capacity: int) -> Iterator[Bucket]:
    """The tensors in their order, in buckets of up to `capacity` bytes on the tensors' device.

    When a bucket is asked for, the one before the last is written again. A tensor that is greater than a bucket is one
    of its own, in the memory in which it came. A receiver puts the tensors side by side, so one whose dtype does not
    fit the bytes before it begins a bucket.
    """
    buffers: list[torch.Tensor] = []
    turn, used = 0, 0
    placed: list[Placed] = []
    for name, tensor in tensors:
        one = Placed(name, tensor.dtype, tuple(tensor.shape))
        if placed and (used + one.nbytes > capacity or used % one.dtype.itemsize):
            yield Bucket(buffers[turn][:used], placed)
            turn, used, placed = 1 - turn, 0, []
        if one.nbytes > capacity:
            yield Bucket(tensor.contiguous().view(-1).view(torch.uint8), [one])
            continue
        if len(buffers) <= turn:
            buffers.append(torch.empty(capacity, dtype=torch.uint8, device=tensor.device))
        buffers[turn][used : used + one.nbytes].view(one.dtype).view(one.shape).copy_(tensor)
        placed.append(one)
        used += one.nbytes
    if placed:
        yield Bucket(buffers[turn][:used], placed)
