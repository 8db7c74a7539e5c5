r"""Graders: the exact checker for Countdown, mathematical equality for everything else. No grader can stop a run.

**strict** (`Grade.correct`): answer and gold are the same number, expression, set, tuple, relation or words in any
notation of mathematics: LaTeX, plain text or Unicode. Nothing that has a meaning is dropped or added: case, sign, base,
order of a tuple, brackets of a set, digits, a factor such as "million". One of the two alone may have a unit in
\text{}, a name before `=`, or a percent sign.

**lenient** (`Grade.lenient`): also answers that need a reader who knows what was asked: `4.5e33` for 4.5 · 10³³ (a
program's notation), units without \text{} or in another size, a base or percent sign left out, `x > 2` for (2, ∞),
radians for degrees, a tuple for a column, a list in several boxes. Never an answer with another value.

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
from eaopd_megatron.evaluation.notation import FAMILY, name_family, rewrite
from eaopd_megatron.evaluation.results import Grade, Grader, ProblemResult

if TYPE_CHECKING:
    from eaopd_megatron.data.types import Prompt

MAX_ANSWER_LENGTH = 1000
"""Characters; longer answers are wrong without a comparison. The longest gold of the six benchmarks has 210."""
_MAX_KEY_LENGTH = 200  # characters; a run-on answer must not swell the results file
_MAX_KEYS = 10_000  # remembered
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

    What strict and lenient verdicts mean is said above. seconds: CPU time of one comparison; past it the kernel ends
    the process, the response is an error and wrong, and the next comparison gets a new process. Any thread may call it.
    The processes start when first needed and end with this object or with this process, however that dies.

    Equal answers have one key, whatever their notation, right or wrong; a right one has its gold's.
    """

    def __init__(self, *, workers: int = 2, seconds: float = 2.0) -> None:
        self._workers = workers
        self._keys: dict[str, str] = {}
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
        verdict = self._ask(**request).get("equal")
        return verdict if isinstance(verdict, bool) else None

    def _ask(self, **request: Any) -> dict[str, Any]:
        worker = self._idle.get()
        try:
            return worker.ask(**request)
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
        strict, lenient = self._verdicts(gold, answer, boxes)
        if strict or lenient:
            return Grade(bool(strict), self._key(gold), lenient=True)
        error = strict is None or lenient is None
        return Grade(False, key if error else self._key(answer), error=error)

    def _verdicts(self, gold: str, answer: str, boxes: str) -> tuple[bool | None, bool | None]:
        """Return the strict and the lenient verdict; None for one that failed."""
        strict = _quick_verdict(gold, answer)
        units = None if strict else answers.compare_units(gold, answer)
        if strict or units is False:
            return bool(strict), bool(strict)
        if strict is None:
            strict = False if answers.reads_e_as_euler(gold) else self.verify(gold=gold, answer=answer)
        if strict is not False:
            return strict, strict
        verify = functools.partial(self.verify, relations=True)
        return False, units or answers.leniently_equal(gold, boxes, lambda one, other: verify(gold=one, answer=other))

    def _key(self, answer: str) -> str:
        """Return a text that equal answers share in any notation."""
        number = answers.exact_number(answer)
        if number is not None:
            return str(number)[:_MAX_KEY_LENGTH]
        if (key := self._keys.get(answer)) is None:
            found = None if answers.has_huge_power(answer) else self._ask(key=answer).get("key")
            key = (found if isinstance(found, str) else answers.normalise(answer))[:_MAX_KEY_LENGTH]
            if len(self._keys) < _MAX_KEYS:
                self._keys[answer] = key
        return key

    def _gold_kind(self, gold: str) -> str:
        gold = _readable(gold)
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
    same = answers.normalise(str(gold)) == answers.normalise(contents[-1])
    gold, answer = _readable(str(gold)), contents[-1]
    if len(answer) <= MAX_ANSWER_LENGTH:
        answer = gold if same else _readable(answer)  # 100,200 is 100, 200 only if the gold is written so, too
    if len(answer) > MAX_ANSWER_LENGTH:
        return gold, answer, answer
    if (FAMILY in gold) != (FAMILY in answer):
        gold, answer = name_family(gold), name_family(answer)
    expected = len(answers.split_answers(gold))
    if not 1 < expected <= len(contents) or len(answers.split_answers(answer)) != 1:
        return gold, answer, answer
    boxes = ", ".join(contents[-expected:])
    return gold, answer, _readable(boxes) if len(boxes) <= MAX_ANSWER_LENGTH else answer


@functools.lru_cache(maxsize=4096)
def _readable(text: str) -> str:
    return answers.strip_font(rewrite(answers.strip_font(text.strip())))


def _quick_verdict(gold: str, answer: str) -> bool | None:
    """Return the verdict where no algebra is needed; None: ask math-verify.

    The same text is right, another number is wrong, and so is a number too large to expand if the gold has none.
    """
    if answers.normalise(gold) == answers.normalise(answer) or answers.same_words(gold, answer):
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

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return its reply to a request of `math_worker`; an empty one if its process ended."""
        try:
            process = self.process if self.process and self.process.poll() is None else self._start()
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            reply = self._read(process)
        except (OSError, ValueError):  # the process is gone, or its line is incomplete
            self.close()
            return {}
        return reply

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
