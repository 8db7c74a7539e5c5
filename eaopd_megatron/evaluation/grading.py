"""Right or wrong: one grader for each kind of benchmark, none of which can stop a run.

A grader that throws or runs out of time gives `Grade(False, ..., error=True)`; the errors are counted and reported.
"""

import contextlib
import functools
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaopd_megatron.errors import UserError

Problem = dict[str, Any]
_MAX_KEY_LENGTH = 200  # characters; a run-on answer must not swell the results file


@dataclass(frozen=True)
class Grade:
    """One response's grade. `key` names the answer that it gives, equal for equal answers; None where it gives none.

    `error`: the grader threw or ran out of time, and the response counts as wrong.
    """

    correct: bool
    key: str | None
    error: bool = False


Grader = Callable[[Problem, str], Grade]


def benchmark_name(name_or_path: str) -> str:
    """The short name under which a benchmark is reported: the name itself, or a path's file name without its ending."""
    return Path(name_or_path).stem if name_or_path.endswith(".jsonl") else name_or_path.strip("/").split("/")[-1]


def grader_for(name_or_path: str) -> Grader:
    """The grader of a benchmark: the exact checker for Countdown, mathematical equality of answers for any other.

    UserError if math-verify is needed and missing.
    """
    if benchmark_name(name_or_path) == "countdown":
        return grade_countdown
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(f"grading {name_or_path} needs the package math-verify: pip install math-verify==0.9.0")
    return _shared_math_grader()


def grade_all(grader: Grader, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
    """Grades of (problem, response text) pairs, in order; mathematics in parallel. An exception is an error grade."""
    if isinstance(grader, MathGrader):
        return grader.grade_many(items)
    return [_guarded(grader, problem, text) for problem, text in items]


def _guarded(grader: Grader, problem: Problem, text: str) -> Grade:
    try:
        return grader(problem, text)
    except Exception:
        return Grade(False, None, error=True)


def grade_countdown(problem: Problem, text: str) -> Grade:
    """Grades a Countdown response; the key is the normalised solution, so that different right ones can be counted."""
    from eaopd_megatron.data.countdown import check

    try:
        correct, key = check(problem, text)
    except Exception:
        return Grade(False, None, error=True)
    return Grade(bool(correct), key)


class MathGrader:
    """Compares a response's last boxed answer with problem["answer"] by math-verify, in `workers` child processes.

    seconds: CPU time that one comparison may take; then its process is ended by the kernel, the response is wrong and
    an error, and the next comparison gets a new process. Safe to call from any thread; the processes start when first
    needed and end with this object or with this process, however it dies.

    All right answers carry the reference answer as their key, since they are one answer in different notations.
    """

    def __init__(self, *, workers: int = 2, seconds: float = 5.0) -> None:
        self._workers = workers
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        owned = [_Worker(seconds) for _ in range(workers)]
        for worker in owned:
            self._idle.put(worker)
        self._finalizer = weakref.finalize(self, _close_all, owned)

    def __call__(self, problem: Problem, text: str) -> Grade:
        return self.grade_many([(problem, text)])[0]

    def grade_many(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Grades pairs in order; the same answer to the same problem is compared once."""
        questions: list[tuple[str, str] | None] = []
        for problem, text in items:
            answer, gold = last_boxed(text), problem.get("answer")
            questions.append(None if answer is None or gold is None else (str(gold).strip(), answer))
        distinct = list(dict.fromkeys(question for question in questions if question is not None))
        with ThreadPoolExecutor(self._workers) as threads:
            grades = dict(zip(distinct, threads.map(self._grade, distinct), strict=True))
        missing_gold = [problem.get("answer") is None for problem, _ in items]
        return [
            Grade(False, None, error=no_gold) if question is None else grades[question]
            for question, no_gold in zip(questions, missing_gold, strict=True)
        ]

    def close(self) -> None:
        """Ends the child processes; the next comparison would start them again."""
        self._finalizer()

    def _grade(self, question: tuple[str, str]) -> Grade:
        gold, answer = question
        key = normalise(answer)[:_MAX_KEY_LENGTH]
        gold_key = normalise(gold)[:_MAX_KEY_LENGTH]
        if not answer or not gold:
            return Grade(False, key or None, error=not gold)
        verdict = _quick_verdict(normalise(gold), normalise(answer))
        if verdict is None:
            worker = self._idle.get()
            try:
                verdict = worker.equal(gold, answer)
            finally:
                self._idle.put(worker)
        if verdict is None:
            return Grade(False, key, error=True)
        return Grade(True, gold_key) if verdict else Grade(False, key)


@functools.cache
def _shared_math_grader() -> MathGrader:
    return MathGrader()


def _quick_verdict(gold: str, answer: str) -> bool | None:
    """What needs no algebra: the same text is right, another whole number is wrong; None: ask math-verify."""
    if gold == answer:
        return True
    whole = re.compile(r"-?\d{1,30}")
    return int(gold) == int(answer) if whole.fullmatch(gold) and whole.fullmatch(answer) else None


_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete \boxed{...} of a response (the inner one where they are nested), or None."""
    opened: list[tuple[bool, int]] = []
    last_start, content = -1, None
    for match in _BRACES.finditer(text):
        token = match.group()
        if token == "{" or token.startswith("\\boxed"):
            opened.append((token != "{", match.end()))
        elif token == "}" and opened:
            is_box, start = opened.pop()
            if is_box and start > last_start:
                last_start, content = start, text[start : match.start()].strip()
    return content


def normalise(answer: str) -> str:
    """An answer's text without what carries no meaning: spaces, dollars, \\left, \\right, \\dfrac, a final stop."""
    text = answer.replace("\\!", "").replace("\\,", "").replace("\\$", "").replace("$", "")
    text = re.sub(r"\\(left|right)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"\s+", "", text).rstrip(".")


class _Worker:
    """A child process running math_worker.py, started when needed and after it died. One thread uses it at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def equal(self, gold: str, answer: str) -> bool | None:
        """True or False as math-verify says; None if it threw, or if the process ended over its limits."""
        try:
            process = self._process if self._process and self._process.poll() is None else self._start()
            reply = self._ask(process, json.dumps({"gold": gold, "answer": answer}))
        except (OSError, ValueError):  # the process is gone, or its line was cut
            self.close()
            return None
        verdict = reply.get("equal")
        return verdict if isinstance(verdict, bool) else None

    def _start(self) -> subprocess.Popen[str]:
        self.close()
        script = str(Path(__file__).with_name("math_worker.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-P", script, str(self._seconds)],  # -P: this folder's names must not hide packages
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's order, hence its verdicts and times, repeat
        )
        self._read(self._process)
        return self._process

    def _ask(self, process: subprocess.Popen[str], line: str) -> dict[str, Any]:
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
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # nobody is left to read what was written to it
                    pipe.close()


def _close_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.close()
