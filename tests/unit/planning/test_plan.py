"""`eaopd plan`: what it prints, proposes and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eaopd_megatron.planning.planner import Plan
from eaopd_megatron.planning.times import GiB
from eaopd_megatron.planning.workload import PlannedLayout
from tests.unit.planning.examples import (
    COUNTDOWN,
    RECIPES,
    ROOT,
    USUAL,
    planner,
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_repository_does_not_fit(path: Path, planned: Callable[..., Any]) -> None:
    code, shown, said = planned(str(path), "--gpus", "8", "--gpu-memory", "80")
    assert (code, said) == (0, "")
    assert "of 80: fits" in shown
    assert "estimates" in shown
    tables = shown.split("\nassumed")[0].splitlines()
    assert all(
        len(line) <= 100
        for line in tables
        if "parameters" not in line and not line.startswith(("best", "the ", "teacher (", "servers: "))
    )


def test_the_best_layout_cannot_be_pasted(planned: Callable[..., Any], tmp_path: Path) -> None:
    recipe = str(USUAL)
    out = tmp_path / "plan.json"
    code, shown, said = planned(recipe, "--teacher", "Qwen/Qwen3-32B", "--json", str(out))
    assert code == 1
    assert "does not fit" in shown
    assert said.count("\n") == 1
    numbers = json.loads(out.read_text())
    assert not numbers["fits"]
    best = numbers["layouts"][0]["overrides"]
    assert f"change student.tensor_parallel; the best layout that fits: {best}" in said
    assert planned(recipe, *best.split(), "--teacher", "Qwen/Qwen3-32B")[0] == 0


def test_a_teacher_that_is_too_large_is_not_given_gpus_of_its_own(planned: Callable[..., Any]) -> None:
    recipe = str(USUAL)
    code, shown, said = planned(recipe, "--teacher", "Qwen/Qwen3-235B-A22B", "--gpus", "4")
    assert code == 1
    assert "\nteacher on GPUs of its own (teacher.placement=separate):\n  8 GPUs, " in shown
    assert "layouts of the student alone on 4 GPUs that fit" in shown
    assert said.endswith(
        "no layout of 4 GPUs holds student.model and teacher.model together: "
        "take a smaller teacher.model, more --gpus, or teacher.placement=separate\n"
    )


ELSEWHERE = ("teacher.placement=separate", "teacher.tensor_parallel=2", "teacher.replicas=2", "--gpus", "8")


def test_a_separate_teacher_is_planned_on_the_students_gpus(planned: Callable[..., Any], tmp_path: Path) -> None:
    recipe, out = str(USUAL), tmp_path / "plan.json"
    code, shown, said = planned(recipe, *ELSEWHERE, "teacher.signal=hidden", "--json", str(out))
    assert (code, said) == (0, "")
    numbers = json.loads(out.read_text())
    (teacher,) = numbers["elsewhere"]
    assert (teacher["gpus"], teacher["layout"], teacher["bytes_a_token"]) == (4, "TP2", 8192)
    assert teacher["bytes_an_iteration"] == 128 * 4096 * 8192  # the design's 4.3 GB
    assert "2 x 2 GPUs, TP2: " in shown
    assert "hidden states of 8,192 bytes a response token over HTTP, at most 4.29 GB an iteration" in shown
    assert "layouts of the student alone that fit" in shown
    parts = {part["part"]: part["phase"] for part in numbers["recipe"]["parts"] if part["role"] == "teacher"}
    assert parts == {"output layer": "always", "hidden states of a micro-batch": "update"}
    assert "teacher" not in numbers["recipe"]["estimated_seconds"]


@pytest.mark.parametrize(("placement", "said"), [("separate", "136 bytes"), ("served", "132 bytes")])
def test_what_top_k_sends_is_unknown(planned: Callable[..., Any], placement: str, said: str) -> None:
    """A served teacher sends no entropy."""
    shown = planned(str(USUAL), f"teacher.placement={placement}", "teacher.signal=topk", "--gpus", "8")[1]
    assert f"top-16 of {said} a response token" in shown


def test_a_teacher_too_large_for_its_own_gpus_fits(planned: Callable[..., Any]) -> None:
    recipe = str(USUAL)
    two = ("teachers.math.offload=weights", "teachers.code.model=Qwen/Qwen3-32B", "teachers.code.placement=separate")
    code, shown, said = planned(recipe, *two, "--gpus", "8", "--gpu-memory", "64")
    assert code == 1 and "teacher code (separate): 1 GPUs, one GPU: " in shown
    assert said.startswith("error: teachers.code: a GPU of its own needs ") and said.count("\n") == 1
    assert "change teachers.code.tensor_parallel; the fewest GPUs that hold it: 2" in said
    code, _, said = planned(recipe, *two, "teachers.code.tensor_parallel=3", "--gpus", "8")
    assert said.startswith(
        "error: teachers.code.model: Qwen/Qwen3-32B: tensor_parallel=3 does not divide num_attention"
    )
    assert planned(recipe, *two, "teachers.code.tensor_parallel=4", "--gpus", "8", "--gpu-memory", "64")[0] == 0


def test_a_layout_that_is_left_out_is_not_explained(planned: Callable[..., Any]) -> None:
    shown = planned(str(ROOT / "recipes/qwen3/4b_from_30b_a3b.yaml"), "--gpus", "8")[1]
    assert " cannot be cut: teacher.model: tensor_parallel=8 does not divide num_key_value_heads=4" in shown
    assert " cannot be cut: student.model: pipeline_parallel=8 does not divide num_hidden_layers=36" in shown
    assert " need more memory; of them " in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "tpu"), "--gpu tpu: unknown; known are a100, h100, h200, b200"),
        (
            ("--teacher", "x/y", "teachers.math.signal=topk"),
            "--teacher is for one teacher; with several ",
        ),
        (("--teacher", "nowhere"), "teacher.model: nowhere is no folder with a config.json and no hub id owner/name"),
        (
            ("student.tensor_parallel=3", "--gpus", "3"),
            f"student.model: {ROOT}/recipes/countdown/student: tensor_parallel=3 does not divide num_attention_heads=",
        ),
        (
            ("--gpus", "3"),
            "the recipe's 2 GPUs a copy (tensor x pipeline x context parallel) do not divide 3",
        ),
        (
            ("student.expert_parallel=2",),
            f"student.model: {ROOT}/recipes/countdown/student: Qwen3ForCausalLM has no experts; set expert_parallel",
        ),
    ],
)
def test_bad_input_ends_in_a_traceback(planned: Callable[..., Any], arguments: tuple[str, ...], said: str) -> None:
    code, _, error = planned(COUNTDOWN, *arguments)
    assert code == 1
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_plan_writes_no_file_and_says_nothing(planned: Callable[..., Any], tmp_path: Path) -> None:
    code, _, said = planned(COUNTDOWN, "--json", str(tmp_path / "none" / "x.json"))
    assert (code, said) == (1, f"error: --json {tmp_path}/none/x.json: No such file or directory\n")


def test_the_fastest_layout_is_not_first() -> None:
    found = Plan(planner(), PlannedLayout(2, True, data_parallel=4), 8).together.options
    assert len(found) > 3
    assert found[0].total <= 1.02 * min(option.total for option in found)
    assert all(option.memory.peak <= 80 * GiB for option in found)


def test_memory_is_not_saved_before_a_layout_is_given_up() -> None:
    plain = planner(limit=46, micro_batch_tokens=32768)
    found = {option.layout: option.work for option in plain.search(8).options}
    assert {work.micro_batch_tokens for work in found.values()} > {5120, 32768}
    assert any(work.recompute == "full" for work in found.values())
    assert found[PlannedLayout(2, True, data_parallel=4)].distributed_optimizer
    assert all(not work.distributed_optimizer for work in found.values() if work == plain.work)


def test_overrides_leave_what_the_recipe_says_otherwise(planned: Callable[..., Any]) -> None:
    """A recipe at context_parallel=2 is told to set it back to 1."""
    recipe, own = (
        str(ROOT / "recipes/qwen3/4b_from_32b.yaml"),
        (
            "student.tensor_parallel=1",
            "student.sequence_parallel=false",
            "student.context_parallel=8",
            "student.recompute=selective",
        ),
    )
    code, _, said = planned(recipe, *own, "--gpus", "8")
    assert code == 1
    assert "; change student.tensor_parallel; " in said
    best = said.split("fits: ")[1].split()
    assert "student.context_parallel=1" in best
    assert planned(recipe, *own, *best)[0] == 0


def test_the_remedy_names_a_key_that_stays() -> None:
    work = planner(rollout_batch=128).work
    plan = Plan(replace(planner(), work=work), PlannedLayout(2, True), 2)
    assert "; change rollout.batch_size; the best layout that fits: rollout.batch_size=64 " in plan.remedy()
