"""Keys that are not the recipe's: those of the last release, and what other frameworks call the same thing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from eaopd_megatron.config import dump_recipe, load_recipe, recipe_value
from eaopd_megatron.config.aliases import (
    FOREIGN,
    RENAMED,
    current_key,
    foreign_answer,
    rename_old_keys,
    section_keys,
    teacher_schema_key,
    value_keys,
)
from eaopd_megatron.errors import RecipeError
from eaopd_megatron.training.run_folder import RunFolder

RECIPE = """\
run: {folder: runs/x}
student: {model: s}
teacher: {model: t, placement: separate}
train: {iterations: 3}
"""
VALUES = {
    "run.on_damaged": "fall_back",
    "rollout.max_lag": 1,
    "rollout.stop_ids": [7],
    "servers.max_running": 3,
    "servers.memory_fraction": 0.5,
    "servers.start_minutes": 2.0,
    "servers.all_down_minutes": 2.0,
    "teacher.max_running": 3,
    "teacher.memory_fraction": 0.5,
    "teacher.start_minutes": 2.0,
    "teacher.all_down_minutes": 2.0,
}
SGLANG = "rollout.engine=sglang"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE)


def refusal(*overrides: str, path: str = "r.yaml") -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    return str(error.value)


def yaml(key: str, value: object) -> str:
    section, _, leaf = key.rpartition(".")
    return f"{section}: {{{leaf}: {value}}}\n"


def test_the_table_of_old_keys_has_them_all() -> None:
    assert RENAMED.keys() == VALUES.keys()
    assert set(RENAMED.values()) <= set(value_keys()) and not set(RENAMED) & set(value_keys())


@pytest.mark.parametrize("old", VALUES)
def test_an_old_key_is_refused_or_silent(old: str) -> None:
    new, value = RENAMED[old], VALUES[old]
    expected = load_recipe("r.yaml", [SGLANG, f"{new}={value}"])
    assert recipe_value(expected, new) == value == recipe_value(expected, old)
    warning = f"{old} is now {new}; the old name works until 0.3"

    Path("old.yaml").write_text(yaml(old, value))
    Path("above.yaml").write_text("base: [r.yaml, old.yaml]\n")
    for path, override, origin in (
        ("r.yaml", f"{old}={value}", f"override '{old}={value}'"),
        ("above.yaml", "seed=0", "old.yaml"),
    ):
        lines: list[str] = []
        assert load_recipe(path, [SGLANG, override], report=lines.append) == expected
        assert lines == [f"{origin}: {warning}"]


def test_an_old_key_of_a_teacher_with_a_name_is_refused() -> None:
    lines: list[str] = []
    loaded = load_recipe("r.yaml", ["teachers.math.model=m", "teachers.math.max_running=2"], report=lines.append)
    assert loaded.teachers["math"].max_concurrent_requests == 2
    said = "teachers.math.max_running is now teachers.math.max_concurrent_requests; the old name works until 0.3"
    assert lines == [f"override 'teachers.math.max_running=2': {said}"]


def test_both_names_in_one_layer_are_guessed_at() -> None:
    for old, new in RENAMED.items():
        for names in ((old, new), (new, old)):
            section = old.partition(".")[0]
            keys = ", ".join(f"{name.partition('.')[2]}: {VALUES[old]}" for name in names)
            Path("both.yaml").write_text(f"base: r.yaml\n{section}: {{{keys}}}\n")
            said = f"both.yaml: {old} is the old name of {new}, which is given too: remove {old}"
            assert refusal(path="both.yaml") == said
    lines: list[str] = []  # in two layers the later one counts
    loaded = load_recipe(
        "r.yaml", ["run.on_corrupt_checkpoint=refuse", "run.on_damaged=fall_back"], report=lines.append
    )
    assert loaded.run.on_corrupt_checkpoint == "fall_back" and len(lines) == 1


def test_a_reference_to_an_old_key_finds_nothing() -> None:
    lines: list[str] = []
    overrides = [SGLANG, "servers.max_running=9", "teacher.max_running=${servers.max_running}"]
    assert load_recipe("r.yaml", overrides, report=lines.append).teacher.max_concurrent_requests == 9
    assert len(lines) == 3  # the reference is one of its own


def test_wrong_value_of_an_old_key_is_blamed_on_another_layer() -> None:
    said = "override 'run.on_damaged=never': run.on_corrupt_checkpoint is 'never'; allowed: 'refuse' or 'fall_back'"
    assert refusal("run.on_damaged=never") == said


def test_a_run_of_the_last_release_cannot_be_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("r.yaml", [SGLANG, "rollout.max_staleness=1", "servers.max_concurrent_requests=5"])
    text = dump_recipe(recipe)
    for old, new in RENAMED.items():
        text = text.replace(f"  {new.partition('.')[2]}:", f"  {old.partition('.')[2]}:")
    assert "max_lag: 1" in text and "max_staleness" not in text
    (Path("old") / "checkpoints" / "step_000001").mkdir(parents=True)
    (Path("old") / "config.yaml").write_text(text)
    run = RunFolder(Path("old"))
    run.check_recipe(recipe)
    with pytest.raises(Exception, match=r"holds a run with rollout\.max_staleness=1, this recipe has 0"):
        run.check_recipe(recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"max_staleness": 0})}))
    assert capsys.readouterr().err == ""  # nobody can edit that file


def test_the_warning_is_printed_by_every_rank_or_twice() -> None:
    program = (
        "from eaopd_megatron.config import load_recipe\n"
        "for _ in range(2): load_recipe('r.yaml', ['run.on_damaged=refuse'])"
    )
    said = (
        "warning: override 'run.on_damaged=refuse': run.on_damaged is now run.on_corrupt_checkpoint; "
        "the old name works until 0.3\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    for variables, expected in (
        ({}, said),
        ({"RANK": "0"}, said),
        ({"RANK": "1"}, ""),
        ({"SLURM_PROCID": "2"}, ""),
        ({"RANK": "0", "EAOPD_LAUNCHER_PID": "1"}, ""),  # the launcher has said it
    ):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONPATH": root, **variables}
        )
        assert (done.returncode, done.stderr) == (0, expected)


def test_names_of_others_lead_to_a_key_that_does_not_exist() -> None:
    keys = {*value_keys(), *section_keys()}
    for name in FOREIGN:
        answer = foreign_answer(name)
        assert answer is not None
        named = [
            word for word in re.findall(r"\b[a-z_0-9]+\.[a-z_0-9]+\b", answer) if not word.replace(".", "").isdigit()
        ]
        assert set(named) <= keys, (name, set(named) - keys)
        assert named, name
        assert name not in keys, f"{name} is a key of ours"
        assert not answer.startswith(" ") and "|" not in answer and "  " not in answer


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("train.batch_size", "the number of responses per update is train.mini_batch"),
        ("train.global_batch_size", "the number of responses per update is train.mini_batch"),
        ("train.rollout_batch_size", "the number of prompts per iteration is train.prompts_per_iteration"),
        ("train.micro_batch_size", "micro-batches are packed; their size in tokens is train.micro_batch_tokens"),
        (
            "train.gradient_accumulation_steps",
            "it follows from train.mini_batch (responses per update) and train.micro_batch_tokens (tokens per "
            "micro-batch)",
        ),
        ("train.epochs", "the number of iterations is train.iterations"),
        ("max_steps", "the number of iterations is train.iterations"),
        (
            "rollout.n",
            "each prompt gets one response; the number of prompts per iteration is train.prompts_per_iteration",
        ),
        (
            "actor_rollout_ref.rollout.n",
            "each prompt gets one response; the number of prompts per iteration is train.prompts_per_iteration",
        ),
        ("evaluation.n", "the number of responses per problem is evaluation.samples"),
        ("optimizer.learning_rate", "the learning rate is optimizer.lr"),
        ("learning-rate", "the learning rate is optimizer.lr"),
        ("trainer.lr_scheduler_type", "the learning-rate schedule is optimizer.schedule"),
        ("optimizer.warmup_steps", "the warmup, in updates, is optimizer.warmup_updates"),
        ("optimizer.beta", "Adam's decay rates are optimizer.beta1 and optimizer.beta2"),
        ("rollout.max_new_tokens", "the longest response, in tokens, is rollout.max_response_tokens"),
        ("evaluation.max_tokens", "the longest response, in tokens, is evaluation.max_response_tokens"),
        ("data.max_tokens", "the longest prompt, in tokens, is data.max_prompt_tokens"),
        ("student.tp", "the tensor-parallel size is student.tensor_parallel"),
        ("teachers.math.tp", "the tensor-parallel size is teachers.math.tensor_parallel"),
        (
            "tensor_model_parallel_size",
            "the tensor-parallel size is student.tensor_parallel or teacher.tensor_parallel or "
            "servers.tensor_parallel",
        ),
        ("student.ep", "the expert-parallel size is student.expert_parallel"),
        ("run.output_dir", "the run's folder is run.folder"),
        ("run.save_steps", "the number of iterations between checkpoints is run.save_interval"),
        ("model_name_or_path", "the student's folder or hub id is student.model"),
        ("servers.gpu_memory_utilization", "a server's share of GPU memory is servers.mem_fraction_static"),
        ("objective.kl_coef", "the KL terms' weights are objective.reverse_weight and "
         "objective.forward_weight"),
        ("train.temperature", "responses are sampled at rollout.temperature, benchmarks at evaluation.temperature"),
    ],
)  # fmt: skip
def test_the_name_of_another_framework_is_answered_by_its_spelling(key: str, answer: str) -> None:
    assert refusal(f"{key}=1") == f"override '{key}=1': {key}: no such key; {answer}"


def test_keys_of_teachers_with_names_are_other_keys() -> None:
    assert teacher_schema_key("teachers.a.model") == "teacher.model"
    assert teacher_schema_key("teachers") == "teachers"
    assert current_key("teachers.a.start_minutes") == "teachers.a.startup_timeout_minutes"
    assert current_key("teacher.model") == "teacher.model"


def test_a_tree_is_changed_in_place() -> None:
    tree = {"rollout": {"max_lag": 1}, "x": [1]}
    assert rename_old_keys(tree) == (
        {"rollout": {"max_staleness": 1}, "x": [1]},
        {"rollout.max_lag": "rollout.max_staleness"},
    )
    assert tree == {"rollout": {"max_lag": 1}, "x": [1]}
