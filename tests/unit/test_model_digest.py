"""A run knows its models by what they are, not by where they lie."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import Recipe, load_recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.models.digest import local_folder, model_digest
from eaopd_megatron.models.supported import built_in_shape, find_model, local_config
from eaopd_megatron.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "recipes/countdown/student"


def recipe(tmp_path: Path, student: Path) -> Recipe:
    overrides = [f"student.model={student}", f"run.folder={tmp_path}/run"]
    return load_recipe(str(ROOT / "recipes/countdown/eopd.yaml"), overrides)


def begin(tmp_path: Path, *, trained: bool = True) -> RunFolder:
    """A run of the model in `tmp_path/model`, as `Trainer` records it."""
    shutil.copytree(MODEL, tmp_path / "model")
    folder, own = RunFolder(tmp_path / "run"), recipe(tmp_path, tmp_path / "model")
    folder.path.mkdir()
    record = folder.check_models(
        {
            "student.model": (own.student.model, tmp_path / "model"),
            "teacher.model": (own.teacher.model, MODEL.with_name("teacher")),
        }
    )
    folder.write_config(own)
    folder.write_models(record)
    if trained:
        (folder.checkpoints / "step_000050").mkdir(parents=True)
    return folder


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight * 1.001 for name, weight in weights.items()}, folder / "model.safetensors")


def test_a_renamed_model_is_refused(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    folder.check_recipe(recipe(tmp_path, tmp_path / "elsewhere"))


@pytest.mark.parametrize("what", ["weights", "config"])
@pytest.mark.parametrize("moved", [False, True])
def test_other_weights_are_accepted_at_a_resume(tmp_path: Path, what: str, moved: bool) -> None:
    folder, model = begin(tmp_path), tmp_path / "model"
    if moved:
        model = model.rename(tmp_path / "elsewhere")
    if what == "weights":
        change_weights(model)
    else:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(UserError) as refused:
        folder.check_recipe(recipe(tmp_path, model))
    line = str(refused.value)
    assert line.startswith(f"{folder.path} holds a run whose student.model had other weights or another config.json")
    assert str(tmp_path / "model") in line
    assert "\n" not in line


def test_a_run_that_trained_nothing_is_bound_to_its_models(tmp_path: Path) -> None:
    folder = begin(tmp_path, trained=False)
    change_weights(tmp_path / "model")
    folder.check_recipe(recipe(tmp_path, tmp_path / "model"))


def test_a_run_of_an_earlier_version_takes_another_path(tmp_path: Path) -> None:
    """It knows only the path."""
    folder = begin(tmp_path)
    folder.models.unlink()
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"holds a run with student\.model="):
        folder.check_recipe(recipe(tmp_path, tmp_path / "elsewhere"))


def test_the_digest_reads_torch_or_is_another_than_the_folders() -> None:
    program = (
        "import sys; from pathlib import Path; from eaopd_megatron.models.digest import model_digest; "
        f"print(model_digest(Path({str(MODEL)!r})), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == [HfFolder.open(str(MODEL)).fingerprint, "False"]


def test_a_tied_copy_of_the_embedding_changes_the_digest(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "copy")
    weights = load_file(MODEL / "model.safetensors")
    assert json.loads((MODEL / "config.json").read_text())["tie_word_embeddings"]
    save_file(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        tmp_path / "copy/model.safetensors",
    )
    assert model_digest(tmp_path / "copy") == model_digest(MODEL)


def test_a_hub_model_cannot_be_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the hub's cache two commits of one model lie side by side."""
    cache = tmp_path / "hub/models--own--tiny"
    for number, commit in enumerate(("a" * 40, "b" * 40)):
        shutil.copytree(MODEL, cache / "snapshots" / commit)
        config = json.loads((MODEL / "config.json").read_text())
        (cache / "snapshots" / commit / "config.json").write_text(
            json.dumps(config | {"max_position_embeddings": number})
        )
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    pinned = "own/tiny@" + "a" * 40
    assert local_folder(pinned) == cache / "snapshots" / ("a" * 40)
    assert local_folder("own/tiny") == cache / "snapshots" / ("b" * 40)
    assert (local_config(pinned, "student.model") or {})["max_position_embeddings"] == 0
    assert find_model(pinned, "student.model").shape.positions == 0
    asked: list[tuple[str, str | None]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(cache / "snapshots" / (revision or "b" * 40))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert HfFolder.open(pinned).path == cache / "snapshots" / ("a" * 40)
    assert HfFolder.open("own/tiny").path == cache / "snapshots" / ("b" * 40)
    assert asked == [("own/tiny", "a" * 40), ("own/tiny", None)]
    assert built_in_shape("Qwen/Qwen3-8B@main") == built_in_shape("Qwen/Qwen3-8B")


@pytest.mark.parametrize("model", ["owner/a--b", "owner/a..b", "owner/name-", "-owner/name", "owner/name.git"])
def test_a_name_that_the_hub_refuses_ends_in_a_traceback(model: str) -> None:
    assert local_folder(model) is None
    with pytest.raises(UserError, match=r"is no folder with a config\.json and no hub id owner/name"):
        find_model(model, "student.model")
