"""Failure detection: one rank's error ends every rank, a silent rank is noticed, and the last collectives are recorded.

PyTorch's flight recorder writes RUN/failures/collectives/rank_N, a pickle whose `entries` list each collective that the
rank entered, with shapes, group and stack. On GPUs these are NCCL's, and gloo's are in gloo_rank_N. For NCCL groups (it
cannot tell gloo groups apart)

    python -m torch.distributed.flight_recorder.fr_trace RUN/failures/collectives --prefix rank_

compares the ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import Store

from eaopd_megatron.utils.gpu_environment import set_unless_given

HEARTBEAT_INTERVAL_SECONDS = 5.0
HEARTBEAT_TIMEOUT_SECONDS = 45.0
_POLL_SECONDS = 1.0
_DUMP_SECONDS = 60.0
_FAILURE_KEY, _DONE = "failure", "done"
_DUMP_PREFIX = "rank_"


@contextlib.contextmanager
def heartbeat_monitor(
    store: Store,
    rank: int,
    world_size: int,
    timeout_seconds: float = HEARTBEAT_TIMEOUT_SECONDS,
    on_failure: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Monitor the other ranks while the body runs, and announce an exception of the body to them.

    timeout_seconds: a rank without a heartbeat for this long counts as dead. on_failure: called once, in the body's
    thread if the body raises, in the monitor's thread if another rank's failure ends this process.
    """
    connection = store.clone()  # type: ignore[attr-defined]  # the process group may be blocked in its own connection
    thread = _HeartbeatThread(connection, rank, world_size, timeout_seconds, on_failure)
    thread.start()
    try:
        yield
    except SystemExit:  # a requested stop: all ranks exit
        thread.stop()
        raise
    except BaseException as error:
        thread.announce_failure(str(error) or type(error).__name__, getattr(error, "exit_code", 1))
        _call_quietly(on_failure)
        raise
    thread.stop()


class _HeartbeatThread:
    """Send this rank's heartbeats through the store, and check the other ranks' and the announced failure.

    Collectives cannot report a dead peer: NCCL waits for its timeout, which long generations require to be long. On a
    failure the thread ends the process, as the main thread may be in a collective that never returns.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, timeout_seconds: float, on_failure: Callable[[], None]
    ) -> None:
        self._store, self._rank, self._world_size, self._timeout = store, rank, world_size, timeout_seconds
        self._on_failure = on_failure
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        if self._world_size > 1:
            self._thread.start()

    def stop(self) -> None:
        """End normally: the other ranks no longer expect this rank's heartbeats."""
        if self._thread.is_alive():
            self._done.set()
            self._thread.join()
            self._store.set(f"beat/{self._rank}", _DONE)

    def announce_failure(self, message: str, exit_code: int) -> None:
        """Publish this rank's error; the store keeps the first one of all ranks."""
        if not self._thread.is_alive():
            return
        self._done.set()
        text = json.dumps({"rank": self._rank, "message": message, "exit_code": exit_code})
        self._store.compare_set(_FAILURE_KEY, "", text)

    def _run(self) -> None:
        last_change: dict[int, tuple[str, float]] = {}  # rank: its last heartbeat and when it arrived
        self._store.set_timeout(timedelta(seconds=self._timeout))
        last_beat = -math.inf
        while not self._done.wait(_POLL_SECONDS):
            try:
                if self._store.check([_FAILURE_KEY]):
                    failure = json.loads(self._store.get(_FAILURE_KEY))
                    self._exit(f"rank {failure['rank']} failed: {failure['message']}", failure["exit_code"])
                now = time.monotonic()
                if now - last_beat >= min(HEARTBEAT_INTERVAL_SECONDS, self._timeout / 3):
                    last_beat = now
                    self._store.set(f"beat/{self._rank}", str(now))
                    self._check_peers(last_change, now)
            except Exception as error:
                if not self._done.is_set():
                    self._exit(f"the store that joins the ranks is gone ({type(error).__name__})", 1)

    def _check_peers(self, last_change: dict[int, tuple[str, float]], now: float) -> None:
        for rank in range(self._world_size):
            key = f"beat/{rank}"
            beat = self._store.get(key).decode() if self._store.check([key]) else ""
            if rank not in last_change or last_change[rank][0] != beat:
                last_change[rank] = (beat, now)
            elif beat != _DONE and now - last_change[rank][1] > self._timeout:
                self._exit(f"no sign of life from rank {rank} for {self._timeout:.0f} s", 1)

    def _exit(self, message: str, exit_code: int) -> None:
        print(f"error: rank {self._rank} stops: {message}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # a dump that hangs in CUDA holds the GIL; this timer does not need it
            faulthandler.dump_traceback_later(_DUMP_SECONDS, exit=True)
        _call_quietly(self._on_failure)
        os._exit(exit_code or 1)  # a failure is never told as success, whatever the store holds


def _call_quietly(on_failure: Callable[[], None]) -> None:
    """Call the failure handler; an error in it must not hide the error that ends the run."""
    try:
        on_failure()
    except Exception as error:
        print(f"warning: the failure could not be recorded: {error}", file=sys.stderr, flush=True)


def enable_flight_recorder(folder: Path, buffer_size: int) -> None:
    """Record this rank's last `buffer_size` collectives (0: none). Call it before the process group is initialised.

    NCCL dumps to the same files when it aborts a process after a timeout. Environment variables that are set already
    take precedence, also those of torch's older names.
    """
    given = os.environ.get("TORCH_NCCL_TRACE_BUFFER_SIZE", str(buffer_size))
    set_unless_given({"TORCH_FR_BUFFER_SIZE": given})  # torch's own default is 2000
    if not buffer_size:
        return
    if torch.cuda.is_available():
        folder.mkdir(parents=True, exist_ok=True)  # NCCL does not create it
    prefix = os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / _DUMP_PREFIX))
    set_unless_given({"TORCH_FR_DUMP_TEMP_FILE": prefix, "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"})


def dump_flight_recorder(folder: Path, rank: int) -> None:
    """Write this rank's recorded collectives, if recording is on. Safe from any thread, even mid-collective."""
    if not int(os.environ.get("TORCH_FR_BUFFER_SIZE", "0")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, trace in _flight_recorder_traces().items():
        partial = folder / f".{prefix}{rank}.{threading.get_ident()}"  # two threads may notice the failure
        partial.write_bytes(trace())
        partial.replace(folder / f"{prefix}{rank}")


def _flight_recorder_traces() -> dict[str, Callable[[], bytes]]:
    """Return torch's calls for its pickled traces, by the prefix of their file; the only use of these private calls.

    torch has one recorder for NCCL, and one for everything else. Both traces lie beside each other on GPUs.
    """
    from torch._C import _distributed_c10d as c10d

    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        return {
            f"gloo_{_DUMP_PREFIX}": c10d._dump_fr_trace,  # type: ignore[attr-defined]
            _DUMP_PREFIX: c10d._dump_nccl_trace,  # type: ignore[attr-defined]
        }
    return {_DUMP_PREFIX: c10d._dump_fr_trace}  # type: ignore[attr-defined]
