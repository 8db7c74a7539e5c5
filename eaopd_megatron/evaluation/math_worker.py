r"""A child process that compares mathematical answers, one JSON line in, one out; run by `grading.MathWorker`.

Request: the arguments of `equality.equal`, or {"key": answer} for `equality.key`. Reply: {"equal": bool}, {"key": text
or null} or {"error": why there is no verdict}; first of all {"ready": true}.

Comparing `10^{10^{10}}` can run forever inside one multiplication, where no Python signal handler runs and so no time
limit of math-verify's. Comparisons therefore run in a fork of this process, in which the kernel's timers keep their
default action and end it; the next one is forked at once. No comparison exceeds its limit or outlives its caller.
"""

import contextlib
import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import TextIO

_STARTUP_SECONDS = 300.0  # importing sympy from a cold network file system
_WALL_FACTOR = 10.0  # limits are CPU time, so that a busy machine gives the same grades; wall time is the backstop
_MEMORY_BYTES = 4 * 2**30


def serve_comparisons(cpu_seconds: float) -> None:
    """Reply to each line of stdin until it closes; `cpu_seconds` limits one comparison."""
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM, signal.SIGPROF})
    with contextlib.suppress(ValueError, OSError):  # not every system can limit address space
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _set_limits(_STARTUP_SECONDS, _STARTUP_SECONDS)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what a library prints out of the replies
    equality = _load_equality()
    _reply(replies, {"ready": True})
    _set_limits(0.0, 0.0)
    while True:
        child = os.fork()  # so sympy is imported once, however many comparisons end their process
        if child == 0:
            _serve(equality, replies, cpu_seconds)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        _reply(replies, {"error": f"ended with {code}"})


def _serve(equality: ModuleType, replies: TextIO, cpu_seconds: float) -> None:
    for line in sys.stdin:
        _set_limits(cpu_seconds, cpu_seconds * _WALL_FACTOR)
        try:
            request = json.loads(line)
            reply: dict[str, object] = (
                {"key": equality.key(request["key"])} if "key" in request else {"equal": equality.equal(**request)}
            )
        except Exception as error:
            reply = {"error": type(error).__name__}
        _set_limits(0.0, 0.0)
        _reply(replies, reply)


def _load_equality() -> ModuleType:
    """Import what compares, and with it sympy."""
    sys.path.append(str(Path(__file__).resolve().parents[2]))  # at the end, where it hides no other package
    from eaopd_megatron.evaluation import equality

    logging.disable(logging.CRITICAL)  # for example math-verify's warning that its own time limit is off
    return equality


def _set_limits(cpu_seconds: float, wall_seconds: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def _reply(replies: TextIO, reply: dict[str, object]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    serve_comparisons(float(sys.argv[1]))
