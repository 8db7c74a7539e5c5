"""A child process that compares mathematical answers, one JSON line in, one out.

In: {"gold", "answer"}; out: {"equal": bool} or {"error": name of the exception}; first of all {"ready": true}.

Run as a script by `grading.MathGrader`; it imports only math-verify. A symbolic comparison can run for ever inside one
big multiplication (`10^{10^{10}}`), where a Python signal handler, and so math-verify's own time limit, never gets its
turn. Here the kernel's timers keep their default action, which ends this process whatever it is doing. So no answer
costs more than its limit, from any thread of the parent, and a child whose parent was killed does not run on.
"""

import contextlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import TextIO

STARTUP_SECONDS = 300.0  # importing sympy from a cold network file system
WALL_FACTOR = 10.0  # the limit is CPU time, so that a busy machine gives the same grades; wall time is the backstop
MEMORY_BYTES = 4 * 2**30


def main(cpu_seconds: float) -> None:
    """Answers one line for each line of stdin until it closes; `cpu_seconds` is the limit of one comparison."""
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM, signal.SIGPROF})
    with contextlib.suppress(ValueError, OSError):  # not every system limits address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _set_limits(STARTUP_SECONDS, STARTUP_SECONDS)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not get between the replies
    equal = _comparison()
    _answer(replies, {"ready": True})
    _set_limits(0.0, 0.0)
    for line in sys.stdin:
        request = json.loads(line)
        _set_limits(cpu_seconds, cpu_seconds * WALL_FACTOR)
        try:
            reply: dict[str, object] = {"equal": equal(request["gold"], request["answer"])}
        except Exception as error:
            reply = {"error": type(error).__name__}
        _set_limits(0.0, 0.0)
        _answer(replies, reply)


def _comparison() -> Callable[[str, str], bool]:
    from math_verify import parse, verify  # the slow import, under the start-up limit

    logging.disable(logging.CRITICAL)  # among others its warning that its own time limit is off

    def equal(gold: str, answer: str) -> bool:
        parsed = [
            parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]
            for text in (gold, answer)
        ]
        return bool(verify(parsed[0], parsed[1], timeout_seconds=None, raise_on_error=True))

    return equal


def _set_limits(cpu_seconds: float, wall_seconds: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def _answer(replies: TextIO, reply: dict[str, object]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
