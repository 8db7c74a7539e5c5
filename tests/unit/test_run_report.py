"""A run's report and its warnings are right for runs in any state."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.results import EvaluationResult, ProblemResult, summarise
from eaopd_megatron.reporting.alerts import find_warnings
from eaopd_megatron.reporting.metrics_log import MetricsWriter
from eaopd_megatron.reporting.plots import PLOTS, smooth
from eaopd_megatron.reporting.run_data import RunData
from eaopd_megatron.reporting.run_report import compare_evaluations, summary_line, write_run_report
from tests.unit.example_runs import make_evaluation, make_record

OBJECTIVE = {"preset": "eopd", "gate": "hard", "forward_kl": "topk", "threshold": 0.8}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the folder of a run after `done` of `total` iterations, as training would."""

    def make(
        done: int = 300, total: int = 300, change: Callable[[dict[str, Any]], None] | None = None, **evaluation: Any
    ) -> Path:
        folder = tmp_path / "run"
        folder.mkdir(parents=True, exist_ok=True)
        recipe = {
            "objective": OBJECTIVE,
            "train": {"iterations": total},
            "student": {"model": "s"},
            "teacher": {"model": "t"},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
        (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "git_commit": "abc"}))
        rng = np.random.default_rng(0)
        with MetricsWriter(folder, tensorboard=False, wandb=None, resume_iteration=None) as writer:
            for iteration in range(done + 1):
                record = make_record(iteration, total, rng) if iteration else {"iteration": 0, "update": 0}
                if iteration % 50 == 0 or iteration == total:
                    found = make_evaluation(iteration, 0.08 + 0.06 * iteration / total, **evaluation)
                    found.write(folder / "evaluation")
                    record |= found.to_metrics()
                if change:
                    change(record)
                writer.write(record)
        return folder

    return make


def test_the_report_is_one_file_with_every_figure(make_run: Callable[..., Path]) -> None:
    run = make_run(done=100, total=100)
    text = write_run_report(run).read_text()
    assert "Not drawn" not in text
    assert "finished: iteration 100 of 100; objective eopd" in text
    assert sorted(path.stem for path in (run / "report").glob("*.png")) == sorted(plot.name for plot in PLOTS)
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'>)]*)""", text)
    assert len(sources) == len(PLOTS)
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    for expected in ("distinct right answers / problem", "smallest KL of any token", "git_commit", "iterations: 100"):
        assert expected in text
    assert "Warnings" not in text and "<h2>Teachers</h2>" not in text


def test_names_and_settings_are_escaped_in_the_page(make_run: Callable[..., Path]) -> None:
    name = "<script>alert(1)</script>"
    run = make_run(done=2, total=4, names=(name,))
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["student"]["model"] = recipe["run"] = name
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    (run / "environment.json").write_text(json.dumps({"host": name}))
    text = write_run_report(run).read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4  # the state, the table, the recipe, the environment


def test_a_running_run_has_a_report(make_run: Callable[..., Path]) -> None:
    run = make_run(done=7, total=300)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 8, "objec')
    text = write_run_report(run).read_text()
    assert "not finished (running, or stopped): iteration 7 of 300" in text
    assert "not yet" in text and "Not drawn" not in text
    assert "->" not in summary_line(run).split("student entropy")[0]


def test_a_run_with_only_its_first_evaluation_has_a_report_that_names_what_is_missing(
    make_run: Callable[..., Path],
) -> None:
    run = make_run(done=0, total=300)
    (run / "report").mkdir()
    (run / "report" / "gate.png").write_bytes(b"of an earlier run")
    text = write_run_report(run).read_text()
    assert "Not drawn: this run has not recorded objective/gate_fraction." in text
    assert sorted(path.stem for path in (run / "report").iterdir()) == ["evaluation", "pass_at_k"]


