"""One rule for contexts that are longer than a model's positions; the ids that a plain prompt starts with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from eaopd_megatron.cli import main
from eaopd_megatron.config import load_recipe
from eaopd_megatron.data.prompts import PromptBuilder
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.supported import check_context, check_recipe_models, max_positions

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes/countdown/eopd.yaml")


def tokenizer() -> PreTrainedTokenizerFast:
    """One that puts its BOS before a text, as Llama's does."""
    words = {word: i for i, word in enumerate(["<s>", "?", "two", "and", "Question:", "Answer:"])}
    core = Tokenizer(WordLevel(words, unk_token="?"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    found = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="?")
    found.chat_template = "{{ bos_token }}{% for one in messages %}{{ one.content }}{% endfor %} Answer:"
    return found


@pytest.mark.parametrize(
    ("template", "expected"), [("raw", [0, 2, 3]), ("base", [0, 4, 2, 3, 5]), ("chat", [0, 2, 3, 5])]
)
def test_a_prompt_has_no_bos_or_two(template: str, expected: list[int]) -> None:
    own = tokenizer()
    builder = PromptBuilder(own, template=template, suffix="", field="problem", max_tokens=9)
    assert builder.token_ids("two and") == expected
    if template == "raw":
        assert builder.token_ids("two and") == own("two and").input_ids


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({}, 1000),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 4000),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 500}}, 1000),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 100}}, 1000),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 1000),
    ],
)
def test_a_scaled_context_is_counted_otherwise_than_by_servers(changes: dict[str, Any], positions: int) -> None:
    assert max_positions({"max_position_embeddings": 1000, **changes}) == positions
    assert max_positions(changes) is None


@pytest.fixture(params=["student", "teacher"])
def short(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[str]]:
    """A recipe with a model of 40 positions: its key, and the overrides."""
    shutil.copytree(ROOT / "recipes/countdown" / request.param, tmp_path / "short")
    path = tmp_path / "short/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 40}))
    return f"{request.param}.model", [f"{request.param}.model={tmp_path}/short", f"run.folder={tmp_path}/run"]


@pytest.mark.parametrize("engine", ["local", "sglang"])
def test_a_response_longer_than_the_positions_is_trained(
    short: tuple[str, list[str]], engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key, overrides = short
    changes = [*overrides, "rollout.max_response_tokens=40", f"rollout.engine={engine}"]
    with pytest.raises(UserError) as refused:
        check_recipe_models(load_recipe(RECIPE, changes))
    line = str(refused.value)
    assert line.startswith("rollout.max_response_tokens=40: a prompt and its response do not fit into the 40 positions")
    assert f"of {key} " in line
    for command in ("train", "plan", "doctor"):
        with pytest.raises(SystemExit) as stopped:
            main([command, RECIPE, *changes])
        assert stopped.value.code == 1
        assert line in capsys.readouterr().err


def test_a_plan_is_silent_about_prompts_that_are_too_long(
    short: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    key, overrides = short
    with pytest.raises(SystemExit) as stopped:
        main(["plan", RECIPE, *overrides, "data.max_prompt_tokens=30"])
    assert stopped.value.code == 0
    assert f"{key} has 40 positions: prompts of more than 24 tokens, which data" in capsys.readouterr().out


def test_the_longest_prompt_does_not_count() -> None:
    recipe = load_recipe(RECIPE, ["rollout.max_response_tokens=16"])
    check_context(recipe, {"student.model": 40, "teacher.model": None}, 24)
    with pytest.raises(UserError, match=r"the longest prompt of 25 tokens .* set data.max_prompt_tokens=24"):
        check_context(recipe, {"student.model": 128, "teacher.model": 40}, 25)
