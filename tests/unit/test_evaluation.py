"""Estimators are unbiased, and an evaluation's files and tables hold its figures."""

import itertools
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from eaopd_megatron.data.types import SamplingParams
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation import estimators, results
from eaopd_megatron.evaluation.comparison import compare_results
from eaopd_megatron.evaluation.estimators import (
    avg_at_k,
    estimate_mean,
    estimate_mean_of_groups,
    majority,
    pass_at_k,
    pass_ks,
)
from eaopd_megatron.evaluation.results import EvaluationResult, ProblemResult, summarise
from eaopd_megatron.plotting.curves import draw_pass_curves
from tools.lib.distributions import compare_logits, response_logits, token_means

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
    mean, low, high = estimate_mean(values)
    assert (mean, low, high) == estimate_mean(values)
    assert low < values.mean() < high
    wide = estimate_mean(values[:25])
    assert wide.high - wide.low > 2 * (high - low)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_bootstrap_of_a_difference_is_paired_so_that_equal_results_have_no_spread() -> None:
    values = np.random.default_rng(4).random(50)
    assert estimate_mean((values + 0.25) - values) == pytest.approx((0.25, 0.25, 0.25))
    estimators._resampling_weights.cache_clear()
    assert estimate_mean(values + 0.25).low - estimate_mean(values).low == pytest.approx(0.25)


