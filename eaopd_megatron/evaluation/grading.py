"""Right or wrong: one grader for each kind of benchmark, none of which can stop a run.

A grader that throws or runs out of time gives `Grade(False, ..., error=True)`; the errors are counted and reported.
"""

from collections.abc import Sequence
from pathlib import Path

from eaopd_megatron.data.sources import Problem
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.math_grader import MAX_KEY_LENGTH, MathGrader, shared_math_grader
from eaopd_megatron.evaluation.results import Grade, Grader


def benchmark_name(name_or_path: str) -> str:
    """The short name under which a benchmark is reported: the name itself, or a path's file name without its ending."""
    path = Path(name_or_path)
    return path.stem if path.suffix in (".jsonl", ".parquet") else name_or_path.strip("/").split("/")[-1]


def sources_by_name(sources: Sequence[str]) -> dict[str, str]:
    """The sources by their short names. UserError for two that would be reported under one."""
    found: dict[str, str] = {}
    for source in sources:
        other = found.setdefault(benchmark_name(source), source)
        if other != source:
            raise UserError(f"{other} and {source} are both reported as {benchmark_name(source)}: rename one")
    return found


def grader_for(name_or_path: str) -> Grader:
    """The grader of a benchmark: the exact checker for Countdown, mathematical equality of answers for any other.

    UserError if math-verify is needed and missing.
    """
    return grade_countdown if benchmark_name(name_or_path) == "countdown" else shared_math_grader()


def grade_responses(grader: Grader, items: Sequence[tuple[Problem, str]]) -> list[Grade]:
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
    """Grades a Countdown response; a right one's key is the normalised solution, so that different ones can be counted,
    a wrong one's its text."""
    from eaopd_megatron.data.countdown import check_answer

    try:
        correct, key = check_answer(problem, text)
    except Exception:
        return Grade(False, None, error=True)
    return Grade(correct, key if correct else " ".join(text.split())[:MAX_KEY_LENGTH] or None)
