"""The learning rate as a pure function of completed updates: a resume can neither step it twice nor leave it at 0."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up over `warmup` updates, then `kind` ("cosine", "linear", "constant") from `peak` to `floor` at
    `total`."""

    peak: float
    total: int
    kind: str = "cosine"
    warmup: int = 0
    floor: float = 0.0

    def __call__(self, update: int) -> float:
        """Learning rate of the update after `update` completed ones."""
        if update < self.warmup:
            return self.peak * (update + 1) / self.warmup
        if self.kind == "constant":
            return self.peak
        progress = min(1.0, (update - self.warmup) / max(1, self.total - self.warmup))
        share = 0.5 * (1 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1 - progress
        return self.floor + (self.peak - self.floor) * share
