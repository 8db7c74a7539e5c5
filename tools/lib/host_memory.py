"""Measure how much a call raises the resident memory of this process (Linux)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path


def _status(key: str) -> int:
    """Return a line of /proc/self/status in bytes: VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def growth(work: Callable[[], object]) -> int:
    """Return by how many bytes the process's memory rises above its present size while `work` runs."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)  # the kernel's counters lag by a few pages
