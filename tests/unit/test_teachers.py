"""A recipe's teachers: what is refused before a model is built."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import load_recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.megatron.architecture import transformer_config
from eaopd_megatron.megatron.layout import Layout
from eaopd_megatron.teacher.build import open_folders

COUNTDOWN = Path(__file__).parents[2] / "recipes/countdown"


@pytest.mark.parametrize(
    ("override", "key"),
    [("teacher.precision=fp8", "teacher.precision"), ("teachers.math.precision=fp8", "teachers.math.precision")],
)
def test_fp8_without_transformer_engine_is_no_traceback_of_megatron(override: str, key: str) -> None:
    recipe = load_recipe(COUNTDOWN / "eopd.yaml", [override])
    with pytest.raises(UserError, match=f"^{key}=fp8 needs CUDA and Transformer Engine"):
        open_folders(recipe, HfFolder.open(str(COUNTDOWN / "student"), "student.model"))


def test_megatron_knows_the_settings_of_fp8() -> None:
    config = transformer_config(Qwen3Config(architectures=["Qwen3ForCausalLM"]), Layout(), torch.bfloat16, fp8=True)
    assert config.fp8 and config.fp8_param
    assert config.first_last_layers_bf16 is False  # a plan counts one byte a weight
