"""A recipe's teachers: what is refused before a model is built."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import Recipe, load_recipe
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.layers import FP8_SETTINGS
from eaopd_megatron.models.transformer_config import transformer_config
from eaopd_megatron.teacher.build import TeacherContext, build_teachers, open_teacher_folders

COUNTDOWN = Path(__file__).parents[2] / "recipes/countdown"


@pytest.mark.parametrize(
    ("override", "key"),
    [("teacher.precision=fp8", "teacher.precision"), ("teachers.math.precision=fp8", "teachers.math.precision")],
)
def test_fp8_without_transformer_engine_is_no_traceback_of_megatron(override: str, key: str) -> None:
    recipe = load_recipe(COUNTDOWN / "eopd.yaml", [override])
    with pytest.raises(UserError, match=f"^{key}=fp8 needs CUDA and Transformer Engine"):
        open_teacher_folders(recipe, HfFolder.open(str(COUNTDOWN / "student"), "student.model"))


def test_top_k_over_more_tokens_than_another_teacher_has_is_refused(tmp_path: Path) -> None:
    """A service knows only its own teacher: an id that another one lacks would stop the run at some token."""
    recipe = load_recipe(
        COUNTDOWN / "eopd.yaml", ["teachers.math.placement=separate", "teachers.code.placement=separate"]
    )
    student = HfFolder.open(str(COUNTDOWN / "student"), "student.model")
    parallel: Any = SimpleNamespace(world_size=1, is_main=True)
    context = TeacherContext(
        recipe,
        parallel,
        student,
        open_teacher_folders(recipe, student),
        {},
        100,
        tmp_path,
        lambda: 0,
        lambda text: None,
    )
    with pytest.raises(UserError, match=r"^teachers\.math\.signal=topk is computed over 112 tokens, .* has 100: "):
        build_teachers(context)


def context_of(recipe: Recipe, tmp_path: Path, *, ranks: int = 1, end: int | None = None) -> TeacherContext:
    """end: the teacher's end token, if it is not the student's."""
    parallel: Any = SimpleNamespace(world_size=ranks, is_main=True)
    student = HfFolder.open(str(COUNTDOWN / "student"), "student.model")
    folders = open_teacher_folders(recipe, student)
    for folder in folders.values():
        if end is not None:
            folder.eos_ids = [end]
    return TeacherContext(recipe, parallel, student, folders, {}, 112, tmp_path, lambda: 0, lambda text: None)


@pytest.mark.parametrize("preset", ["eopd_exact", "rkl", "fkl"])
def test_a_term_over_all_tokens_punishes_the_end_whose_label_alone_is_mapped(preset: str, tmp_path: Path) -> None:
    """Meanwhile the looked-up log-prob, which the warning and the doctor use, looks fine."""
    options = [f"objective.preset={preset}", "teacher.terminal_map=label", "teacher.placement=separate"]
    with pytest.raises(UserError, match=r"^teacher\.terminal_map=label .* set teacher\.terminal_map=swap$"):
        build_teachers(context_of(load_recipe(COUNTDOWN / "eopd.yaml", options), tmp_path, end=111))


def test_ranks_of_another_host_wait_for_replicas_at_their_own_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eaopd_megatron.teacher.build.num_ranks_on_rank0_host", lambda parallel: 4)
    recipe = load_recipe(COUNTDOWN / "eopd.yaml", ["teacher.placement=separate"])
    with pytest.raises(UserError, match=r"where 4 of the 8 ranks are, .* and give teacher\.urls$"):
        build_teachers(context_of(recipe, tmp_path, ranks=8))


def test_megatron_knows_the_settings_of_fp8() -> None:
    config = transformer_config(
        Qwen3Config(architectures=["Qwen3ForCausalLM"]), ParallelLayout(), torch.bfloat16, layer_settings=FP8_SETTINGS
    )
    assert config.fp8 and config.fp8_param
    assert config.first_last_layers_bf16 is False  # a plan counts one byte a weight
