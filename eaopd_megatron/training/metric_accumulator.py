"""Running means, sums and minima of per-token metrics over micro-batches, mini-batches and ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.distributed as dist

from eaopd_megatron.data.types import MicroBatch


class MetricAccumulator:
    """Sums and counts by name, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._totals: Counter[str] = Counter()
        self._minima: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Values [n] of any type; `where` [n] bool leaves the others out of sum and count."""
        values = values.detach().double()
        if where is not None:
            values = values[where]
        self._sums[name] = self._sums.get(name, 0) + values.sum()
        self._counts[name] = self._counts.get(name, 0) + torch.tensor(float(values.numel()))

    def add_count(self, name: str, count: int) -> None:
        """Add up a count."""
        self._totals[name] += count

    def add_minimum(self, name: str, values: torch.Tensor) -> None:
        """Keep the smallest value seen."""
        if values.numel():
            smallest = values.detach().double().min()
            self._minima[name] = torch.minimum(self._minima[name], smallest) if name in self._minima else smallest

    def reduce(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        """Means, totals and minima over the group's ranks, the same on each; a name that nobody counted is absent."""
        local = (
            {name: (float(self._sums[name]), float(self._counts[name])) for name in self._sums},
            {name: float(value) for name, value in self._minima.items()},
            self._totals,
        )
        gathered = [local]
        if group is not None and dist.get_world_size(group) > 1:
            gathered = [local] * dist.get_world_size(group)
            dist.all_gather_object(gathered, local, group=group)
        result: dict[str, float] = {}
        for name in sorted({name for sums, *_ in gathered for name in sums}):
            parts = [sums[name] for sums, *_ in gathered if name in sums]
            count = sum(c for _, c in parts)
            if count:
                result[name] = sum(s for s, _ in parts) / count
        for name in sorted({name for _, minima, _ in gathered for name in minima}):
            result[name] = min(minima[name] for _, minima, _ in gathered if name in minima)
        for name, count in sorted(sum((totals for *_, totals in gathered), Counter()).items()):
            result[name] = float(count)
        return result


@dataclass(frozen=True)
class ImportanceWeights:
    """Of a micro-batch's n response tokens on this rank: weight (fp32; exactly 1 where fresh), stale and clipped."""

    values: torch.Tensor
    stale: torch.Tensor
    clipped: torch.Tensor

    @classmethod
    def of(cls, batch: MicroBatch, old: torch.Tensor | None, clip: float) -> ImportanceWeights | None:
        """None where no sample is stale: the loss is left as it is. `old` [n]: π_old's log-probs, the trainer's.

        Raises ValueError for a stale sample without old_logprobs.
        """
        if not any(sample.stale for sample in batch.samples):
            return None
        if old is None:
            raise ValueError("stale samples need old_logprobs: recompute_old_logprobs comes before the update")
        stale = batch.gather_local([torch.full((len(s.response_ids),), s.stale) for s in batch.samples])
        ratio = (old - batch.rollout_logprobs()).exp()
        return cls(torch.where(stale, ratio.clamp(max=clip), 1.0).detach(), stale, stale & (ratio > clip))
