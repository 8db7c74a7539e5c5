"""What is wrong with data, benchmarks and settings is said before a model is loaded, and names the record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eaopd_megatron.config import load_recipe
from eaopd_megatron.data.prompts import PromptBuilder
from eaopd_megatron.errors import UserError
from eaopd_megatron.training.run_folder import check_inputs

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes/countdown/eopd.yaml")
MESSAGES = {"messages": [{"role": "user", "content": "2 + 2"}], "answer": "4"}


def check(*overrides: str) -> None:
    check_inputs(load_recipe(RECIPE, overrides), hub=False)


def data_file(folder: Path, *records: object) -> str:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return f"data.source={path}"


def test_the_recipe_itself_is_fine() -> None:
    check()
    check("data.source=hub:nobody/nothing", "evaluation.benchmarks=[math500]")  # read by the ranks


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.source=nothing.jsonl", "nothing.jsonl: no such data file"),
        ("data.source=nothing", "data source 'nothing': expected countdown, a .jsonl"),
        ("data.prompt_field=question", "countdown, record 1: no text under 'question'; its keys are "),
        ("evaluation.benchmarks=[maths]", "there is no benchmark 'maths'"),
        ("data.decontaminate=[maths]", "there is no benchmark 'maths'"),
        ("train.prompts_per_iteration=10000000", "train.prompts_per_iteration=10000000 is more than the "),
    ],
)
def test_a_wrong_setting_is_found_after_the_models_are_loaded(override: str, line: str) -> None:
    with pytest.raises(UserError) as refused:
        check(override)
    assert str(refused.value).startswith(line)


def test_wandb_is_looked_for_after_the_models_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="the package wandb is missing"):
        check("reporting.wandb=true")


def test_train_starts_ranks_for_a_wrong_data_file(tmp_path: Path) -> None:
    """One line, no rank's log."""
    command = [sys.executable, "-m", "eaopd_megatron", "train", RECIPE, f"run.folder={tmp_path}/run"]
    done = subprocess.run([*command, "data.source=no.jsonl"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "error: no.jsonl: no such data file\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("record", "field", "line"),
    [
        ({"question": "a", "gold": 1}, "problem", "no text under 'problem'; its keys are question, gold"),
        ({"problem": ""}, "problem", "no text under 'problem'; its keys are problem"),
        ({"problem": None}, "problem", "no text under 'problem'"),
        ({"problem": ["a"]}, "problem", "no text under 'problem'; its keys are problem"),
        (MESSAGES, "problem", "no text under 'problem' ('messages' is a list of messages, which is not read"),
        (MESSAGES, "messages", "no text under 'messages' ('messages' is a list of messages, which is not read"),
        ({"prompt": MESSAGES["messages"]}, "problem", "('prompt' is a list of messages, which is not read: a prompt"),
        ({"problem": "a\ud835b"}, "problem", "'problem' holds the lone surrogate \\ud835, which is no character"),
    ],
)
@pytest.mark.parametrize("decontaminate", ["[]", "[countdown]"])
def test_a_record_without_a_prompt_is_not_named(
    tmp_path: Path, record: dict[str, object], field: str, line: str, decontaminate: str
) -> None:
    source = data_file(tmp_path, {"problem": "1 + 1", field: "1 + 1"}, record)
    with pytest.raises(UserError) as refused:
        check(source, f"data.prompt_field={field}", f"data.decontaminate={decontaminate}", "data.last_batch=keep")
    assert "d.jsonl, record 2: " in str(refused.value) and line in str(refused.value)


class NoTokens:
    def encode(self, text: str, **options: object) -> list[int]:
        return [ord(letter) for letter in text.strip()]


def test_a_prompt_of_no_tokens_is_trained() -> None:
    builder = PromptBuilder(NoTokens(), template="raw", suffix="", field="problem", max_tokens=4)
    with pytest.raises(UserError, match=r"x.jsonl, record 2: the tokenizer gives no token for '  '"):
        builder.build([{"problem": "a"}, {"problem": "  "}], "x.jsonl")


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(RECIPE, ["run.folder=~/run", "teacher.api_key_file=~/key", "run.continue_from=~/other"])
    assert recipe.run.folder == f"{tmp_path}/run" and recipe.teacher.api_key_file == f"{tmp_path}/key"
    assert recipe.run.continue_from == f"{tmp_path}/other"
