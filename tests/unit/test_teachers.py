"""A recipe's teachers: what is refused before a model is built."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import load_recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.architecture import transformer_config
from eaopd_megatron.megatron.layout import Layout
from eaopd_megatron.teacher.build import Surroundings, build_teachers, open_folders

COUNTDOWN = Path(__file__).parents[2] / "recipes/countdown"


@pytest.mark.parametrize(
    ("override", "key"),
    [("teacher.precision=fp8", "teacher.precision"), ("teachers.math.precision=fp8", "teachers.math.precision")],
)
def test_fp8_without_transformer_engine_is_no_traceback_of_megatron(override: str, key: str) -> None:
    recipe = load_recipe(COUNTDOWN / "eopd.yaml", [override])
    with pytest.raises(UserError, match=f"^{key}=fp8 needs CUDA and Transformer Engine"):
        open_folders(recipe, HfFolder.open(str(COUNTDOWN / "student"), "student.model"))


def test_top_k_over_more_tokens_than_another_teacher_has_is_refused(tmp_path: Path) -> None:
    """A service knows of one teacher: an id that another one lacks would stop the run at some token."""
    recipe = load_recipe(
        COUNTDOWN / "eopd.yaml", ["teachers.math.placement=separate", "teachers.code.placement=separate"]
    )
    student = HfFolder.open(str(COUNTDOWN / "student"), "student.model")
    parallel: Any = SimpleNamespace(world_size=1, is_main=True)
    around = Surroundings(
        recipe, parallel, student, open_folders(recipe, student), {}, 100, tmp_path, lambda: 0, lambda text: None
    )
    with pytest.raises(UserError, match=r"^teachers\.math\.signal=topk is made of 112 tokens, .* has 100: "):
        build_teachers(around)


def test_megatron_knows_the_settings_of_fp8() -> None:
    config = transformer_config(Qwen3Config(architectures=["Qwen3ForCausalLM"]), Layout(), torch.bfloat16, fp8=True)
    assert config.fp8 and config.fp8_param
    assert config.first_last_layers_bf16 is False  # a plan counts one byte a weight
