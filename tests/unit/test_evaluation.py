"""Right answers are counted right, the estimators are unbiased, and no grader can stop a run."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation import estimators, grading, results
from eaopd_megatron.evaluation.estimators import avg_at_k, bootstrap_interval, pass_at_k, pass_ks
from eaopd_megatron.evaluation.grading import Grade, MathGrader, benchmark_name, grade_all, grader_for, last_boxed
from eaopd_megatron.evaluation.results import EvaluationResult, ProblemResult, read_evaluations, summarise

SHARED = Path(__file__).resolve().parents[3] / "shared"
HANGS = r"10^{10^{10}}"  # one multiplication inside C, which no Python signal handler can interrupt


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    grader = MathGrader(workers=2, seconds=20.0)
    yield grader
    grader.close()


# Estimators


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_k_subsets_that_hold_a_right_sample(n: int) -> None:
    for k in range(1, n + 1):
        expected = [
            np.mean([any(i < c for i in chosen) for chosen in itertools.combinations(range(n), k)])
            for c in range(n + 1)
        ]
        np.testing.assert_allclose(pass_at_k(n, np.arange(n + 1), k), expected, rtol=1e-15, atol=0)


def test_pass_at_k_stays_exact_where_factorials_overflow_and_differences_cancel() -> None:
    assert pass_at_k(100_000, np.array([1]), 3)[0] == float(Fraction(3, 100_000))
    assert pass_at_k(5000, np.array([0, 4999]), 2500).tolist() == [0.0, 1.0]


def test_pass_at_k_is_unbiased_where_the_plug_in_estimate_is_not() -> None:
    rate, n, k = 0.2, 6, 3
    chances = [
        float(len(list(itertools.combinations(range(n), c)))) * rate**c * (1 - rate) ** (n - c) for c in range(n + 1)
    ]
    assert np.dot(chances, pass_at_k(n, np.arange(n + 1), k)) == pytest.approx(1 - (1 - rate) ** k, abs=1e-12)


def test_estimators_keep_the_shape_and_refuse_impossible_counts() -> None:
    assert pass_at_k(4, np.array([[0, 1], [2, 4]]), 2).shape == (2, 2)
    assert avg_at_k([0, 2, 8], 8).tolist() == [0.0, 0.25, 1.0]
    for counts, n, k in (([9], 8, 1), ([-1], 8, 1), ([1], 8, 9), ([1], 8, 0), ([0.5], 8, 1)):
        with pytest.raises(ValueError):
            pass_at_k(n, counts, k)
    assert [pass_ks(n) for n in (1, 6, 8)] == [[1], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_bootstrap_intervals_repeat_and_shrink_with_the_number_of_problems() -> None:
    values = np.random.default_rng(3).random(400)
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert low < values.mean() < high
    wide = bootstrap_interval(values[:25])
    assert wide[1] - wide[0] > 2 * (high - low)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_bootstrap_of_a_difference_is_paired_so_that_equal_results_have_no_spread() -> None:
    values = np.random.default_rng(4).random(50)
    assert bootstrap_interval((values + 0.25) - values) == pytest.approx((0.25, 0.25))
    estimators._resampling_weights.cache_clear()
    assert bootstrap_interval(values + 0.25)[0] - bootstrap_interval(values)[0] == pytest.approx(0.25)


# Mathematical answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{1}, or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{3} and then cut off \boxed{\frac{1}{", "3"),
        (r"a stray } and { before \boxed {x}", "x"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, expected: str | None) -> None:
    assert last_boxed(text) == expected


def test_a_response_that_repeats_open_boxes_costs_linear_time() -> None:
    assert last_boxed(r"\boxed{" * 200_000) is None


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac12", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\tfrac{\pi}{2})", True),
        ("70", r"70 \text{ cm}", True),
        ("5", "x = 5", True),
        ("204", "0204", True),
        ("204", "205", False),
        (r"\frac{1}{2}", r"\frac{1}{3}", False),
        ("5", "", False),
        ("5", r"\}^^\frac{", False),
    ],
)
def test_equal_answers_in_other_notation_are_right(grader: MathGrader, gold: str, answer: str, right: bool) -> None:
    grade = grader({"answer": gold}, f"Hence \\boxed{{{answer}}}.")
    assert (grade.correct, grade.error) == (right, False)


def test_right_answers_in_different_notation_count_as_one_distinct_answer(grader: MathGrader) -> None:
    problem = {"answer": r"\frac{1}{2}"}
    grades = grade_all(
        grader, [(problem, rf"\boxed{{{text}}}") for text in ("0.5", r"\frac12", r"\frac{2}{4}", "3", "4")]
    )
    assert ProblemResult.from_grades("p", grades, [False] * 5).distinct_correct == 1
    assert [grade.key for grade in grades[3:]] == ["3", "4"]


def test_grades_come_back_in_the_order_of_the_responses(grader: MathGrader) -> None:
    items = [({"answer": str(i % 7)}, rf"\boxed{{x = {i % 5}}}") for i in range(70)]
    assert [grade.correct for grade in grade_all(grader, items)] == [i % 7 == i % 5 for i in range(70)]


def test_a_hanging_comparison_is_ended_counted_and_leaves_the_next_ones_alone() -> None:
    grader = MathGrader(workers=1, seconds=0.5)
    try:
        grades: list[Grade] = []
        items = [({"answer": "5"}, rf"\boxed{{{text}}}") for text in (HANGS, "x = 5", HANGS, "x = 6")]
        thread = threading.Thread(target=lambda: grades.extend(grade_all(grader, items)))  # no signals in threads
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


def test_a_hanging_worker_ends_without_its_parent() -> None:
    script = Path(grading.__file__).with_name("math_worker.py")
    with subprocess.Popen(
        [sys.executable, "-P", str(script), "0.3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        assert json.loads(worker.stdout.readline()) == {"ready": True}
        worker.stdin.write(json.dumps({"gold": "5", "answer": HANGS}) + "\n")
        worker.stdin.flush()
        assert worker.wait() == -signal.SIGPROF


def test_a_worker_that_was_killed_is_replaced() -> None:
    grader = MathGrader(workers=1)
    try:
        assert grader({"answer": "5"}, r"\boxed{x = 5}").correct
        worker = grader._idle.get()
        assert worker._process is not None
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
        grader._idle.put(worker)
        assert grader({"answer": "6"}, r"\boxed{x = 6}").correct
    finally:
        grader.close()


def test_a_problem_without_a_reference_answer_is_a_counted_error(grader: MathGrader) -> None:
    assert grader({"problem": "?"}, r"\boxed{5}") == Grade(False, None, error=True)


def test_a_grader_that_throws_scores_0_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: dict[str, Any], text: str) -> Grade:
        if text == "bad":
            raise RuntimeError("broken")
        return Grade(True, text)

    grades = grade_all(broken, [({}, "good"), ({}, "bad")])
    assert grades == [Grade(True, "good"), Grade(False, None, error=True)]
    assert ProblemResult.from_grades("p", grades, [False, False]).errors == 1


def test_countdown_is_graded_by_its_own_checker_and_survives_broken_problems() -> None:
    countdown = grader_for("countdown")
    problem = {"numbers": [2, 3, 4], "target": 10}
    assert countdown(problem, "2 * 3 = 6 ; 6 + 4 = 10 ;").correct
    assert countdown(problem, "3 * 2 = 6 ; 4 + 6 = 10 ;").key == countdown(problem, "2 * 3 = 6 ; 6 + 4 = 10 ;").key
    assert not countdown(problem, "2 + 3 = 5 ; 5 + 4 = 9 ;").correct
    assert countdown({}, "2 * 3 = 6 ; 6 + 4 = 10 ;") == Grade(False, None, error=True)


def test_a_missing_math_verify_is_named_before_the_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install math-verify"):
        grader_for("math500")


def test_benchmarks_are_reported_under_a_short_name() -> None:
    names = ["countdown", "sets/amc23.jsonl", "hub:math-ai/aime24", "/data/own.v2.jsonl"]
    assert [benchmark_name(name) for name in names] == ["countdown", "amc23", "aime24", "own.v2"]


@pytest.mark.shared_data
def test_every_reference_answer_of_the_benchmarks_equals_itself() -> None:
    files = sorted((SHARED / "data" / "benchmarks").glob("*.jsonl"))
    assert len(files) == 6, f"the benchmarks are expected in {SHARED / 'data' / 'benchmarks'}"
    worker = grading._Worker(seconds=20.0)
    try:
        for file in files:
            problems = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            grades = grade_all(grader_for(str(file)), [(p, rf"So \boxed{{{p['answer']}}}.") for p in problems])
            assert [p["id"] for p, grade in zip(problems, grades, strict=True) if not grade.correct] == [], file.name
            # the same without the short cut for equal texts
            assert [p["id"] for p in problems if not worker.equal(p["answer"], p["answer"])] == [], file.name
    finally:
        worker.close()


# Results


def example(iteration: int = 50) -> EvaluationResult:
    rows = [
        ProblemResult("a", (True, True, False, True), ("x", "y", "z", "x"), (False, False, True, False)),
        ProblemResult(
            "b", (False, False, False, False), (None, None, "q", None), (False, False, False, True), errors=2
        ),
    ]
    return EvaluationResult(iteration, {"countdown": summarise("countdown", 4, rows)})


def test_figures_of_a_benchmark_have_their_names_and_values() -> None:
    assert example().to_metrics() == {
        "evaluation/countdown/avg@4": 0.375,
        "evaluation/countdown/pass@1": 0.375,
        "evaluation/countdown/pass@2": 0.5,
        "evaluation/countdown/pass@4": 0.5,
        "evaluation/countdown/distinct_correct": 1.0,
        "evaluation/countdown/truncated": 0.25,
        "evaluation/countdown/grader_errors": 2.0,
    }


def test_an_evaluation_survives_its_file(tmp_path: Path) -> None:
    assert example(50).write(tmp_path).name == "000050.json"
    example(0).write(tmp_path)
    assert read_evaluations(tmp_path) == [example(0), example(50)]
    content = json.loads((tmp_path / "000050.json").read_text())["benchmarks"]["countdown"]
    assert (content["samples"], content["problems"], content["pass@1"]) == (4, 2, 0.375)
    assert content["results"][0]["correct"] == [True, True, False, True]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = example().write(tmp_path)
    before = path.read_text()

    def fail(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(f"eaopd_megatron.evaluation.results.os.{step}", fail)
    with pytest.raises(OSError):
        results.write_atomically(path, "half")
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"iteration": 1, "benchmarks": {"x": {"samples": 2}}}'])
def test_a_damaged_evaluation_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "000001.json").write_text(content)
    with pytest.raises(UserError, match=r"000001\.json"):
        read_evaluations(tmp_path)


def test_an_empty_benchmark_and_a_lost_sample_are_refused() -> None:
    with pytest.raises(UserError, match="no problems"):
        summarise("empty", 8, [])
    with pytest.raises(ValueError, match="problem a"):
        summarise("short", 8, [ProblemResult("a", (True,), ("x",), (False,))])
