"""Which prompts an iteration uses: a pure function of (seed, iteration), so that a resumed run cannot lose its
place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from eaopd_megatron.data.random import generator
from eaopd_megatron.errors import RecipeError


@dataclass(frozen=True)
class PromptCursor:
    """Epochs over `count` prompts in batches of `batch`, in a new order each epoch where `shuffle`.

    last_batch: what becomes of an epoch's last, smaller batch: "drop" (its prompts wait for another epoch's order) or
    "keep".
    """

    count: int
    batch: int
    seed: int
    shuffle: bool = True
    last_batch: str = "drop"

    def __post_init__(self) -> None:
        if self.batches_per_epoch < 1:
            raise RecipeError(
                f"train.prompts_per_iteration={self.batch} is more than the {self.count} prompts of data.source; "
                "lower it or set data.last_batch=keep"
            )

    @property
    def batches_per_epoch(self) -> int:
        return self.count // self.batch if self.last_batch == "drop" else -(-self.count // self.batch)

    def epoch(self, iteration: int) -> int:
        """The epoch, from 0, of the iteration, from 0."""
        return iteration // self.batches_per_epoch

    def indices(self, iteration: int) -> list[int]:
        """Indices of the prompts of the iteration (from 0)."""
        start = iteration % self.batches_per_epoch * self.batch
        return self._order(self.epoch(iteration))[start : start + self.batch]

    def size(self, iteration: int) -> int:
        """Number of prompts of the iteration (from 0)."""
        return min(self.batch, self.count - iteration % self.batches_per_epoch * self.batch)

    def _order(self, epoch: int) -> list[int]:
        return _permutation(self.count, self.seed, epoch) if self.shuffle else list(range(self.count))


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, "prompts", epoch)).tolist()
