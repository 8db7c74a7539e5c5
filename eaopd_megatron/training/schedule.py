"""Learning rate and objective as pure functions of completed updates.

A resume can neither step a schedule twice nor leave the learning rate at 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from eaopd_megatron.objective import Objective


@dataclass(frozen=True)
class LearningRateSchedule:
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


@dataclass(frozen=True)
class ObjectiveSchedule:
    """`start`, whose threshold (τ) and forward weight (α) move to their ends, where given, over `total` updates."""

    start: Objective
    total: int
    kind: str = "linear"
    threshold_end: float | None = None
    forward_weight_end: float | None = None

    def __call__(self, update: int) -> Objective:
        """The objective of the update after `update` completed ones."""
        return replace(
            self.start,
            threshold=self._ramp(self.start.threshold, self.threshold_end, update),
            forward_weight=self._ramp(self.start.forward_weight, self.forward_weight_end, update),
        )

    def _ramp(self, start: float, end: float | None, update: int) -> float:
        return start if end is None else LearningRateSchedule(start, self.total, self.kind, floor=end)(update)
