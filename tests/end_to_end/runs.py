"""A short Countdown run through the command line, as a user starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "train.iterations=6",
    "train.prompts_per_iteration=24",
    "train.mini_batch=8",
    "optimizer.warmup_updates=2",
    "evaluation.problems=8",
    "evaluation.samples=2",
    "evaluation.interval=3",
    "run.save_interval=2",
)


class Command:
    """`python -m eaopd_megatron ...` in a process group of its own."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "eaopd_megatron", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self, limit: float = 240) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        try:
            out, err = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGTERM)
            raise
        return self.process.returncode, out, err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], limit: float = 180) -> None:
    """Poll until the condition holds; fail when the process ends before."""
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def workers_of(launcher: int) -> list[int]:
    """Process ids of the launcher's ranks."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text()
    return [int(pid) for pid in children.split()]


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
