"""Right answers are right in any notation, near misses are wrong, and no grader can stop a run."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation import grading
from eaopd_megatron.evaluation.answers import (
    exact_number,
    has_huge_power,
    last_boxed,
    leniently_equal,
    normalise,
    split_answers,
)
from eaopd_megatron.evaluation.benchmarks import benchmark_name, grader_for
from eaopd_megatron.evaluation.estimators import majority
from eaopd_megatron.evaluation.grading import MAX_ANSWER_LENGTH, MathGrader, grade_responses, shared_math_grader
from eaopd_megatron.evaluation.results import Grade, ProblemResult
from tests.unit import answer_kinds, answer_relatives
from tests.unit.answer_pairs import NOTATION, RIGHT, WRONG

SHARED = Path(__file__).resolve().parents[3] / "shared"
HANGS = r"10^{10^{10}}"
STUCK = r"10^{(10^{10})}"  # one multiplication inside C, which no Python signal handler can interrupt


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    grader = MathGrader(workers=2, seconds=20.0)
    yield grader
    grader.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{1}, or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{3} and then cut off \boxed{\frac{1}{", "3"),
        (r"a stray } and { before \boxed {x}", "x"),
        (r"\boxed{}", ""),
        (r"\boxed 5", "5"),
        (r"is $\boxed 42$.", "42"),
        (r"so \boxed \frac{1}{2}.", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{1} and \fbox{\boxed{2}}", "2"),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


def test_a_response_that_repeats_open_boxes_costs_linear_time() -> None:
    assert last_boxed(r"\boxed{" * 200_000) is None


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("1, 3", ["1", "3"]),
        (r"x=1 \text{ or } x=3", ["x=1", "x=3"]),
        (r"\left\{1,3\right\}", ["1", "3"]),
        ("$69$,$84$", ["69", "84"]),
        ("(1,3)", ["(1,3)"]),
        ("(1,3), (2,5)", ["(1,3)", "(2,5)"]),
        (r"11,\! 111,\! 100", ["11, 111, 100"]),
        (r"\text{land}", [r"\text{land}"]),
        ("", []),
    ],
)
def test_a_list_is_split_only_between_answers(text: str, answers: list[str]) -> None:
    assert [normalise(answer) for answer in split_answers(text)] == [normalise(answer) for answer in answers]


@pytest.mark.parametrize("text", ["x", "1/0", "10^{10^{10}}", "1e9999", "2^{3}", "1.2.3", "9" * 5000, "", "-"])
def test_only_plain_numbers_are_parsed_as_numbers(text: str) -> None:
    assert exact_number(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[(text, True) for text in (HANGS, "9^{9^{9^9}}", "(1+x)^{1000000}", "10000000!", "2^" + "9" * 400)],
        *[
            (text, False)
            for text in ("2^{2^{10}}", "2^{1009}", "10^{100}", "x^{y^{z}}", "100!", "10^{-9}", "123456789")
        ],
    ],
)
def test_numbers_too_large_to_expand_are_recognised(text: str, expected: bool) -> None:
    assert has_huge_power(text) == expected


def test_answers_are_graded_as_a_mathematician_would(grader: MathGrader) -> None:
    """Neither comparison gives a false verdict in either direction."""
    expected = {
        **dict.fromkeys(RIGHT, (True, True)),
        **dict.fromkeys(NOTATION, (False, True)),
        **dict.fromkeys(WRONG, (False, False)),
    }
    assert len(expected) == len(RIGHT) + len(NOTATION) + len(WRONG) >= 60
    grades = grade_responses(grader, [({"answer": gold}, rf"Hence \boxed{{{answer}}}.") for gold, answer in expected])
    assert not any(grade.error for grade in grades)
    found = {pair: (grade.correct, grade.lenient) for pair, grade in zip(expected, grades, strict=True)}
    assert {pair: found[pair] for pair in found if found[pair] != expected[pair]} == {}


@pytest.mark.parametrize("kind", ["spaces", "checks", "meaning", "notation", "relatives"])
def test_pairs_of_a_kind_of_fault_get_a_mathematicians_verdicts(grader: MathGrader, kind: str) -> None:
    """Strictly right ones are leniently right, wrong ones neither; no check throws."""
    strict = {**answer_kinds.STRICT, "relatives": answer_relatives.STRICT}[kind]
    lenient = {**answer_kinds.LENIENT, "relatives": answer_relatives.LENIENT}.get(kind, [])
    wrong = {**answer_kinds.WRONG, "relatives": answer_relatives.WRONG}[kind]
    assert len(strict) > 30 < len(wrong)
    expected = {
        **dict.fromkeys(strict, (True, True)),
        **dict.fromkeys(lenient, (False, True)),
        **dict.fromkeys(wrong, (False, False)),
    }
    grades = grade_responses(grader, [({"answer": gold}, rf"Hence \boxed{{{answer}}}.") for gold, answer in expected])
    assert [pair for pair, grade in zip(expected, grades, strict=True) if grade.error] == []
    found = {pair: (grade.correct, grade.lenient) for pair, grade in zip(expected, grades, strict=True)}
    assert {pair: found[pair] for pair in found if found[pair] != expected[pair]} == {}


def test_equal_answers_have_one_key_whether_right_or_wrong(grader: MathGrader) -> None:
    """Else a vote would join right answers across notations, and divide wrong ones."""
    same = [
        ("0.5", r"\frac12", "1/2", r"\frac{2}{4}", "x = 0.5", r"\sin 30^\circ"),
        (r"\sqrt{8}", r"2\sqrt2", "2√2", r"2\cdot 2^{1/2}"),
        ("x^2-1", "(x-1)(x+1)", "(x+1)(x-1)"),
        ("1, 3", r"\{3,1\}", "3 and 1"),
        ("(1,3)", r"(1, \frac{6}{2})"),
        ("(3,1)", "(3, 1)"),
        ("1000000", r"1\text{ million}", "10^6", "1 000 000"),
        ("-x^2", "-(x^2)"),
        ("x_1", "x_{1}"),
        ("7", "7.0", r"\boxed{7}"),
    ]
    for gold in ("17", "(2, 3)", "y^2+1", r"\text{no}"):
        groups = [graded(grader, gold, *group) for group in same]
        keys = [{grade.key for grade in group} for group in groups]
        assert [group for group, found in zip(same, keys, strict=True) if len(found) > 1] == []
        assert len(set().union(*keys)) == len(same)
        assert not any(grade.correct or grade.error for group in groups for grade in group)
    grades = graded(grader, "0.5", "1/3", r"\frac13", *same[0])
    assert ProblemResult.from_grades("p", grades, [False] * 8, [1] * 8).distinct_correct == 1
    assert majority([grade.key for grade in grades], [grade.correct for grade in grades]) == 1.0


def graded(grader: MathGrader, gold: str, *answers: str) -> list[Grade]:
    return grade_responses(grader, [({"answer": gold}, rf"\boxed{{{answer}}}") for answer in answers])


def test_several_answers_may_have_a_box_each(grader: MathGrader) -> None:
    texts = [r"\boxed{3} and \boxed{1}", r"\boxed{3} and \boxed{2}", r"\boxed{2}, no: \boxed{1,3}", r"\boxed{3}"]
    grades = grade_responses(grader, [({"answer": "1,3"}, text) for text in texts])
    assert [(grade.correct, grade.lenient) for grade in grades] == [
        (False, True),
        (False, False),
        (True, True),
        (False, False),
    ]


def test_right_answers_in_different_notation_count_as_one_distinct_answer(grader: MathGrader) -> None:
    problem = {"answer": r"\frac{1}{2}"}
    grades = grade_responses(
        grader, [(problem, rf"\boxed{{{text}}}") for text in ("0.5", r"\frac12", r"\frac{2}{4}", "3", "4")]
    )
    assert ProblemResult.from_grades("p", grades, [False] * 5, [1] * 5).distinct_correct == 1
    assert [grade.key for grade in grades[3:]] == ["3", "4"]


def test_grades_come_back_in_the_order_of_the_responses(grader: MathGrader) -> None:
    items = [({"answer": str(i % 7)}, rf"\boxed{{x = {i % 5}}}") for i in range(70)]
    assert [grade.correct for grade in grade_responses(grader, items)] == [i % 7 == i % 5 for i in range(70)]


def test_a_hanging_comparison_is_killed_and_counted_and_later_ones_succeed() -> None:
    grader = MathGrader(workers=1, seconds=0.5)
    try:
        grades: list[Grade] = []
        items = [({"answer": "5"}, rf"\boxed{{{text}}}") for text in (STUCK, "x = 5", STUCK, "x = 6")]
        thread = threading.Thread(target=lambda: grades.extend(grade_responses(grader, items)))  # no signals in threads
        thread.start()
        thread.join()
        assert [(grade.correct, grade.error) for grade in grades] == [
            (False, True),
            (True, False),
            (False, True),
            (False, False),
        ]
    finally:
        grader.close()


def test_a_hanging_comparison_spares_its_worker_and_does_not_outlive_its_caller() -> None:
    script = Path(grading.__file__).with_name("math_worker.py")
    with subprocess.Popen(
        [sys.executable, "-P", str(script), "0.3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        assert json.loads(worker.stdout.readline()) == {"ready": True}
        worker.stdin.write(json.dumps({"gold": "5", "answer": STUCK}) + "\n")
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline()) == {"error": f"ended with {-signal.SIGPROF}"}
        worker.stdin.write(json.dumps({"gold": "5", "answer": "x=5"}) + "\n")
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline()) == {"equal": True}
        worker.stdin.write(json.dumps({"gold": "5", "answer": STUCK}) + "\n")
        worker.stdin.close()
        assert worker.wait() == 0


def test_a_worker_that_was_killed_is_replaced() -> None:
    grader = MathGrader(workers=1)
    try:
        assert grader({"answer": "5"}, r"\boxed{x = 5}").correct
        worker = grader._idle.get()
        assert worker.process is not None
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        grader._idle.put(worker)
        assert grader({"answer": "6"}, r"\boxed{x = 6}").correct
    finally:
        grader.close()


def test_an_answer_longer_than_any_gold_is_wrong_and_costs_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    grader = MathGrader(seconds=0.0)
    monkeypatch.setattr(grading.MathWorker, "ask", lambda self, **request: pytest.fail("it was compared"))
    answers = ["{}" * 50_000, "1+" * MAX_ANSWER_LENGTH + "1", r"\frac" * 20_000]
    for grade in grade_responses(grader, [({"answer": "1,3"}, rf"\boxed{{{answer}}}") for answer in answers]):
        assert (grade.correct, grade.error) == (False, False)
        assert grade.key is None or len(grade.key) <= 200


@pytest.mark.timeout(20, method="signal")  # the search holds the lock that a thread would need to end it
@pytest.mark.parametrize(
    "text",
    [
        "10 " + "hours " * 60 + "!",
        "10 " + "m" * 60 + "!",
        "10 " + "m s" * 60 + "!",
        "10" + r"\,\text{m}" * 90 + "!",
        " ~" * 200 + "^" + " " * 500 + "!",
        "9" * 900 + "!!e",
        r"\text{" * 150,
    ],
)
def test_an_answer_with_many_units_is_compared_in_linear_time(text: str) -> None:
    assert not leniently_equal("10", text, lambda one, other: False)


@pytest.mark.timeout(20, method="signal")
def test_long_boxes_before_the_last_one_are_not_compared(grader: MathGrader) -> None:
    assert not grader({"answer": "1,3"}, rf"\boxed{{{'9' * 200_000}}} and \boxed{{3}}").lenient


def test_gold_kinds_are_what_math_verify_parses(grader: MathGrader) -> None:
    golds = ["4.5e33", r"\frac{1}{2}", "E_{1},E_{2}", r"a \mid b", "1 2", ""]
    assert grader.gold_kinds(golds) == [
        *["mathematics"] * 3,
        "text",
        "text",
        "nothing",
    ]


def test_a_problem_without_a_reference_answer_is_a_counted_error(grader: MathGrader) -> None:
    assert grader({"problem": "?"}, r"\boxed{5}") == Grade(False, None, error=True)


def test_a_grader_that_raises_scores_0_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: dict[str, Any], text: str) -> Grade:
        if text == "bad":
            raise RuntimeError("broken")
        return Grade(True, text)

    grades = grade_responses(broken, [({}, "good"), ({}, "bad")])
    assert grades == [Grade(True, "good"), Grade(False, None, error=True)]
    assert ProblemResult.from_grades("p", grades, [False, False], [1, 1]).errors == 1


def test_countdown_is_graded_by_its_own_checker_and_survives_broken_problems() -> None:
    problem = {"numbers": [2, 3, 4], "target": 10}
    countdown = grader_for("countdown", [problem])
    assert countdown(problem, "2 * 3 = 6 ; 6 + 4 = 10 ;").correct
    assert countdown(problem, "3 * 2 = 6 ; 4 + 6 = 10 ;").key == countdown(problem, "2 * 3 = 6 ; 6 + 4 = 10 ;").key
    assert not countdown(problem, "2 + 3 = 5 ; 5 + 4 = 9 ;").correct
    assert countdown({}, "2 * 3 = 6 ; 6 + 4 = 10 ;") == Grade(False, None, error=True)


def test_a_missing_math_verify_is_named_before_the_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    shared_math_grader.cache_clear()  # another test's
    with pytest.raises(UserError, match="pip install math-verify"):
        grader_for("math500", [{"answer": "1"}])


def test_benchmarks_are_reported_under_a_short_name() -> None:
    names = ["countdown", "sets/amc23.jsonl", "hub:math-ai/aime24", "/data/own.v2.jsonl"]
    assert [benchmark_name(name) for name in names] == ["countdown", "amc23", "aime24", "own.v2"]


def benchmarks() -> dict[str, list[dict[str, Any]]]:
    files = sorted((SHARED / "data" / "benchmarks").glob("*.jsonl"))
    assert len(files) == 6, f"the benchmarks are expected in {SHARED / 'data' / 'benchmarks'}"
    return {file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files}


@pytest.mark.shared_data
def test_every_gold_of_the_benchmarks_equals_itself(grader: MathGrader) -> None:
    for name, problems in benchmarks().items():
        grades = grade_responses(grader, [(p, rf"So \boxed{{{p['answer']}}}.") for p in problems])
        assert [p["id"] for p, grade in zip(problems, grades, strict=True) if not grade.correct] == [], name
        # without the shortcut for equal texts
        golds = [p["answer"] for p in problems if exact_number(p["answer"]) is None]
        assert [gold for gold in golds if not grader.verify(gold=gold, answer=gold)] == [], name


@pytest.mark.shared_data
def test_golds_of_other_problems_are_rejected(grader: MathGrader) -> None:
    """300 random pairs of golds per benchmark whose texts differ; none of them is mathematically equal."""
    for name, problems in benchmarks().items():
        generator = random.Random(0)
        pairs: list[tuple[dict[str, Any], str]] = []
        while len(pairs) < 300:
            one, other = generator.sample(problems, 2)
            if normalise(one["answer"]) != normalise(other["answer"]):
                pairs.append((one, other["answer"]))
        grades = grade_responses(grader, [(one, rf"So \boxed{{{answer}}}.") for one, answer in pairs])
        accepted = [
            (one["answer"], answer) for (one, answer), grade in zip(pairs, grades, strict=True) if grade.lenient
        ]
        assert accepted == [], name
