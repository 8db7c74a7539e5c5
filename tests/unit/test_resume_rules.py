"""What may change when a run is resumed: the rule beside each key, and what the run's folder says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eaopd_megatron.checkpoint.convert import import_folder, single_process_group
from eaopd_megatron.config import dump_recipe, load_recipe
from eaopd_megatron.config.aliases import at_resume, value_keys
from eaopd_megatron.config.model_schema import AtResume
from eaopd_megatron.errors import UserError
from eaopd_megatron.training.run_folder import RECIPE_FILE, RunFolder, export_start, finished_message, started_from
from tests import tiny_models

RECIPE = Path(__file__).resolve().parents[2] / "recipes/countdown/eopd.yaml"
OTHER = {  # values that differ from the recipe's
    "optimizer.lr": "1e-9",
    "rollout.max_response_tokens": "77",
    "rollout.stop_token_ids": "[5]",
    "teacher.terminal_map": "none",
    "objective.top_k": "3",
    "train.micro_batch_tokens": "999",
    "train.iterations": "100000",
    "seed": "9",
    "train.mini_batch": "1",
    "data.suffix": "now",
    "student.precision": "bf16",
}
NEVER = ("seed", "train.mini_batch", "data.suffix", "student.precision")


def trained(folder: Path, *overrides: str, iterations: int = 4) -> RunFolder:
    run = RunFolder(folder)
    recipe = load_recipe(RECIPE, [f"run.folder={folder}", *overrides])
    checkpoint = run.checkpoints / f"step_{iterations:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / RECIPE_FILE).write_text(dump_recipe(recipe))
    run.write_config(recipe)
    return run


@pytest.mark.parametrize("key", OTHER)
def test_what_a_resumed_run_may_change(tmp_path: Path, key: str) -> None:
    run = trained(tmp_path / "run")
    now = load_recipe(RECIPE, [f"run.folder={run.path}", f"{key}={OTHER[key]}"])
    if key not in NEVER:
        assert at_resume(key) in (AtResume.FREE, AtResume.LOGGED)
        run.check_recipe(now)
        return
    with pytest.raises(UserError) as refusal:
        run.check_recipe(now)
    line = str(refusal.value)
    assert f"holds a run with {key}=" in line and f"this recipe has {OTHER[key]}" in line
    assert f"run.folder=NEW --continue-from {run.path}" in line


@pytest.mark.parametrize("key", OTHER)
def test_before_the_first_checkpoint_anything_may_change(tmp_path: Path, key: str) -> None:
    run = trained(tmp_path / "run")
    (run.checkpoints / "step_000004").rename(run.checkpoints / "step_000004.incomplete")
    run.check_recipe(load_recipe(RECIPE, [f"run.folder={run.path}", f"{key}={OTHER[key]}"]))


def test_the_checkpoints_own_recipe_counts(tmp_path: Path) -> None:
    """A resume that changed a key and was killed before its first checkpoint has changed nothing yet."""
    run = trained(tmp_path / "run", "seed=1")
    run.write_config(load_recipe(RECIPE, ["seed=2"]))
    run.check_recipe(load_recipe(RECIPE, ["seed=1"]))


def test_a_run_does_not_shrink(tmp_path: Path) -> None:
    run = trained(tmp_path / "run")
    with pytest.raises(UserError, match=r"a run of 4 iterations, more than train\.iterations=3: raise it"):
        run.check_recipe(load_recipe(RECIPE, ["train.iterations=3"]))


def test_a_finished_run_goes_on_only_with_more_iterations(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "train.iterations=4")
    run.finished_file.write_text(json.dumps({"iterations": 4}))
    of_run = [f"run.folder={run.path}"]
    assert finished_message(load_recipe(RECIPE, [*of_run, "train.iterations=4"]))
    assert finished_message(load_recipe(RECIPE, [*of_run, "train.iterations=5"])) is None


def test_a_run_begins_with_the_student_of_another(tmp_path: Path) -> None:
    source = trained(tmp_path / "source")
    source.finished_file.write_text("{}")
    source.student.mkdir()
    (source.student / "config.json").write_text("{}")
    new = load_recipe(RECIPE, [f"run.folder={tmp_path / 'new'}", f"run.continue_from={source.path}"])
    said: list[str] = []
    export_start(new, said.append)
    export_start(new, said.append)
    assert len(said) == 1
    start = Path(started_from(new).student.model)
    assert start == tmp_path / "new" / "start" and (start / "config.json").read_text() == "{}"
    for name in ("nothing", "new"):
        lost = load_recipe(RECIPE, [f"run.folder={tmp_path / 'lost'}", f"run.continue_from={tmp_path / name}"])
        with pytest.raises(UserError, match=r"run\.continue_from: .* is no run with a checkpoint"):
            export_start(lost, said.append)


def test_a_launcher_holds_the_memory_of_the_model_that_it_exported(tmp_path: Path) -> None:
    """It lives as long as its ranks, of which the first has the same GPU."""
    hf, checkpoint, new = (tmp_path / name for name in ("hf", "checkpoint", "new"))
    tiny_models.build("qwen3_untied").save_pretrained(hf)
    with single_process_group() as parallel:
        import_folder(str(hf), checkpoint, parallel, verify=False, log=lambda line: None)
    program = f"""
import sys
from eaopd_megatron.config import load_recipe
from eaopd_megatron.training.run_folder import export_start
export_start(load_recipe({str(RECIPE)!r}, ["run.folder={new}", "run.continue_from={checkpoint}"]), print)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    lines = done.stdout.splitlines()
    assert lines[-2:] == [f"the student of {checkpoint} is in {new}/start: this run begins with it", "False"]
    assert (new / "start/model.safetensors").is_file()


def test_every_key_has_a_rule() -> None:
    rules = {key: at_resume(key) for key in value_keys()}
    assert rules["run.folder"] is rules["servers.urls"] is rules["teacher.urls"] is AtResume.FREE
    assert at_resume("teachers.math.urls") is AtResume.FREE and at_resume("teachers.math.model") is AtResume.NEVER
    assert {key for key, rule in rules.items() if rule is AtResume.NEVER} >= set(NEVER)
