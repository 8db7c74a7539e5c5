r"""A child process that compares mathematical answers, one JSON line in, one out; run by `grading.MathWorker`.

Request: {"gold", "answer", "relations": whether a set may equal a relation}, or {"gold"} alone: whether it parses as
mathematics, not text. Reply: {"equal": bool} or {"error": why there is no verdict}; first of all {"ready": true}.

Three faults of math-verify are corrected. It rounds decimals to six places, so that 2.88e-19 equals 2.89e-19: here six
significant digits must agree. It takes the last letter of `6m` for a unit: here units are dropped only if that removes
no symbol of the gold. It takes a number out of an expression that it cannot parse: here that is text.

Comparing `10^{10^{10}}` can run forever inside one multiplication, where no Python signal handler runs and so no time
limit of math-verify's. Comparisons therefore run in a fork of this process, in which the kernel's timers keep their
default action and end it; the next one is forked at once. No comparison exceeds its limit or outlives its caller.
"""

import contextlib
import functools
import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

_STARTUP_SECONDS = 300.0  # importing sympy from a cold network file system
_WALL_FACTOR = 10.0  # limits are CPU time, so that a busy machine gives the same grades; wall time is the backstop
_MEMORY_BYTES = 4 * 2**30
_RELATIVE_TOLERANCE = 2e-6

_WORDS = re.compile(r"\\(?:text|textrm|textbf|mathrm|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
_SYMBOL = re.compile(r"[A-Za-z]")


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
    equal = _build_comparison()
    _reply(replies, {"ready": True})
    _set_limits(0.0, 0.0)
    while True:
        child = os.fork()  # so sympy is imported once, however many comparisons end their process
        if child == 0:
            _serve(equal, replies, cpu_seconds)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        _reply(replies, {"error": f"ended with {code}"})


def _serve(equal: Callable[..., bool], replies: TextIO, cpu_seconds: float) -> None:
    for line in sys.stdin:
        _set_limits(cpu_seconds, cpu_seconds * _WALL_FACTOR)
        try:
            reply: dict[str, object] = {"equal": equal(**json.loads(line))}
        except Exception as error:
            reply = {"error": type(error).__name__}
        _set_limits(0.0, 0.0)
        _reply(replies, reply)


def _build_comparison() -> Callable[..., bool]:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr

    logging.disable(logging.CRITICAL)  # for example its warning that its own time limit is off
    targets = {}
    for units in (True, False):
        normalisation = NormalizationConfig(
            basic_latex=True, units=units, malformed_operators=True, nits=True, boxed="all", equations=False
        )
        targets[units] = (LatexExtractionConfig(normalization_config=normalisation),)

    def read(text: str, units: bool) -> list[Any]:
        boxed = f"\\boxed{{{text}}}"
        parsed: list[Any] = parse(boxed, targets[units], parsing_timeout=None, raise_on_error=True)  # type: ignore[arg-type]
        return parsed

    @functools.lru_cache(maxsize=512)
    def read_gold(text: str) -> tuple[list[Any], bool]:
        """Return the parsed gold, and whether its units were stripped."""
        with_units, without = read(text, False), read(text, True)
        strip = not _SYMBOL.search(_WORDS.sub("", text)) or with_units == without
        return (without if strip else with_units), strip

    def equal(gold: str, answer: str | None = None, relations: bool = False) -> bool:
        golds, strip = read_gold(gold)
        if answer is None:
            if not golds:
                raise ValueError("nothing was parsed")
            return not isinstance(golds[0], str)
        answers = read(answer, strip)
        both = [parsed[0] for parsed in (golds, answers) if parsed and isinstance(parsed[0], Expr)]
        percent = "%" in gold + answer  # 8% equals 8 and 0.08
        if len(both) == 2 and not percent and _differ_somewhere(*both):
            return False
        if not verify(golds, answers, allow_set_relation_comp=relations, timeout_seconds=None, raise_on_error=True):
            return False
        numbers = [one.evalf(12) for one in both if one.is_number]
        return len(numbers) < 2 or percent or _close(*numbers)

    return equal


def _differ_somewhere(one: Any, other: Any) -> bool:
    """Return whether two expressions in the same symbols differ at a point.

    This is faster than learning that no simplification makes them equal.
    """
    symbols = one.free_symbols | other.free_symbols
    if not symbols or symbols not in (one.free_symbols, other.free_symbols):  # math-verify compares different names
        return False
    point = {symbol: 0.6180339887 + 0.1732050808 * i for i, symbol in enumerate(sorted(symbols, key=str))}
    values = [expression.subs(point).evalf(12) for expression in (one, other)]
    return all(value.is_number and value.is_finite for value in values) and not _close(*values)


def _close(one: Any, other: Any) -> bool:
    return bool(abs(one - other) <= _RELATIVE_TOLERANCE * max(abs(one), abs(other)))


def _set_limits(cpu_seconds: float, wall_seconds: float) -> None:
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


def _reply(replies: TextIO, reply: dict[str, object]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    serve_comparisons(float(sys.argv[1]))
