"""A recipe's teachers: which keys contradict each other, what each of several inherits, and what a run may change."""

from __future__ import annotations

from pathlib import Path

import pytest

from eaopd_megatron.cli import main
from eaopd_megatron.config import dump_recipe, load_recipe, recipe_value
from eaopd_megatron.errors import RecipeError, UserError
from eaopd_megatron.training.run_folder import RunFolder
from tests.unit.test_config import recipe, refusal

__all__ = ["recipe"]  # the fixture

TWO = ("teachers.math.model=owner/math", "teachers.code.model=owner/code")
SEPARATE, SERVED = "placement=separate", "placement=served"


@pytest.mark.parametrize("section", ["teacher", "teachers.math"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["tensor_parallel=2"], "with {}.placement=colocated has the student's layout: no {}.tensor_parallel"),
        (["replicas=2"], "with {}.placement=colocated is on the student's ranks: no {}.urls, replicas"),
        (["urls=[http://a:1]"], "with {}.placement=colocated is on the student's ranks: no {}.urls, replicas"),
        ([SEPARATE, "offload=weights"], "with {}.placement=separate is not on the student's GPUs: no {}.offload"),
        ([SEPARATE, "signal=logits"], "with {}.placement=separate hands over topk or hidden: no {}.signal=logits"),
        ([SERVED, "signal=hidden"], "with {}.placement=served hands over topk: no {}.signal=hidden"),
        ([SERVED, "pipeline_parallel=2"], "with {}.placement=served has tensor_parallel alone: no pipeline_, expert_"),
        (["precision=fp8", "offload=weights"], "{}.offload=weights moves weights in fp32 or bf16, not those of {}."),
        (["precision=fp4"], "{}.precision is 'fp4'; allowed: 'fp32', 'bf16' or 'fp8'"),
        (["max_concurrent_requests=0"], "{}.max_concurrent_requests is 0; it must be at least 1"),
        (["offlaod=weights"], "unknown key '{}.offlaod'; did you mean '{}.offload'?"),
        (["zzz=1"], "unknown key '{}.zzz'; the keys of '{}' are model, placement, signal, precision, "),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_keys_of_a_teacher_that_contradict_each_other(
    recipe: Path, section: str, settings: list[str], said: str
) -> None:
    """The message names the teacher whose keys they are."""
    assert said.replace("{}", section) in refusal(recipe, *(f"{section}.{setting}" for setting in settings))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teachers=math"], "'teachers' maps names to sections with the keys of 'teacher'; it cannot be 'math'"),
        (["teachers.math=owner/math"], "'teachers.math' is a section (keys: model, "),
        (["teachers={a b: {signal: topk}}"], "a teacher is named 'a b'; a name has letters, digits, '-' and '_'"),
        (["teachers={1: {signal: topk}}"], "a teacher is named 1; a name has letters, digits, '-' and '_'"),
    ],
)
def test_what_names_no_teacher_is_refused(recipe: Path, overrides: list[str], said: str) -> None:
    assert said in refusal(recipe, *overrides)


def test_the_file_that_says_a_fault_for_all_teachers_is_named(recipe: Path) -> None:
    Path("low.yaml").write_text("teacher: {signal: topk}\nobjective: {forward_kl: exact}\n")
    Path("top.yaml").write_text("base: [r.yaml, low.yaml]\nteachers: {math: {precision: fp32}}\n")
    assert refusal("top.yaml").startswith("low.yaml: objective and teachers.math.signal do not fit: ")


def test_each_teacher_has_the_common_keys_that_it_does_not_say(recipe: Path) -> None:
    loaded = load_recipe(
        recipe, [*TWO, "teacher.precision=fp32", "teachers.code.precision=bf16", "teacher.signal=topk"]
    )
    math, code = loaded.named_teachers().values()
    assert (math.model, math.precision, math.signal) == ("owner/math", "fp32", "topk")
    assert (code.model, code.precision, code.signal) == ("owner/code", "bf16", "topk")
    assert list(loaded.named_teachers()) == ["math", "code"]
    assert list(load_recipe(recipe).named_teachers()) == [""]


def test_a_teacher_without_a_model_gets_another_ones(recipe: Path) -> None:
    """The section `teacher` may leave the model to those that have names."""
    text = "run: {folder: x}\nstudent: {model: a/b}\ntrain: {iterations: 3}\n"
    recipe.write_text(text + "teachers: {math: {model: owner/math}, code: {signal: topk}}\n")
    assert refusal(recipe) == "r.yaml: missing key 'teachers.code.model'"
    recipe.write_text(text + "teachers: {math: {model: owner/math}}\n")
    assert load_recipe(recipe).named_teachers()["math"].model == "owner/math"


def test_show_hides_the_teachers(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", str(recipe), *TWO, "teachers.math.offload=weights"])
    Path("shown.yaml").write_text(capsys.readouterr().out)
    loaded = load_recipe("shown.yaml")
    assert loaded == load_recipe(recipe, [*TWO, "teachers.math.offload=weights"])
    assert load_recipe_of(dump_recipe(loaded)) == loaded
    assert recipe_value(loaded, "teachers.math.offload") == "weights"
    with pytest.raises(RecipeError, match=r"did you mean 'teachers\.math\.offload'"):
        recipe_value(loaded, "teachers.math.offlod")


def load_recipe_of(text: str) -> object:
    Path("dumped.yaml").write_text(text)
    return load_recipe("dumped.yaml")


@pytest.mark.parametrize("section", ["teacher", "teachers.math"])
@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (["placement=separate", "tensor_parallel=2", "urls=[http://a:1]", "api_key_file=key"], None),
        (
            [
                "placement=separate",
                "replicas=2",
                "max_concurrent_requests=3",
                "startup_timeout_minutes=1.0",
                "unavailable_timeout_minutes=1.0",
            ],
            None,
        ),
        (["placement=served", "mem_fraction_static=0.5"], None),
        (["offload=weights", "listen=127.0.0.1:9"], None),
        (["model=owner/other"], "model"),
        (["signal=topk"], "signal"),
        (["precision=fp32"], "precision"),
        (["terminal_map=label"], None),  # with a line in the log
    ],
    ids=str,
)
def test_what_a_teacher_says_changes_within_a_run(
    recipe: Path, section: str, settings: list[str], refused: str | None
) -> None:
    """Where it is may change, and what never reaches the student."""
    common = TWO if section != "teacher" else ()
    run = RunFolder(Path("run"))
    (run.checkpoints / "step_000001").mkdir(parents=True)
    run.write_config(load_recipe(recipe, common))
    now = load_recipe(recipe, [*common, *(f"{section}.{setting}" for setting in settings)])
    if refused is None:
        run.check_recipe(now)
        return
    with pytest.raises(UserError, match=rf"run holds a run with {section}\.{refused}="):
        run.check_recipe(now)


def test_a_run_goes_on_with_other_teachers(recipe: Path) -> None:
    run = RunFolder(Path("run"))
    (run.checkpoints / "step_000001").mkdir(parents=True)
    run.write_config(load_recipe(recipe))
    with pytest.raises(UserError, match="holds a run whose teachers are one, without a name, this recipe's are math"):
        run.check_recipe(load_recipe(recipe, TWO))
