"""Tie the lifetime of a process to its parent's; variables that a launcher passes to its ranks; threads that keep no
process alive."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

ERROR_FILE_VARIABLE = "EAOPD_ERROR_FILE"
LAUNCHER_PID_VARIABLE = "EAOPD_LAUNCHER_PID"
BUSY_FILE_SECONDS = 20.0
"""Age after which a busy file counts no more."""
_PR_SET_PDEATHSIG = 1


def busy_file(error_file: str | Path) -> Path:
    """Return the file whose presence, kept fresh, says that rank 0 does what must be completed before it ends."""
    return Path(error_file).with_name("busy")


def die_with_parent() -> None:
    """Make the kernel kill this process when its launcher dies, however that happens. A rank calls it first.

    Does nothing outside Linux, and in a process without $EAOPD_LAUNCHER_PID.
    """
    launcher = os.environ.get(LAUNCHER_PID_VARIABLE)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(launcher):  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def finished_file(error_file: str | Path, rank: int) -> Path:
    """Return the file that a rank creates when its work is done. An exit code of 0 alone does not say so: a library, or
    a thread of the rank, may end the process."""
    return Path(f"{error_file}-finished.{rank}")


def call_in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Start `work` in a thread that does not keep the process alive; the future gets its result or error."""
    future: Future[T] = Future()
    threading.Thread(target=complete, args=(future, work), name=name, daemon=True).start()
    return future


def complete(future: Future[T], work: Callable[[], T]) -> Future[T]:
    """Run `work` here; the future gets its result or error. Return the future."""
    try:
        future.set_result(work())
    except BaseException as error:  # of the caller of `result`
        future.set_exception(error)
    return future