def test_a_run_without_evaluation_recipe_or_environment_still_has_a_report(make_run: Callable[..., Path]) -> None:
    run = make_run(done=5, total=5)
    for path in [*(run / "evaluation").iterdir(), run / "config.yaml", run / "environment.json"]:
        path.unlink()
    text = write_run_report(run).read_text()
    for expected in ("config.yaml is missing", "environment.json is missing", "No evaluation yet", "iteration 5;"):
        assert expected in text.replace("iteration 5</p>", "iteration 5;")
    assert summary_line(run).startswith("loss ")


def test_a_folder_that_is_no_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"run\.folder"):
            write_run_report(folder)


def test_before_and_after_are_the_first_and_the_last_evaluation(make_run: Callable[..., Path]) -> None:
    run = make_run(done=100, total=100)
    first, last = make_evaluation(0, 0.08), make_evaluation(100, 0.14)
    row = next(row for row in compare_evaluations(RunData.read(run)) if row.figure == "pass@1")
    before, after = (evaluation.benchmarks["countdown"].figures["pass@1"] for evaluation in (first, last))
    assert row.after is not None and row.change is not None
    assert (row.before.value, row.after.value) == (before, after)
    assert row.change.value == pytest.approx(after - before)
    assert row.change.low < row.change.value < row.change.high
    assert summary_line(run).startswith(
        f"Pass@1 {before:.3f} -> {after:.3f} ({100 * (after / before - 1):+.0f} %), Pass@8 "
    )
    ending = (
        r"distinct right answers [\d.]+ -> [\d.]+ .*student entropy on gated tokens [\d.]+ nats \(teacher 1\.\d+\)$"
    )
    assert re.search(ending, summary_line(run))


def test_evaluations_on_different_problems_get_no_paired_change(make_run: Callable[..., Path]) -> None:
    run = make_run(done=100, total=100)
    make_evaluation(100, 0.14, problems=60).write(run / "evaluation")
    assert all(row.change is None for row in compare_evaluations(RunData.read(run)))
    assert "other problems" in write_run_report(run).read_text()


def test_evaluations_that_a_resumed_run_will_repeat_are_left_out(make_run: Callable[..., Path]) -> None:
    run = make_run(done=60, total=300)
    make_evaluation(150, 0.5).write(run / "evaluation")
    assert [evaluation.iteration for evaluation in RunData.read(run).evaluations] == [0, 50]


def test_a_damaged_evaluation_file_does_not_hide_the_others(make_run: Callable[..., Path]) -> None:
    run = make_run(done=60, total=300)
    (run / "evaluation" / "000050.json").write_text("{")
    data = RunData.read(run)
    assert [evaluation.iteration for evaluation in data.evaluations] == [0]
    assert any("000050.json" in line for line in find_warnings(data))


def spoiled(name: str, value: float, after: int = 5) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        if record["iteration"] > after and name in record:
            record[name] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("teacher/terminal_logprob", -21.0, "below -10 nats: 15 of 20 iterations, worst -21 at iteration 6"),
        ("rollout/truncated", 0.9, "more than 50% of the rollouts"),
        ("objective/kl_min", -0.2, "more than rounding explains"),
        ("objective/gate_ambiguous", 0.06, "more than 5% of the tokens have a teacher entropy that its top-k leaves"),
        ("rollout/logprob_gap", 0.3, "more than 0.1 nats from the trainer's"),
        ("rollout/version_lag", 0.5, "more than 0 updates old"),
    ],
)
def test_metrics_beyond_their_limits_are_warned_of(
    make_run: Callable[..., Path], name: str, value: float, expected: str
) -> None:
    assert find_warnings(RunData.read(make_run(done=20, total=20))) == []
    lines = find_warnings(RunData.read(make_run(done=20, total=20, change=spoiled(name, value))))
    assert len(lines) == 1 and expected in lines[0]


