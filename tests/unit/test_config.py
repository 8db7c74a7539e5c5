"""Recipes: what is merged, what is refused and in which words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from eaopd_megatron.config import Recipe, dump_recipe, load_recipe, recipe_differences, recipe_value
from eaopd_megatron.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
LEAST: dict[str, Any] = {
    "run": {"folder": "runs/x"},
    "student": {"model": "owner/student"},
    "teacher": {"model": "owner/teacher"},
    "train": {"iterations": 3},
}
LEAST_YAML = """\
run: {folder: runs/x}
student: {model: owner/student}
teacher: {model: owner/teacher}
train: {iterations: 3}
"""

SGLANG = "rollout.engine=sglang"
COLOCATED = ("servers.placement=colocated", "weight_sync.transport=tensor")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A least recipe, r.yaml, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(LEAST_YAML)
    return Path("r.yaml")


def refusal(path: str | Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as raised:
        load_recipe(path, overrides)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2
    return str(raised.value)


def test_defaults_overrides_and_bases_are_lost_in_merging(recipe: Path) -> None:
    Path("low.yaml").write_text("seed: 1\noptimizer: {lr: 1e-4, eps: 1e-6}\nevaluation: {benchmarks: [a, b]}\n")
    Path("high.yaml").write_text("base: low.yaml\nseed: 2\noptimizer: {lr: 2e-4}\n")
    Path("top.yaml").write_text("base: [r.yaml, high.yaml]\nseed: 3\nevaluation: {benchmarks: [c]}\noptimizer:\n")
    loaded = load_recipe("top.yaml", ["train.iterations=7", "student.data_parallel=null", "data.suffix=a=b"])
    assert (loaded.seed, loaded.optimizer.lr, loaded.optimizer.eps, loaded.optimizer.beta2) == (3, 2e-4, 1e-6, 0.999)
    assert loaded.evaluation.benchmarks == ["c"]
    assert (loaded.train.iterations, loaded.student.data_parallel, loaded.data.suffix) == (7, None, "a=b")
    assert load_recipe("top.yaml", ["seed=8", "seed=9"]).seed == 9


def test_a_base_used_twice_is_taken_for_a_circle(recipe: Path) -> None:
    for name in ("a", "b"):
        Path(f"{name}.yaml").write_text("base: r.yaml\n")
    Path("top.yaml").write_text("base: [a.yaml, b.yaml]\n")
    assert load_recipe("top.yaml").train.iterations == 3


def test_base_faults(recipe: Path) -> None:
    Path("a.yaml").write_text("base: b.yaml\n")
    Path("b.yaml").write_text("base: a.yaml\n")
    assert refusal("a.yaml") == "a.yaml: the files under 'base' form a circle: a.yaml -> b.yaml -> a.yaml"
    Path("c.yaml").write_text("base: nope.yaml\n")
    assert refusal("c.yaml") == "c.yaml: the base file 'nope.yaml' does not exist"
    Path("c.yaml").write_text("base: {a: b}\n")
    assert refusal("c.yaml") == "c.yaml: base is {'a': 'b'}; it must be the name of a file or a list of names"
    assert refusal("r.yaml", "base=c.yaml") == "override 'base=c.yaml': 'base' may stand in a file only"


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optimizer.warmup-update", "optimizer.warmup_updates"),
        ("optimizer.betas1", "optimizer.beta1"),
        ("student.tensor_para", "student.tensor_parallel"),
        ("student.lr", "optimizer.lr"),
        ("optimiser.lr", "optimizer"),
        ("max_response_token", "rollout.max_response_tokens"),
    ],
)
def test_unknown_key_is_accepted_or_its_neighbour_is_not_named(recipe: Path, key: str, nearest: str) -> None:
    wrong = key if key != "optimiser.lr" else "optimiser"
    expected = f"unknown key {wrong!r}; did you mean {nearest!r}?"
    assert refusal(recipe, f"{key}=1") == f"override '{key}=1': {expected}"
    section, _, leaf = key.rpartition(".")
    text = f"{section}:\n  {leaf}: 1\n" if section else f"{leaf}: 1\n"
    Path("wrong.yaml").write_text(text)
    assert refusal("wrong.yaml") == f"wrong.yaml: {expected}"
    Path("above.yaml").write_text("base: [r.yaml, wrong.yaml]\n")
    assert refusal("above.yaml") == f"wrong.yaml: {expected}"


def test_unknown_key_with_nothing_like_it_lists_what_there_is(recipe: Path) -> None:
    assert refusal(recipe, "run.zzz=1").endswith(
        "unknown key 'run.zzz'; the keys of 'run' are folder, continue_from, save_interval, keep_checkpoints, "
        "async_save, on_corrupt_checkpoint, log_rollouts"
    )
    assert "the keys at the top are seed, run, student" in refusal(recipe, "zzzzz.q=1")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.iterations=abc", "train.iterations is 'abc'; it must be a whole number"),
        ("train.iterations=2.5", "train.iterations is 2.5; it must be a whole number"),
        ("train.iterations=0", "train.iterations is 0; it must be at least 1"),
        ("seed=true", "seed is true; it must be a whole number"),
        ("seed=-1", "seed is -1; it must be at least 0"),
        ("optimizer.lr=0", "optimizer.lr is 0; it must be greater than 0"),
        ("optimizer.lr=.inf", "optimizer.lr is inf; it must be a finite number"),
        ("optimizer.lr=", "optimizer.lr is null; it must be a number"),
        ("optimizer.min_lr_ratio=1.5", "optimizer.min_lr_ratio is 1.5; it must be at most 1"),
        ("optimizer.schedule=cos", "optimizer.schedule is 'cos'; allowed: 'cosine', 'linear' or 'constant'"),
        ("student.precision=fp16", "student.precision is 'fp16'; allowed: 'fp32' or 'bf16'"),
        ("student.sequence_parallel=1", "student.sequence_parallel is 1; it must be true or false"),
        ("data.suffix=7", "data.suffix is 7; it must be a text (in quotes where it looks like a number)"),
        ("evaluation.benchmarks=countdown", "evaluation.benchmarks is 'countdown'; it must be a list such as [a, b]"),
        ("rollout.stop_token_ids=[1,x]", "rollout.stop_token_ids is 'x'; it must be a whole number"),
    ],
)
def test_wrong_value_is_converted_or_said_unclearly(recipe: Path, override: str, said: str) -> None:
    assert refusal(recipe, override) == f"override {override!r}: {said}"


def test_wrong_value_in_a_file_is_blamed_on_another_one(recipe: Path) -> None:
    Path("low.yaml").write_text("optimizer: {lr: fast}\nseed: {a: 1}\n")
    Path("top.yaml").write_text("base: [r.yaml, low.yaml]\nseed: 1\n")
    assert refusal("top.yaml") == "low.yaml: optimizer.lr is 'fast'; it must be a number"
    assert refusal("top.yaml", "optimizer.lr=x").startswith("override 'optimizer.lr=x': optimizer.lr is 'x'")
    assert refusal("low.yaml", "seed=1", "optimizer.lr=1").startswith("low.yaml: missing key 'run.folder' (and 3 more)")


@pytest.mark.parametrize("key", ["temperature", "top_p"])
def test_rollouts_at_another_temperature_change_the_objective(recipe: Path, key: str) -> None:
    assert "it would be another objective" in refusal(recipe, f"rollout.{key}=0.9")
    assert getattr(load_recipe(recipe, [f"evaluation.{key}=0.9"]).evaluation, key) == 0.9


def test_keys_that_contradict_each_other_start_a_run(recipe: Path) -> None:
    said = refusal(recipe, "train.mini_batch=64", "train.prompts_per_iteration=32")
    assert (
        said
        == "r.yaml: train.mini_batch is 64, more than train.prompts_per_iteration (32): no update would ever be full"
    )
    assert "needs student.tensor_parallel of 2 or more" in refusal(recipe, "student.sequence_parallel=true")
    assert load_recipe(
        recipe, ["student.sequence_parallel=true", "student.tensor_parallel=2"]
    ).student.sequence_parallel


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["servers.count=2"], "servers differs from its default, which needs rollout.engine=sglang"),
        (["weight_sync.transport=disk"], "weight_sync differs from its default, which needs rollout.engine=sglang"),
        (
            ["rollout.max_staleness=1"],
            "rollout.max_staleness differs from its default, which needs rollout.engine=sglang",
        ),
        ([SGLANG, "servers.urls=[http://a:1]", "servers.router=http://b:1"], "a router knows its servers"),
        ([SGLANG, "servers.api_key_file=key"], "for servers that run already; those started here get a key"),
        ([SGLANG, "servers.placement=colocated"], "servers.placement=colocated needs weight_sync.transport=tensor"),
        ([SGLANG, *COLOCATED, "servers.urls=[http://a:1]"], "for servers that the trainer starts: no URLs"),
        ([SGLANG, *COLOCATED, "rollout.max_staleness=1"], "colocated servers generate while the trainer waits"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_servers_that_nobody_would_use_are_started(recipe: Path, overrides: list[str], said: str) -> None:
    assert said in refusal(recipe, *overrides)


def test_a_layout_that_cannot_work_starts_its_ranks(recipe: Path) -> None:
    assert "which needs student.pipeline_parallel of 2 or more" in refusal(recipe, "student.virtual_pipeline=2")
    said = refusal(recipe, "student.expert_parallel=4", "student.data_parallel=2")
    assert "is 4, which does not divide the 2 ranks that student.data_parallel=2 makes" in said
    load_recipe(recipe, ["student.expert_parallel=4", "student.data_parallel=4"])


def test_overlap_without_a_distributed_optimizer_reaches_the_ranks(recipe: Path) -> None:
    said = refusal(recipe, "optimizer.overlap=true")
    assert "optimizer.overlap is true, which needs optimizer.distributed to be true" in said
    assert load_recipe(recipe, ["optimizer.overlap=true", "optimizer.distributed=true"]).optimizer.overlap


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("run:\n  folder: [a\n", "r.yaml:3: no valid YAML: "),
        ("a: b: c\n", "r.yaml:1: no valid YAML: "),
        ("seed: 1\n\nseed: 2\n", "r.yaml:3: no valid YAML: found duplicate key seed"),
        ("run:\n\tfolder: x\n", "r.yaml:2: no valid YAML: "),
        ("- a\n- b\n", "r.yaml: it must be a mapping of sections (run:, student:, ...), but it is a list"),
        ("hello\n", "r.yaml: it must be a mapping of sections (run:, student:, ...), but it is a lone value"),
        ("# nothing\n", "r.yaml: it must be a mapping of sections (run:, student:, ...), but it is empty"),
        ("student: qwen\n", "r.yaml: 'student' is a section (keys: model, "),
        ("seed: ${nope.key}\n", "r.yaml: seed: Interpolation key 'nope.key' not found"),
        ("seed: ${\n", "r.yaml: "),
        ("1: 2\n", "r.yaml: unknown key '1'"),
    ],
)
def test_a_file_that_is_no_recipe_ends_in_a_traceback(recipe: Path, text: str, said: str) -> None:
    recipe.write_text(text)
    assert refusal(recipe).startswith(said)


def test_a_file_that_cannot_be_read_ends_in_a_traceback(recipe: Path) -> None:
    assert refusal("rr.yaml") == "rr.yaml: the recipe does not exist; did you mean 'r.yaml'?"
    assert refusal("far/off.yaml") == "far/off.yaml: the recipe does not exist"
    Path("folder").mkdir()
    assert refusal("folder") == "folder: cannot be read: Is a directory"
    recipe.write_bytes(b"\xff\xfe\x00")
    assert refusal(recipe) == "r.yaml: no YAML: it is not UTF-8 text"


@pytest.mark.parametrize("override", ["seed", "=3", "seed:3", ""])
def test_an_override_without_a_value_is_swallowed(recipe: Path, override: str) -> None:
    assert refusal(recipe, override) == f"override {override!r}: it must have the form section.key=value"


def test_an_override_that_is_no_yaml_ends_in_a_traceback(recipe: Path) -> None:
    assert refusal(recipe, "data.suffix=a: b").startswith("override 'data.suffix=a: b': no valid YAML")
    assert refusal(recipe, "seed.x=1").endswith("it must be a whole number")
    assert refusal(recipe, "student=x").startswith("override 'student=x': 'student' is a section")


def test_a_key_is_taken_from_another_one(recipe: Path) -> None:
    assert load_recipe(recipe, ["reporting.wandb_name=${run.folder}-${seed}"]).reporting.wandb_name == "runs/x-0"


def test_relative_paths_depend_on_the_working_directory(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("recipes/student", "recipes/_base/teacher", "here", "countdown", "recipes/countdown", "else"):
        Path(folder).mkdir(parents=True)
    for file in ("recipes/test.jsonl", "train.jsonl"):
        Path(file).write_text("{}")
    root = Path.cwd()
    Path("recipes/_base/b.yaml").write_text("teacher: {model: teacher}\n")
    Path("recipes/r.yaml").write_text(
        "base: [../r.yaml, _base/b.yaml]\nstudent: {model: ./student}\n"
        "evaluation: {benchmarks: [test.jsonl, countdown]}\n"
    )
    loaded = load_recipe("recipes/r.yaml", ["data.source=train.jsonl"])
    assert loaded.student.model == str(root / "recipes/student")
    assert loaded.teacher.model == str(root / "recipes/_base/teacher")
    assert loaded.data.source == str(root / "train.jsonl")
    assert loaded.evaluation.benchmarks == [str(root / "recipes/test.jsonl"), "countdown"]
    assert loaded.run.folder == "runs/x"
    assert load_recipe("recipes/r.yaml", ["student.model=here"]).student.model == str(root / "here")
    assert load_recipe("recipes/r.yaml", ["data.source=countdown"]).data.source == "countdown"
    assert load_recipe("recipes/r.yaml", ["student.model=Qwen/Qwen3-0.6B"]).student.model == "Qwen/Qwen3-0.6B"
    monkeypatch.chdir("else")
    assert load_recipe("../recipes/r.yaml").student.model == str(root / "recipes/student")


def test_a_loaded_recipe_is_changed_by_accident(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    with pytest.raises(ValidationError):
        loaded.seed = 5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        loaded.train.iterations = 5  # type: ignore[misc]


TEXTS = st.text(st.characters(exclude_categories=["C"]), max_size=12) | st.sampled_from(
    [
        "1e5",
        "yes",
        "null",
        "~",
        "${a.b}",
        "\\${x}",
        "\\\\${x}",
        "${",
        "a: b",
        "# c",
        "x\\",
        "\\boxed{}. $x$ $",
        " x ",
        "a\nb",
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=TEXTS,
    name=st.none() | TEXTS,
    lr=st.floats(1e-30, 1e3),
    stop_ids=st.lists(st.integers(0, 10**6), max_size=3),
    benchmarks=st.lists(TEXTS.filter(bool), max_size=3),
    problems=st.none() | st.integers(1, 10**9),
)
def test_a_dumped_recipe_loads_as_another_one(
    recipe: Path,
    suffix: str,
    name: str | None,
    lr: float,
    stop_ids: list[int],
    benchmarks: list[str],
    problems: int | None,
) -> None:
    first = Recipe.model_validate(
        {
            **LEAST,
            "data": {"suffix": suffix},
            "reporting": {"wandb_name": name},
            "optimizer": {"lr": lr},
            "rollout": {"stop_token_ids": stop_ids},
            "evaluation": {"benchmarks": benchmarks, "problems": problems},
            "objective": {"preset": "opd"},
        }
    )
    Path("dumped.yaml").write_text(dump_recipe(first), encoding="utf-8")
    assert load_recipe("dumped.yaml") == first


def test_differences_are_not_seen_on_resume(recipe: Path) -> None:
    a, b = load_recipe(recipe), load_recipe(recipe, ["evaluation.benchmarks=[x]", "optimizer.lr=1e-5"])
    assert recipe_differences(a, a) == []
    assert recipe_differences(a, b) == [("optimizer.lr", 3e-6, 1e-5), ("evaluation.benchmarks", [], ["x"])]


def test_one_setting_is_read(recipe: Path) -> None:
    assert recipe_value(load_recipe(recipe), "run.folder") == "runs/x"
    with pytest.raises(RecipeError, match=r"did you mean 'run\.folder'"):
        recipe_value(load_recipe(recipe), "run.foldr")


@pytest.mark.parametrize("name", ["opd", "eopd"])
def test_objective_is_not_the_preset(recipe: Path, name: str) -> None:
    from eaopd_megatron.objective import Objective

    assert load_recipe(recipe, [f"objective.preset={name}"]).objective.build_objective() == Objective.preset(name)


def test_objective_fields_do_not_reach_it(recipe: Path) -> None:
    built = load_recipe(recipe, ["objective.threshold=0.5", "objective.top_k=4"]).objective.build_objective()
    assert (built.threshold, built.top_k, built.gate) == (0.5, 4, "hard")
    assert load_recipe(recipe, ["objective.clip=.inf"]).objective.build_objective().clip == float("inf")


@pytest.mark.parametrize(
    "override", ["objective.preset=epd", "objective.gate=maybe", "objective.top_k=0", "objective.clip=-1.0"]
)
def test_objective_fault_is_found_when_training_starts(recipe: Path, override: str) -> None:
    said = refusal(recipe, override)
    assert said.startswith(f"override {override!r}: objective: ")


def test_a_teacher_that_cannot_serve_the_objective_is_found_when_training_starts(recipe: Path) -> None:
    said = refusal(recipe, "objective.forward_kl=exact", "teacher.signal=topk")
    assert said.startswith("override 'teacher.signal=topk': objective and teacher.signal do not fit: ")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.name)
def test_a_recipe_in_the_repository_does_not_load(path: Path) -> None:
    if path.parent.name == "_base":
        assert any(path.name in other.read_text() for other in (ROOT / "recipes").rglob("*.yaml") if other != path)
        return
    text = path.read_text()
    assert len(text.splitlines()) <= 60, "a recipe is one screen"
    folder = os.path.relpath(load_recipe(path).run.folder)
    assert folder.startswith("runs")
