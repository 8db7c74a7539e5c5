"""The campaign of kills, in short, and what its checks must not miss."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eaopd_megatron.config import Recipe, load_recipe
from eaopd_megatron.data.prompts import PromptCursor
from tools.campaign_checks import check_metrics, check_prompts, compare
from tools.campaign_kills import RECIPE, doing

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"p{i}" for i in range(11)]
SHORT = ("train.prompts_per_iteration=64", "evaluation.interval=0", "evaluation.problems=4", "evaluation.samples=1")
Samples = list[dict[str, Any]]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Of a run of three iterations, each of five prompts and three updates, that left behind what it should."""
    small = ("train.iterations=3", "train.prompts_per_iteration=5", "train.mini_batch=2", f"run.folder={tmp_path}")
    recipe = load_recipe(RECIPE, small)
    cursor = PromptCursor(len(NAMES), 5, recipe.seed)
    for iteration in range(3):
        spans = [[3 * iteration, 0, 7]]
        samples = [{"prompt_id": NAMES[index], "weight_versions": spans} for index in cursor.indices(iteration)]
        write(tmp_path / "rollouts" / f"{iteration + 1:06d}.jsonl", samples)
    write(tmp_path / "metrics.jsonl", [{"iteration": i, "rollout/logprob_gap": 1e-6} for i in range(4)])
    return recipe


def write(path: Path, lines: Samples) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(path: Path) -> Samples:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_whole_run_is_called_damaged(recipe: Recipe) -> None:
    assert check_prompts(recipe, NAMES) == (15, [])
    assert check_metrics(recipe) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s[:-1], "iteration 2: 1 prompts lost, 0 twice"),
        (lambda s: [*s, s[0]], "iteration 2: 0 prompts lost, 1 twice"),
        (lambda s: [*s[:-1], s[0]], "iteration 2: 1 prompts lost, 1 twice"),
        (lambda s: [], "iteration 2: 5 prompts lost"),
        (lambda s: [s[0] | {"weight_versions": [[0, 0, 7]]}, *s[1:]], "iteration 2: weights [0, 3] instead of 3"),
        (lambda s: [s[0] | {"weight_versions": [[3, 0, 2], [6, 2, 7]]}, *s[1:]], "iteration 2: weights [3, 6]"),
    ],
    ids=["lost", "twice", "exchanged", "nothing", "old weights", "weights that changed"],
)
def test_a_lost_prompt_goes_unnoticed(recipe: Recipe, change: Callable[[Samples], Samples], problem: str) -> None:
    path = Path(recipe.run.folder) / "rollouts" / "000002.jsonl"
    write(path, change(read(path)))
    (found,) = check_prompts(recipe, NAMES)[1]
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r[:2] + r[3:], "with gaps or duplicates"),
        (lambda r: [*r, r[-1]], "with gaps or duplicates"),
        (lambda r: [*r[:3], r[3] | {"rollout/logprob_gap": 0.01}], "iteration 3: the servers' log-probs lie 0.01 nats"),
    ],
    ids=["gap", "double", "other weights"],
)
def test_metrics_with_a_hole_pass(recipe: Recipe, change: Callable[[Samples], Samples], problem: str) -> None:
    path = Path(recipe.run.folder) / "metrics.jsonl"
    write(path, change(read(path)))
    (found,) = check_metrics(recipe)
    assert problem in found


def test_another_result_passes_for_noise() -> None:
    references = [{"loss": 1.0, "length": 10.0}, {"loss": 1.1, "length": 11.0}, {"loss": 0.9, "length": 9.0}]
    _, problems = compare({"loss": 2.2, "length": 12.0}, references)
    assert problems == ["loss is 2.2; undisturbed runs have 1 ± 0.1"]


REAL_LOG = [
    "INFO:     Uvicorn running on http://127.0.0.1:1",
    '[05:00:00] INFO:     127.0.0.1:2 - "POST /begin_weight_update HTTP/1.1" 200 OK',
    '[05:00:00] INFO:     127.0.0.1:2 - "POST /end_weight_update HTTP/1.1" 200 OK',
    "[05:00:01] Prefill batch, #new-seq: 1, #new-token: 4, #cached-token: 0",
    '[05:00:02] INFO:     127.0.0.1:2 - "POST /generate HTTP/1.1" 200 OK',
]


@pytest.mark.parametrize(
    ("lines", "phase"), [(1, "idle"), (2, "updating"), (3, "idle"), (4, "generating"), (5, "idle")]
)
def test_a_kill_is_put_into_another_phase(lines: int, phase: str) -> None:
    assert doing(REAL_LOG[:lines]) == phase
    assert doing([*REAL_LOG[:4], "http://127.0.0.1:1 key=None", f"{phase} at 4"]) == phase


@pytest.mark.server
@pytest.mark.timeout(600)
def test_a_killed_server_takes_prompts_with_it(tmp_path: Path) -> None:
    """Doubles; real servers are killed by the tool with --real."""
    command = [sys.executable, "tools/campaign_kills.py", "--kills", "6", "--spacing", "4", "--folder", str(tmp_path)]
    done = subprocess.run([*command, *SHORT], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["kills"]) == 6
    assert report["prompts"] == 64 * report["iterations"]