def test_an_interval_covers_the_true_value_in_95_percent_of_evaluations() -> None:
    """300 evaluations of 60 problems, 4 samples each. Success rates are Beta(1, 2): pass@2 = 1 - E[(1-x)^2] = 1/2."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        ease = generator.beta(1.0, 2.0, 60)
        counts = generator.binomial(4, ease)
        found = estimate_mean(pass_at_k(4, counts, 2))
        covered += found.low <= 0.5 <= found.high
    assert 0.91 <= covered / 300 <= 0.98


def test_every_benchmark_has_the_same_weight_in_the_mean() -> None:
    one, other = np.full(500, 0.8), np.array([0.0, 0.4] * 15)
    found = estimate_mean_of_groups([one, other])
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.5 - 0.0358, 0.5 + 0.0358), abs=0.006)


@pytest.mark.parametrize(
    ("keys", "correct", "expected"),
    [
        (["a", "b", "b", None], [True, False, False, False], 0.0),
        (["a", "a", "b", None], [True, True, False, False], 1.0),
        (["a", "b", None, None], [True, False, False, False], 0.5),
        ([None, None], [False, False], 0.0),
    ],
)
def test_majority_grades_the_most_frequent_answer(keys: list[str | None], correct: list[bool], expected: float) -> None:
    assert majority(keys, correct) == expected


# Results


def example(iteration: int = 50) -> EvaluationResult:
    right = (True, True, False, True)
    cut = (False, False, True, False)
    none = (False, False, False, False)
    rows = [
        ProblemResult("a", right, right, ("x", "y", "z", "x"), cut, (5, 5, 9, 5)),
        ProblemResult("b", none, cut, (None, None, "q", None), cut, (1, 2, 3, 4), errors=2),
    ]
    return EvaluationResult(iteration, {"countdown": summarise("countdown", 4, rows)})


def test_figures_of_a_benchmark_have_their_names_and_values() -> None:
    assert example().to_metrics() == {
        "evaluation/countdown/avg@4": 0.375,
        "evaluation/countdown/pass@1": 0.375,
        "evaluation/countdown/pass@2": 0.5,
        "evaluation/countdown/pass@4": 0.5,
        "evaluation/countdown/lenient_avg@4": 0.5,
        "evaluation/countdown/majority@4": 0.5,
        "evaluation/countdown/distinct_correct": 1.0,
        "evaluation/countdown/truncated": 0.25,
        "evaluation/countdown/length": 4.25,
        "evaluation/countdown/grader_errors": 2.0,
    }


def test_an_evaluation_survives_its_file(tmp_path: Path) -> None:
    assert example(50).write(tmp_path).name == "000050.json"
    example(0).write(tmp_path)
    assert [EvaluationResult.read(path) for path in sorted(tmp_path.iterdir())] == [example(0), example(50)]
    content = json.loads((tmp_path / "000050.json").read_text())["benchmarks"]["countdown"]
    assert (content["samples"], content["problems"], content["pass@1"]) == (4, 2, 0.375)
    assert content["results"][0]["correct"] == [True, True, False, True]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = example().write(tmp_path)
    before = path.read_text()

    def fail(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(f"eaopd_megatron.utils.files.os.{step}", fail)
    with pytest.raises(OSError):
        results.atomic_write(path, "half")
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"iteration": 1, "benchmarks": {"x": {"samples": 2}}}'])
def test_a_damaged_evaluation_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "000001.json").write_text(content)
    with pytest.raises(UserError, match=r"000001\.json"):
        EvaluationResult.read(tmp_path / "000001.json")


def test_an_empty_benchmark_and_a_lost_sample_are_refused() -> None:
    with pytest.raises(UserError, match="no problems"):
        summarise("empty", 8, [])
    with pytest.raises(ValueError, match="problem a"):
        summarise("short", 8, [ProblemResult("a", (True,), (True,), ("x",), (False,), (3,))])


# Tables


def two_benchmarks(rate: float, problems: int = 40) -> EvaluationResult:
    """Two benchmarks of different difficulty, 4 samples per problem, the same random numbers for every rate."""
    found = {}
    for name, factor in (("easy", 1.0), ("hard", 0.5)):
        draws = np.random.default_rng(len(name)).random((problems, 4))
        rows = []
        for number, draw in enumerate(draws):
            right = tuple(bool(x) for x in draw < rate * factor)
            keys = tuple("right" if one else f"wrong{i}" for i, one in enumerate(right))
            rows.append(ProblemResult(f"{name}-{number}", right, right, keys, (False,) * 4, (10, 20, 30, 40)))
        found[name] = summarise(name, 4, rows)
    return EvaluationResult(0, found)


def test_the_table_shows_the_figures_of_the_results() -> None:
    result = two_benchmarks(0.6)
    found = results.figures_json(result)
    assert list(found) == ["easy", "hard", "mean"]
    assert found["easy"]["avg"]["value"] == result.benchmarks["easy"].figures["avg@4"]
    assert list(found["easy"]["pass_at_k"]) == [1, 2, 3, 4]
    assert found["easy"]["pass_at_k"][1] == found["easy"]["avg"]
    assert found["mean"]["avg"]["value"] == pytest.approx(
        (found["easy"]["avg"]["value"] + found["hard"]["avg"]["value"]) / 2
    )
    assert (found["mean"]["problems"], found["mean"]["stopped"]["value"], found["mean"]["length"]["value"]) == (
        80,
        1,
        25,
    )
    lines = results.results_markdown(result).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| easy", "| hard", "| mean"]
    assert f"{100 * found['hard']['avg']['value']:.1f} [" in lines[3]


def test_changes_are_paired_and_zero_for_equal_results() -> None:
    one, other = two_benchmarks(0.5), two_benchmarks(0.7)
    same = compare_results(one, one).changes
    assert {(change.value, change.low, change.high) for row in same.values() for change in row.values()} == {(0, 0, 0)}
    compared = compare_results(one, other)
    changes = compared.changes
    assert list(changes) == ["easy", "hard", "mean"] and changes["mean"]["avg"].excludes_zero
    unpaired = one.benchmarks["easy"].per_problem("avg@4").std() * 2 * 1.96 / np.sqrt(40)
    assert changes["easy"]["avg"].high - changes["easy"]["avg"].low < 1.5 * unpaired
    assert "**+" in compared.to_markdown()


def renamed(result: EvaluationResult, *, ids: bool = True, digests: bool = True) -> EvaluationResult:
    """The same results under other ids, or with other problems behind the ids."""
    found = {}
    for name, one in result.benchmarks.items():
        rows = [
            replace(row, id=str(i) if ids else row.id, digest=f"{'same' if digests else name}-{i}")
            for i, row in enumerate(one.results)
        ]
        found[name] = summarise(name, one.samples, rows)
    return EvaluationResult(0, found)


def test_problems_are_compared_by_their_texts_and_the_others_are_counted() -> None:
    """Not by ids, which are numbers of rows."""
    before, after = renamed(two_benchmarks(0.5)), renamed(two_benchmarks(0.7, problems=30), ids=False)
    last = after.benchmarks["easy"].results[::-1]
    after = EvaluationResult(0, {"easy": summarise("easy", 4, last), "new": after.benchmarks["hard"]})
    compared = compare_results(before, after)
    assert compared.counts == {"easy": (30, 10, 0), "hard": (0, 40, 0), "new": (0, 0, 30)}
    assert list(compared.changes) == ["easy"]
    rates = [one.benchmarks["easy"].per_problem("avg@4")[:30] for one in (two_benchmarks(0.5), two_benchmarks(0.7))]
    assert compared.changes["easy"]["avg"].value == pytest.approx((rates[1] - rates[0]).mean())
    assert "easy: 30 problems are in both evaluations; left out are 10 of the other one" in compared.to_markdown()


def test_a_problem_that_a_benchmark_has_twice_is_compared_twice() -> None:
    rows = [replace(row, digest="same") for row in two_benchmarks(0.5).benchmarks["easy"].results[:3]]
    one = EvaluationResult(0, {"easy": summarise("easy", 4, rows)})
    other = EvaluationResult(0, {"easy": summarise("easy", 4, rows[:2])})
    assert compare_results(one, other).counts == {"easy": (2, 1, 0)}


def test_evaluations_without_a_common_problem_are_not_compared() -> None:
    one, other = renamed(two_benchmarks(0.5)), renamed(two_benchmarks(0.5), digests=False)
    with pytest.raises(UserError, match="--compare: the problems of easy, hard are other ones there"):
        compare_results(one, other)
    with pytest.raises(UserError, match="--compare: no benchmark is in both evaluations: countdown there, easy, hard"):
        compare_results(example(), one)


def test_settings_that_differ_are_named_beside_a_comparison() -> None:
    result = two_benchmarks(0.5)
    before: dict[str, Any] = {
        "model": "a",
        "samples": 4,
        "seed": 1,
        "template": "chat",
        "suffixes": {"easy": "", "x": "."},
    }
    after = {**before, "model": "b", "template": "raw", "suffixes": {"easy": "Box it."}}
    before["sampling"] = SamplingParams(1.0, 0.8, 64, (7, 8)).to_json()
    after["sampling"] = SamplingParams(0.6, 0.8, 64, (7, 8)).to_json()
    compared = compare_results(result, result, (before, after))
    assert compared.differences == [
        "temperature was 1.0, is 0.6",
        "template was 'chat', is 'raw'",
        "suffix of easy was '', is 'Box it.'",
    ]
    assert "Other settings: temperature was 1.0, is 0.6." in compared.to_markdown()
    assert compare_results(result, result, (before, before)).differences == []


def test_pass_at_k_curves_are_drawn_for_every_k() -> None:
    both = {"before": two_benchmarks(0.5), "after": two_benchmarks(0.7)}
    figure = draw_pass_curves(
        {name: {label: one.benchmarks[name].pass_curve() for label, one in both.items()} for name in ("easy", "hard")}
    )
    assert [len(np.asarray(axes.lines[0].get_xdata())) for axes in figure.axes] == [4, 4]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]


# Distributions


def test_vocabularies_padded_to_different_sizes_are_compared() -> None:
    """As are Qwen3's (151,936 columns) and Qwen2.5's (152,064 columns)."""

    class Model(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(ids))

    wide = Model(6, 12)
    narrow = Model.from_pretrained(wide.weight[:, :10].detach())
    student, teacher = (response_logits(model, [1, 2], [3, 4, 5], 10) for model in (narrow, wide))
    assert torch.equal(student, wide.weight[2:5, :10])
    found = token_means([compare_logits(student, teacher, None, 0.1)])
    assert (found["top1_teacher"], found["forward_kl_gated"]) == (0, 0)


def test_gated_figures_are_means_of_the_forward_kl_over_gated_tokens() -> None:
    sure, unsure = torch.tensor([8.0, 0.0, 0.0]), torch.zeros(3)
    teacher = torch.stack([sure, unsure, unsure])
    student = torch.stack([unsure, torch.tensor([0.0, 1.0, 0.0]), sure])
    before = torch.stack([sure, sure, sure])
    parts = [compare_logits(student[i : i + 1], teacher[i : i + 1], before[i : i + 1], 0.8) for i in range(3)]
    found = token_means(parts)
    q = [student[i].double().softmax(-1) for i in (1, 2)]
    forward = [float((torch.full((3,), 1 / 3, dtype=torch.float64) * (-np.log(3) - p.log())).sum()) for p in q]
    assert found == pytest.approx(
        {
            "high_entropy_student": 2 / 3,
            "high_entropy_teacher": 2 / 3,
            "top1_teacher": 1 / 3,
            "top1_changed": 1 / 3,
            "forward_kl_gated": sum(forward) / 2,
        },
        rel=1e-5,
    )
    assert np.isnan(token_means([compare_logits(sure[None], sure[None], None, 0.8)])["forward_kl_gated"])


def test_sampling_in_an_evaluations_settings_has_the_keys_of_earlier_releases() -> None:
    sampling = SamplingParams(1.0, 0.8, 64, (7, 8))
    stored = json.loads(json.dumps(sampling.to_json()))
    assert stored == {"temperature": 1.0, "top_p": 0.8, "max_new_tokens": 64, "stop_ids": [7, 8]}
    assert SamplingParams.from_json(stored) == sampling
