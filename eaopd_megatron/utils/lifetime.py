"""Tie the lifetime of a process to its parent's; variables that a launcher passes to its ranks."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

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
