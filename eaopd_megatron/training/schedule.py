"""Learning rate and objective as pure functions of the completed updates.

So a resumed run cannot step a schedule twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from eaopd_megatron.objective import Objective


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warmup over `warmup` updates, then cosine, linear or constant (`kind`) from peak to floor at `total`."""

    peak: float
    total: int
    kind: str = "cosine"
    warmup: int = 0
    floor: float = 0.0

    def __call__(self, update: int) -> float:
        """Return the learning rate of the update that follows `update` completed ones."""
        if update < self.warmup:
            return self.peak * (update + 1) / self.warmup
        if self.kind == "constant":
            return self.peak
        progress = min(1.0, (update - self.warmup) / max(1, self.total - self.warmup))
        share = 0.5 * (1 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1 - progress
        return self.floor + (self.peak - self.floor) * share


@dataclass(frozen=True)
class ObjectiveSchedule:
    """The objective `start`, whose threshold τ and forward weight α move to their end values over `total` updates."""

    start: Objective
    total: int
    kind: str = "linear"
    threshold_end: float | None = None
    forward_weight_end: float | None = None

    def __call__(self, update: int) -> Objective:
        """Return the objective of the update that follows `update` completed ones."""
        return replace(
            self.start,
            threshold=self._ramp(self.start.threshold, self.threshold_end, update),
            forward_weight=self._ramp(self.start.forward_weight, self.forward_weight_end, update),
        )

    def _ramp(self, start: float, end: float | None, update: int) -> float:
        return start if end is None else LearningRateSchedule(start, self.total, self.kind, floor=end)(update)