def test_each_of_several_teachers_is_shown_and_warned_of(make_run: Callable[..., Path]) -> None:
    """In the mean, a good teacher's tokens would hide another teacher's wrong stopping token."""

    def two(record: dict[str, Any]) -> None:
        if record["iteration"]:
            record |= {"teachers/math/terminal_logprob": -0.5, "teachers/code/terminal_logprob": -21.0}
            record |= {"teachers/math/tokens": 4321.0, "teachers/<code>/tokens": 1.0}

    run = make_run(done=20, total=20, change=two)
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(
        yaml.safe_dump(recipe | {"teachers": {"math": {"model": "m"}, "code": {"model": "c"}}})
    )
    (line,) = find_warnings(RunData.read(run))
    assert line.startswith("teacher code's log-probability of the stopping token is below -10 nats: 20 of 20")
    assert line.endswith("see teachers.code.terminal_map")
    page = write_run_report(run).read_text()
    assert "c, m into s" in page and "4,321 → 4,321" in page and "<td>&lt;code&gt;</td>" in page


def test_the_report_warns_at_the_limits_of_the_recipe(make_run: Callable[..., Path]) -> None:
    def lag(record: dict[str, Any]) -> None:
        record |= {"rollout/version_lag": 4.0, "rollout/logprob_gap": 0.3, "rollout/truncated": 0.7}

    run = make_run(done=20, total=20, change=lag)
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["train"] |= {"prompts_per_iteration": 16, "mini_batch": 4}
    recipe["rollout"] = {"max_staleness": 1, "warn_logprob_gap": 0.4, "warn_truncated": None}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert find_warnings(RunData.read(run)) == []
    recipe["rollout"]["max_staleness"] = 0
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert ["more than 0 updates old" in line for line in find_warnings(RunData.read(run))] == [True]


def test_a_gate_that_never_opens_is_warned_of_unless_the_objective_has_none(make_run: Callable[..., Path]) -> None:
    run = make_run(done=20, total=20, change=spoiled("objective/gate_fraction", 0.0, after=-1))
    assert ["gate never opened" in line for line in find_warnings(RunData.read(run))] == [True]
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["objective"] = {"preset": "opd", "gate": None, "forward_kl": None, "threshold": None}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    assert find_warnings(RunData.read(run)) == []

    def without(record: dict[str, Any]) -> None:
        record.pop("objective/gate_fraction", None)

    lines = find_warnings(RunData.read(make_run(done=20, total=20, change=without)))
    assert ["never recorded" in line for line in lines] == [True]


def test_grader_errors_are_warned_of(make_run: Callable[..., Path]) -> None:
    run = make_run(done=20, total=20)
    rows = [ProblemResult("a", (False, False), (False, False), (None, None), (True, True), (8, 8), errors=2)]
    EvaluationResult(20, {"math": summarise("math", 2, rows)}).write(run / "evaluation")
    lines = find_warnings(RunData.read(run))
    assert len(lines) == 2 and "2 of 2 answers of math" in lines[0] and "100%" in lines[1]


def test_start_and_end_of_a_short_run_do_not_overlap(make_run: Callable[..., Path]) -> None:
    def rise(record: dict[str, Any]) -> None:
        record["rollout/length"] = float(record["iteration"])

    data = RunData.read(make_run(done=5, total=5, change=rise))
    assert (data.early("rollout/length"), data.recent("rollout/length")) == (1.0, 4.0)
    data = RunData.read(make_run(done=49, total=49, change=rise))
    assert (data.early("rollout/length"), data.recent("rollout/length")) == (4.5, 44.5)


def test_smoothing_keeps_constants_and_trends() -> None:
    assert smooth(np.full(100, 2.5)).tolist() == pytest.approx([2.5] * 100)
    line = smooth(np.arange(120.0))
    assert line[0] >= 0 and line[-1] <= 119 and (np.diff(line) > 0).all()


def test_only_the_report_imports_matplotlib_and_never_its_global_state() -> None:
    code = (
        "import sys, eaopd_megatron.reporting.metrics_log, eaopd_megatron.reporting.progress\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import eaopd_megatron.reporting.run_report\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
