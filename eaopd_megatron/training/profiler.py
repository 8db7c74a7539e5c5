"""A window of iterations under torch's profiler, one trace a rank and iteration (for chrome://tracing, Perfetto)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


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
