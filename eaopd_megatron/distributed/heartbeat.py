"""One rank's fault ends all: the first error reaches every rank through the store, and a silent rank is noticed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from torch.distributed import Store

BEAT_SECONDS = 5.0
SILENCE_SECONDS = 45.0
POLL_SECONDS = 1.0
_FAILURE, _DONE = "failure", "done"


@contextlib.contextmanager
def watched(
    store: Store,
    rank: int,
    world_size: int,
    silence: float = SILENCE_SECONDS,
    on_failure: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Watch the other ranks while the body runs; tell them when it raises.

    silence: seconds without a beat that count as death. on_failure: called once when the body raises or another rank's
    fault ends this one, then from the watching thread.
    """
    connection = store.clone()  # type: ignore[attr-defined]  # its own: the process group's may be waiting for an answer
    watch = Watch(connection, rank, world_size, silence, on_failure)
    watch.start()
    try:
        yield
    except SystemExit:  # asked to stop, as all ranks were
        watch.stop()
        raise
    except BaseException as error:
        watch.fail(str(error) or type(error).__name__, getattr(error, "exit_code", 1))
        _try(on_failure)
        raise
    watch.stop()


class Watch:
    """A thread that beats for this rank and looks for the others' beats and for a failure that one of them announced.

    Collectives cannot say that a peer is gone (NCCL waits for its time-out, which a long generation makes long). The
    thread ends the process: the main thread may be inside a collective that never returns.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, silence: float, on_failure: Callable[[], None]
    ) -> None:
        self._store, self._rank, self._world_size, self._silence = store, rank, world_size, silence
        self._on_failure = on_failure
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
            self._store.set(f"beat/{self._rank}", _DONE)

    def fail(self, message: str, exit_code: int) -> None:
        """Announce this rank's error; only the first one of all ranks is kept."""
        if not self._thread.is_alive():
            return
        self._done.set()
        text = json.dumps({"rank": self._rank, "message": message, "exit_code": exit_code})
        self._store.compare_set(_FAILURE, "", text)

    def _run(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        self._store.set_timeout(timedelta(seconds=self._silence))
        last_beat = -math.inf
        while not self._done.wait(POLL_SECONDS):
            try:
                if self._store.check([_FAILURE]):
                    failure = json.loads(self._store.get(_FAILURE))
                    self._end(f"rank {failure['rank']} failed: {failure['message']}", failure["exit_code"])
                now = time.monotonic()
                if now - last_beat >= min(BEAT_SECONDS, self._silence / 3):
                    last_beat = now
                    self._store.set(f"beat/{self._rank}", str(now))
                    self._look(seen, now)
            except Exception as error:
                if not self._done.is_set():
                    self._end(f"the store that joins the ranks is gone ({type(error).__name__})", 1)

    def _look(self, seen: dict[int, tuple[str, float]], now: float) -> None:
        for rank in range(self._world_size):
            key = f"beat/{rank}"
            beat = self._store.get(key).decode() if self._store.check([key]) else ""
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = (beat, now)
            elif beat != _DONE and now - seen[rank][1] > self._silence:
                self._end(f"no sign of life from rank {rank} for {self._silence:.0f} s", 1)

    def _end(self, message: str, exit_code: int) -> None:
        print(f"error: rank {self._rank} stops: {message}", file=sys.stderr, flush=True)
        _try(self._on_failure)
        os._exit(exit_code)


def _try(record: Callable[[], None]) -> None:
    """The error that ends the run matters more than one in recording it."""
    try:
        record()
    except Exception as error:
        print(f"warning: the failure could not be recorded: {error}", file=sys.stderr, flush=True)
