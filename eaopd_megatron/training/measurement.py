"""Metrics of an iteration: running averages, throughput and MFU, profiler traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from eaopd_megatron.data.types import Sample
from eaopd_megatron.distributed.parallel_state import gather_objects
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.shapes import ModelShape
from eaopd_megatron.planning.times import GpuSpec, find_gpu, flops_per_token, model_flops_utilization


class MetricAccumulator:
    """Means, counts and minima by name over micro-batches and ranks, kept on the device until `reduce`."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self._totals: Counter[str] = Counter()
        self._minima: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Add values [n] of any dtype to a mean. where: [n] bool, selects the values that count."""
        values = values.detach().double()
        if where is not None:
            values = values[where]
        self._sums[name] = self._sums.get(name, 0) + values.sum()
        self._counts[name] = self._counts.get(name, 0) + torch.tensor(float(values.numel()))

    def add_count(self, name: str, count: int) -> None:
        self._totals[name] += count

    def add_minimum(self, name: str, values: torch.Tensor) -> None:
        """Update a minimum with values [n]."""
        if values.numel():
            smallest = values.detach().double().min()
            self._minima[name] = torch.minimum(self._minima[name], smallest) if name in self._minima else smallest

    def reduce(self, group: dist.ProcessGroup | None) -> dict[str, float]:
        """Return means, counts and minima over the group's ranks, equal on each; names without values are absent."""
        local = (
            {name: (float(self._sums[name]), float(self._counts[name])) for name in self._sums},
            {name: float(value) for name, value in self._minima.items()},
            self._totals,
        )
        gathered = gather_objects(local, 1 if group is None else dist.get_world_size(group), group)
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


class ThroughputMeter:
    """Tokens per second, FLOP/s and MFU of a student with this Hugging Face configuration."""

    def __init__(self, config: Any, ranks: int) -> None:
        self.shape, self.ranks, self.gpu = ModelShape.of(config), ranks, _gpu()

    def sample_flops(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Return the model FLOPs of one forward and backward pass over each sample, without recomputation: [n] fp64."""
        lengths = [len(sample.token_ids) for sample in samples]
        flops = [length * flops_per_token(self.shape, length, training=True) for length in lengths]
        return torch.tensor(flops, dtype=torch.float64)

    def rates(self, times: Mapping[str, float], responses: int, length: float, flops: float) -> dict[str, float]:
        """Return the iteration's throughput metrics.

        times: seconds per phase. length, flops: mean response length and mean `sample_flops` of the responses. mfu is
        that of the student's phase, which includes recomputing π_old; it is absent if the GPU's peak is unknown.
        """
        tokens = length * responses
        total = sum(times[phase] for phase in ("rollout", "teacher", "student"))
        student = max(times["student"], 1e-9)
        rates = {
            "rollout/tokens_per_second": tokens / max(times["rollout"], 1e-9),
            "throughput/tokens_per_second": tokens / max(total, 1e-9),
            "throughput/tflops_per_rank": flops * responses / student / self.ranks / 1e12,
        }
        if self.gpu is not None:
            rates["throughput/mfu"] = model_flops_utilization(flops * responses, student, self.ranks, self.gpu.peak)
        return rates


def _gpu() -> GpuSpec | None:
    """Return this process's GPU if its data sheet is known."""
    try:
        return find_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    except UserError:
        return None


class ProfilerWindow:
    """Profiles `count` iterations from iteration `first` on (counted from 1); none if first is None.

    A run resumed inside the window profiles the remaining iterations.
    """

    def __init__(self, folder: Path, rank: int, first: int | None, count: int) -> None:
        self.folder, self.rank = folder, rank
        self.window = range(0) if first is None else range(first, first + count)
        self._profile: profile | None = None
        self._iteration = 0

    def begin(self, iteration: int) -> None:
        """Start profiling if the iteration is in the window."""
        self._iteration = iteration
        if iteration in self.window:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profile.start()

    def end(self) -> None:
        """Stop profiling and write the trace, if one was started."""
        if self._profile is None:
            return
        self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"iteration_{self._iteration:06d}_rank_{self.rank}.json.gz"
        self._profile.export_chrome_trace(str(trace))
        self._profile = None
