"""How a process is tied to the one that started it, and the variables through which a launcher speaks to its ranks."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

ERROR_FILE_VARIABLE = "EAOPD_ERROR_FILE"


LAUNCHER_PID_VARIABLE = "EAOPD_LAUNCHER_PID"


def die_with_parent() -> None:
    """Called first by a rank: the kernel kills it when its launcher dies, however that happens.

    Does nothing elsewhere than on Linux, and in a process that `launch` did not start.
    """
    launcher = os.environ.get(LAUNCHER_PID_VARIABLE)
    if launcher is None or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(launcher):  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
