"""One rank's fault ends all: the first error reaches every rank through the store, and a silent rank is noticed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import Store

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 45.0
_FAILURE = "failure"


@contextlib.contextmanager
def watched(store: Store, rank: int, world_size: int) -> Iterator[None]:
    """Watch the other ranks while the body runs; tell them when it raises."""
    watch = Watch(store.clone(), rank, world_size)  # a connection of its own: the process group's may be waiting
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.fail(str(error) or type(error).__name__, getattr(error, "exit_code", 1))
        raise
    watch.stop()


class Watch:
    """A thread that beats for this rank and looks for the others' beats and for a failure that one of them announced.

    Collectives cannot say that a peer is gone (NCCL waits for its time-out, which a long generation makes long). The thread
    ends the process: the main thread may be inside a collective that never returns.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        if self._world_size > 1:
            self._thread.start()

    def stop(self) -> None:
        """The rank ends in good order: the others no longer expect its beats."""
        if self._thread.is_alive():
            self._done.set()
            self._thread.join()
            self._store.set(f"beat/{self._rank}", "done")

    def fail(self, message: str, exit_code: int) -> None:
        """Announce this rank's error; only the first one of all ranks is kept."""
        if not self._thread.is_alive():
            return
        self._done.set()
        text = json.dumps({"rank": self._rank, "message": message, "exit_code": exit_code})
        self._store.compare_set(_FAILURE, "", text)

    def _run(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        self._store.set_timeout(timedelta(seconds=SILENCE_SECONDS))
        count = 0
        while not self._done.wait(BEAT_SECONDS / 5):
            try:
                if self._store.check([_FAILURE]):
                    failure = json.loads(self._store.get(_FAILURE))
                    if failure["rank"] != self._rank:
                        self._end(f"stopped: rank {failure['rank']} failed: {failure['message']}", failure["exit_code"])
                    return
                count += 1
                if count % 5 == 1:
                    self._store.set(f"beat/{self._rank}", str(count))
                    self._look(seen)
            except Exception as error:
                if not self._done.is_set():
                    self._end(f"stopped: the store on the first rank is gone ({type(error).__name__})", 1)
                return

    def _look(self, seen: dict[int, tuple[str, float]]) -> None:
        now = time.monotonic()
        for rank in range(self._world_size):
            key = f"beat/{rank}"
            beat = self._store.get(key).decode() if self._store.check([key]) else ""
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = (beat, now)
            elif beat != "done" and now - seen[rank][1] > SILENCE_SECONDS:
                self._end(f"stopped: no sign of life from rank {rank} for {SILENCE_SECONDS:.0f} s", 1)

    def _end(self, message: str, exit_code: int) -> None:
        print(f"error: rank {self._rank} {message}", file=sys.stderr, flush=True)
        os._exit(exit_code)
