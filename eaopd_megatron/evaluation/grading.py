r"""Graders: the exact checker for Countdown, mathematical equality for everything else. No grader can stop a run.

Mathematics is compared by math-verify in child processes, which may hang or die without harm: a comparison that raises
or exceeds its CPU time gives `Grade(False, ..., error=True)`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
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
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eaopd_megatron.data.sources import Problem
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation import answers
from eaopd_megatron.evaluation.results import Grade, Grader, ProblemResult

if TYPE_CHECKING:
    from eaopd_megatron.data.types import Prompt

MAX_ANSWER_LENGTH = 1000
"""Characters; longer answers are wrong without a comparison. The longest gold of the six benchmarks has 210."""
_MAX_KEY_LENGTH = 200  # characters; a run-on answer must not swell the results file
_Question = tuple[str, str, str]  # gold, the last box, and, if the gold has several answers, the last boxes joined


@dataclass(frozen=True)
class DecodedResponse:
    """A response as text. problem, sample: its index. tokens: its length; finish_reason: "stop" | "length"."""

    problem: int
    sample: int
    text: str
    tokens: int
    finish_reason: str

    def check(self) -> None:
        """Raise TypeError for a value of another type, as a damaged file may hold it."""
        texts, numbers = (self.text, self.finish_reason), (self.problem, self.sample, self.tokens)
        if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
            raise TypeError("no response")


def grade_problems(
    grader: Grader, prompts: Sequence[Prompt], responses: Sequence[DecodedResponse]
) -> dict[int, ProblemResult]:
    """Grade responses, ordered by sample within each problem. Return {problem index: its result}."""
    grades = grade_responses(grader, [(prompts[one.problem].problem, one.text) for one in responses])
    by_problem: dict[int, list[tuple[Grade, DecodedResponse]]] = {}
    for grade, response in zip(grades, responses, strict=True):
        by_problem.setdefault(response.problem, []).append((grade, response))
    results = {}
    for problem, samples in by_problem.items():
        truncated = [response.finish_reason == "length" for _, response in samples]
        lengths = [response.tokens for _, response in samples]
        one, grades = prompts[problem], [grade for grade, _ in samples]
        results[problem] = ProblemResult.from_grades(one.id, grades, truncated, lengths, problem_digest(one.problem))
    return results


def problem_digest(problem: Problem) -> str:
    """Return a digest of a problem's text, whatever its spaces; of all its fields but the gold if it has no text."""
    rest = {key: value for key, value in problem.items() if key not in ("answer", "id")}
    text = problem.get("problem") or json.dumps(rest, sort_keys=True, default=str)
    return hashlib.sha256(" ".join(str(text).split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def grade_responses(grader: Grader, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
    """Grade (problem, response text) pairs in order; mathematics in parallel. An exception becomes an error grade."""
    if isinstance(grader, MathGrader):
        return grader.grade_many(items)
    return [_grade_safely(grader, problem, text) for problem, text in items]


def _grade_safely(grader: Grader, problem: Problem, text: str) -> Grade:
    try:
        return grader(problem, text)
    except Exception:
        return Grade(False, None, error=True)


def grade_countdown(problem: Problem, text: str) -> Grade:
    """Grade a Countdown response. The key of a right one is its normalised solution, of a wrong one its text."""
    from eaopd_megatron.data.countdown import check_answer

    try:
        correct, key = check_answer(problem, text)
    except Exception:
        return Grade(False, None, error=True)
    return Grade(correct, key if correct else " ".join(text.split())[:_MAX_KEY_LENGTH] or None)


class MathGrader:
    r"""Compares a response's last complete \boxed{} with problem["answer"] in `workers` child processes.

    `Grade.correct` is math-verify's strict verdict, corrected where `math_worker` says; `Grade.lenient` adds answers in
    other notations (`answers.leniently_equal`). seconds: CPU time of one comparison; past it the kernel ends the
    process, the response is an error and wrong, and the next comparison gets a new process. Any thread may call it. The
    processes start when first needed and end with this object or with this process, however that dies.

    All right answers have the gold as their key, as they are one answer in different notations.
    """

    def __init__(self, *, workers: int = 2, seconds: float = 2.0) -> None:
        self._workers = workers
        self._idle: queue.SimpleQueue[MathWorker] = queue.SimpleQueue()
        children = contextlib.ExitStack()
        for _ in range(workers):
            worker = MathWorker(seconds)
            children.callback(worker.close)
            self._idle.put(worker)
        self._finalizer = weakref.finalize(self, children.close)

    def __call__(self, problem: Problem, text: str) -> Grade:
        return self.grade_many([(problem, text)])[0]

    def grade_many(self, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """Grade pairs in order; an answer that several responses give to one problem is compared once."""
        questions = [_question(problem, text) for problem, text in items]
        distinct = list(dict.fromkeys(question for question in questions if question is not None))
        with ThreadPoolExecutor(self._workers) as threads:
            grades = dict(zip(distinct, threads.map(self._grade, distinct), strict=True))
        missing_gold = [problem.get("answer") is None for problem, _ in items]
        return [
            Grade(False, None, error=no_gold) if question is None else grades[question]
            for question, no_gold in zip(questions, missing_gold, strict=True)
        ]

    def gold_kinds(self, golds: Sequence[str]) -> list[str]:
        """Return how math-verify parses each gold: "mathematics", "text" (equal to the same text only) or "nothing"."""
        with ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(self._gold_kind, golds))

    def verify(self, **request: Any) -> bool | None:
        """Return an idle child's verdict on a request of `math_worker`; None if it raised or ran out of time."""
        worker = self._idle.get()
        try:
            return worker.verify(**request)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the child processes; the next comparison starts them again."""
        self._finalizer()

    def _grade(self, question: _Question) -> Grade:
        gold, answer, boxes = question
        key = answers.normalise(answer)[:_MAX_KEY_LENGTH]
        if not answer or not gold:
            return Grade(False, key or None, error=not gold)
        if len(answer) > MAX_ANSWER_LENGTH:
            return Grade(False, key)
        strict = _quick_verdict(gold, answer)
        if strict is None:
            strict = False if answers.reads_e_as_euler(gold) else self.verify(gold=gold, answer=answer)
            if strict is None:
                return Grade(False, key, error=True)
        if strict:
            return Grade(True, answers.normalise(gold)[:_MAX_KEY_LENGTH])
        verify = functools.partial(self.verify, relations=True)
        lenient = answers.leniently_equal(gold, boxes, lambda one, other: verify(gold=one, answer=other))
        return Grade(False, key, error=lenient is None, lenient=bool(lenient))

    def _gold_kind(self, gold: str) -> str:
        gold = answers.strip_font(gold)
        if answers.exact_number(gold) is not None:
            return "mathematics"
        return {True: "mathematics", False: "text", None: "nothing"}[self.verify(gold=gold)]


@functools.cache
def shared_math_grader() -> MathGrader:
    """Return this process's grader. Raise UserError if math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("grading mathematics needs the package math-verify: pip install math-verify==0.9.0")
    return MathGrader()


def _question(problem: Problem, text: str) -> _Question | None:
    contents, gold = answers.boxed_contents(text), problem.get("answer")
    if not contents or gold is None:
        return None
    gold, answer = answers.strip_font(str(gold).strip()), contents[-1]
    if len(answer) <= MAX_ANSWER_LENGTH:
        answer = answers.strip_font(answer)
    expected = len(answers.split_answers(gold))
    if len(answer) > MAX_ANSWER_LENGTH or not 1 < expected <= len(contents) or len(answers.split_answers(answer)) != 1:
        return gold, answer, answer
    boxes = ", ".join(contents[-expected:])
    return gold, answer, boxes if len(boxes) <= MAX_ANSWER_LENGTH else answer


def _quick_verdict(gold: str, answer: str) -> bool | None:
    """Return the verdict where no algebra is needed; None: ask math-verify.

    The same text is right, another number is wrong, and so is a number too large to expand if the gold has none.
    """
    if answers.normalise(gold) == answers.normalise(answer):
        return True
    if answers.has_huge_power(answer) and not answers.has_huge_power(gold):
        return False
    numbers = answers.exact_number(gold), answers.exact_number(answer)
    if numbers[0] is None or numbers[1] is None or answers.reads_e_as_euler(gold) or answers.reads_e_as_euler(answer):
        return None
    if numbers[0] == numbers[1]:
        return True
    return None if abs(numbers[0] - numbers[1]) < Fraction(1, 10**5) * abs(numbers[0]) else False


class MathWorker:
    """A child process running math_worker.py, started on demand and after it died. One thread uses it at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.process: subprocess.Popen[str] | None = None

    def verify(self, **request: Any) -> bool | None:
        """Return its verdict on a request of `math_worker`; None if it raised, or if it was ended at its limits."""
        try:
            process = self.process if self.process and self.process.poll() is None else self._start()
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            reply = self._read(process)
        except (OSError, ValueError):  # the process is gone, or its line is incomplete
            self.close()
            return None
        verdict = reply.get("equal")
        return verdict if isinstance(verdict, bool) else None

    def _start(self) -> subprocess.Popen[str]:
        self.close()
        script = str(Path(__file__).with_name("math_worker.py"))
        self.process = subprocess.Popen(  # -P: this folder's names must not hide packages
            [sys.executable, "-P", script, str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # `close` ends it together with its forks
            env={**os.environ, "PYTHONHASHSEED": "0"},  # fixes sympy's order, hence its verdicts and times
        )
        self._read(self.process)
        return self.process

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.endswith("\n"):
            raise ValueError("the process ended")
        return dict(json.loads(line))

    def close(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # unread input cannot be flushed to a dead process
                    pipe.close()
