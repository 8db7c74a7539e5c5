"""Mathematical answers, compared by math-verify in child processes that may hang or die without harm."""

import contextlib
import functools
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

from eaopd_megatron.data.sources import Problem
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.answers import (
    answers_of,
    boxed,
    exact_number,
    immense,
    leniently_equal,
    misread,
    normalise,
    undressed,
)
from eaopd_megatron.evaluation.results import Grade

MAX_KEY_LENGTH = 200  # characters; a run-on answer must not swell the results file
MAX_ANSWER_LENGTH = 1000
"""Characters; longer ones are wrong unasked. The longest gold of the six benchmarks has 210."""
_Question = tuple[str, str, str]  # gold, the last box, and, where the gold has several answers, the last boxes


class MathGrader:
    r"""Compares a response's last complete \boxed{} with problem["answer"] in `workers` child processes.

    `Grade.correct` is math-verify's verdict (strict, but for its faults that `math_worker` names), `Grade.lenient` that
    of `notation` where the strict one is no. seconds: CPU time that one comparison may take; then its process is ended
    by the kernel, the response is wrong and an error, and the next comparison gets a new one. Safe to call from any
    thread; the processes start when first needed and end with this object or with this process, however it dies.

    All right answers carry the reference answer as their key, since they are one answer in different notations.
    """

    def __init__(self, *, workers: int = 2, seconds: float = 2.0) -> None:
        self._workers = workers
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        owned = [Worker(seconds) for _ in range(workers)]
        for worker in owned:
            self._idle.put(worker)
        self._finalizer = weakref.finalize(self, _close_all, owned)

    def __call__(self, problem: Problem, text: str) -> Grade:
        return self.grade_many([(problem, text)])[0]

    def grade_many(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Grades pairs in order; the same answer to the same problem is compared once."""
        questions = [_question(problem, text) for problem, text in items]
        distinct = list(dict.fromkeys(question for question in questions if question is not None))
        with ThreadPoolExecutor(self._workers) as threads:
            grades = dict(zip(distinct, threads.map(self._grade, distinct), strict=True))
        missing_gold = [problem.get("answer") is None for problem, _ in items]
        return [
            Grade(False, None, error=no_gold) if question is None else grades[question]
            for question, no_gold in zip(questions, missing_gold, strict=True)
        ]

    def readings(self, golds: Sequence[str]) -> list[str]:
        """How math-verify reads each gold: "mathematics", "text" (equal to the same text alone) or "nothing"."""
        with ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(self._reading, golds))

    def ask(self, **request: Any) -> bool | None:
        """What an idle child process says to a request of `math_worker`; None if it threw or ran out of time."""
        worker = self._idle.get()
        try:
            return worker.ask(**request)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the child processes; the next comparison would start them again."""
        self._finalizer()

    def _grade(self, question: _Question) -> Grade:
        gold, answer, boxes = question
        key = normalise(answer)[:MAX_KEY_LENGTH]
        if not answer or not gold:
            return Grade(False, key or None, error=not gold)
        if len(answer) > MAX_ANSWER_LENGTH:
            return Grade(False, key)
        strict = _quick_verdict(gold, answer)
        if strict is None:
            strict = False if misread(gold) else self.ask(gold=gold, answer=answer)
            if strict is None:
                return Grade(False, key, error=True)
        if strict:
            return Grade(True, normalise(gold)[:MAX_KEY_LENGTH])
        lenient = leniently_equal(gold, boxes, lambda one, other: self.ask(gold=one, answer=other, relations=True))
        return Grade(False, key, error=lenient is None, lenient=bool(lenient))

    def _reading(self, gold: str) -> str:
        gold = undressed(gold)
        if exact_number(gold) is not None:
            return "mathematics"
        return {True: "mathematics", False: "text", None: "nothing"}[self.ask(gold=gold)]


@functools.cache
def shared_math_grader() -> MathGrader:
    """This process's grader. UserError if math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("grading mathematics needs the package math-verify: pip install math-verify==0.9.0")
    return MathGrader()


def _question(problem: Problem, text: str) -> _Question | None:
    found, gold = boxed(text), problem.get("answer")
    if not found or gold is None:
        return None
    gold, answer = undressed(str(gold).strip()), found[-1]
    if len(answer) <= MAX_ANSWER_LENGTH:
        answer = undressed(answer)
    wanted = len(answers_of(gold))
    if len(answer) > MAX_ANSWER_LENGTH or not 1 < wanted <= len(found) or len(answers_of(answer)) != 1:
        return gold, answer, answer
    boxes = ", ".join(found[-wanted:])
    return gold, answer, boxes if len(boxes) <= MAX_ANSWER_LENGTH else answer


def _quick_verdict(gold: str, answer: str) -> bool | None:
    """What needs no algebra; None: ask math-verify.

    The same text is right, another number is wrong, and so are numbers that no computer writes down, where the gold has
    none of them.
    """
    if normalise(gold) == normalise(answer):
        return True
    if immense(answer) and not immense(gold):
        return False
    numbers = exact_number(gold), exact_number(answer)
    if numbers[0] is None or numbers[1] is None or misread(gold) or misread(answer):
        return None
    if numbers[0] == numbers[1]:
        return True
    return None if abs(numbers[0] - numbers[1]) < Fraction(1, 10**5) * abs(numbers[0]) else False


class Worker:
    """A child process running math_worker.py, started when needed and after it died. One thread uses it at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.process: subprocess.Popen[str] | None = None

    def ask(self, **request: Any) -> bool | None:
        """What it says to a request of `math_worker`; None if it threw, or if the process ended over its limits."""
        try:
            process = self.process if self.process and self.process.poll() is None else self._start()
            reply = self._exchange(process, json.dumps(request))
        except (OSError, ValueError):  # the process is gone, or its line was cut
            self.close()
            return None
        verdict = reply.get("equal")
        return verdict if isinstance(verdict, bool) else None

    def _start(self) -> subprocess.Popen[str]:
        self.close()
        script = str(Path(__file__).with_name("math_worker.py"))
        self.process = subprocess.Popen(
            [sys.executable, "-P", script, str(self._seconds)],  # -P: this folder's names must not hide packages
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # it is ended with its forks
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's order, hence its verdicts and times, repeat
        )
        self._read(self.process)
        return self.process

    def _exchange(self, process: subprocess.Popen[str], line: str) -> dict[str, Any]:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return self._read(process)

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.endswith("\n"):
            raise ValueError("the process ended")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # nobody is left to read what was written to it
                    pipe.close()


def _close_all(workers: list[Worker]) -> None:
    for worker in workers:
        worker.close()
