"""Doubles as separate processes, and an event loop for their clients."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eaopd_megatron.rollout.weight_sync.transport import RunCoroutine

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def in_a_loop() -> Iterator[RunCoroutine]:
    """Yield a function that runs coroutines in the event loop of another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield lambda work: asyncio.run_coroutine_threadsafe(work, loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class DoubleProcess:
    """A double that can be killed and restarted on its port. A context manager."""

    def __init__(self) -> None:
        self.url, self._port = "", 0
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> DoubleProcess:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process is not None
        self._process.kill()
        self.wait()

    def start(self) -> None:
        command = [sys.executable, "-m", "tools.sglang_double.server", "--port", str(self._port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().split()[0]
        self._port = int(self.url.rpartition(":")[2])

    def wait(self) -> None:
        """Wait until it has exited."""
        assert self._process is not None and self._process.stdout is not None
        self._process.wait(timeout=30)
        self._process.stdout.close()
