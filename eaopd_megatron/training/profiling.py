"""Tokens a second, and what share of the hardware's arithmetic the student's updates use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from eaopd_megatron.data.types import Sample
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.shapes import ModelShape
from eaopd_megatron.planning.hardware import GpuSpec, find_gpu
from eaopd_megatron.planning.times import flops_per_token, model_flops_utilization


class ThroughputMeter:
    """Of a student with this Hugging Face configuration on so many ranks."""

    def __init__(self, config: Any, ranks: int) -> None:
        self.shape, self.ranks, self.gpu = ModelShape.of(config), ranks, _gpu()

    def sample_flops(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Model FLOPs of training on each sample once: forward and backward, without recomputation. [n] fp64"""
        lengths = [len(sample.token_ids) for sample in samples]
        flops = [length * flops_per_token(self.shape, length, training=True) for length in lengths]
        return torch.tensor(flops, dtype=torch.float64)

    def rates(self, times: Mapping[str, float], responses: int, length: float, flops: float) -> dict[str, float]:
        """The iteration's metrics: of `responses` responses, whose mean length and sample_flops are given.

        mfu is that of the student's phase (π_old included in its time), where the GPU's peak is known.
        """
        tokens = length * responses
        whole = sum(times[phase] for phase in ("rollout", "teacher", "student"))
        student = max(times["student"], 1e-9)
        found = {
            "rollout/tokens_per_second": tokens / max(times["rollout"], 1e-9),
            "throughput/tokens_per_second": tokens / max(whole, 1e-9),
            "throughput/tflops_per_rank": flops * responses / student / self.ranks / 1e12,
        }
        if self.gpu is not None:
            found["throughput/mfu"] = model_flops_utilization(flops * responses, student, self.ranks, self.gpu.peak)
        return found


def _gpu() -> GpuSpec | None:
    """This process's GPU, where its data sheet is known."""
    try:
        return find_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    except UserError:
        return None


class ProfilerWindow:
    """Profiles `count` iterations from number `first` (counted from 1) of a run; first None: none.

    A run that is resumed inside the window profiles what is left of it.
    """

    def __init__(self, folder: Path, rank: int, first: int | None, count: int) -> None:
        self.folder, self.rank = folder, rank
        self.window = range(0) if first is None else range(first, first + count)
        self._profile: profile | None = None
        self._iteration = 0

    def begin(self, iteration: int) -> None:
        """To be called at the start of every iteration."""
        self._iteration = iteration
        if iteration in self.window:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profile.start()

    def end(self) -> None:
        """To be called at the end of every iteration: writes the trace where there is one."""
        if self._profile is None:
            return
        self._profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"iteration_{self._iteration:06d}_rank_{self.rank}.json.gz"
        self._profile.export_chrome_trace(str(trace))
        self._profile = None
