"""Exit code and error report of a rank or a tool."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from eaopd_megatron.errors import UserError
from eaopd_megatron.utils.files import atomic_write
from eaopd_megatron.utils.lifetime import (
    BUSY_FILE_SECONDS,
    ERROR_FILE_VARIABLE,
    LAUNCHER_PID_VARIABLE,
    busy_file,
    finished_file,
)


def run_entrypoint(work: Callable[[], int | None]) -> int:
    """Run `work` and return its exit code (0 for None). Report a UserError without a traceback, other errors with one.

    The report goes to `$EAOPD_ERROR_FILE.<rank>`, from which the launcher makes the line that the user sees; without a
    launcher it goes to stderr.
    """
    # missing optional packages (`eaopd doctor` reports those that matter) and deprecations inside libraries
    warnings.simplefilter("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        code = work() or 0
        if code == 0 and (base := os.environ.get(ERROR_FILE_VARIABLE)):
            finished_file(base, int(os.environ.get("RANK", "0"))).touch()
        return code
    except SystemExit as stop:  # stopped by a signal, with the state saved
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException as raised:
        error = as_user_error(raised)
        if error is None:
            traceback.print_exc()
            _report(f"{type(raised).__name__}: {raised}", 1, user=False)
            return 1
        _report(str(error), error.exit_code, user=True)
        return error.exit_code


def as_user_error(error: BaseException) -> UserError | None:
    """Return the error as a UserError if the user can mend it, else None."""
    if isinstance(error, OSError) and error.filename:  # a full disk, a folder without permission
        return UserError(f"{error.filename}: {error.strerror}")
    return error if isinstance(error, UserError) else None


def _report(message: str, code: int, *, user: bool) -> None:
    base, rank = os.environ.get(ERROR_FILE_VARIABLE), int(os.environ.get("RANK", "0"))
    if base is None:
        print(f"error: {message}" if user else f"error: rank {rank}: {message}", file=sys.stderr, flush=True)
        return
    record = {"message": message, "exit_code": code, "rank": rank, "user": user, "time": time.time()}
    atomic_write(Path(f"{base}.{rank}"), json.dumps(record))


@contextlib.contextmanager
def must_complete() -> Iterator[None]:
    """Tell this host's launcher, while inside, that after a stop signal the run must not be killed yet.

    For work that cannot look at the signal in between: updates, transfers, saving. Rank 0, which takes part in all of
    it, touches a file every few seconds. Without a launcher, and on the other ranks, nothing is done.
    """
    base = os.environ.get(ERROR_FILE_VARIABLE)
    if base is None or LAUNCHER_PID_VARIABLE not in os.environ or os.environ.get("RANK") != "0":
        yield
        return
    path, ended = busy_file(base), threading.Event()

    def touch() -> None:
        with contextlib.suppress(OSError):  # the disk is full, or the launcher gone: no reason to end a run
            path.touch()

    def keep_fresh() -> None:
        while not ended.wait(BUSY_FILE_SECONDS / 4):
            touch()

    touch()
    thread = threading.Thread(target=keep_fresh, name="must_complete", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
