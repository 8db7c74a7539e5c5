"""A checkpoint is whole or not there: killed at any file operation, on a full disk, damaged afterwards."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from eaopd_megatron.checkpoint import store
from eaopd_megatron.checkpoint.store import CheckpointStore, check_config_fingerprint, config_fingerprint
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError

ALONE = ParallelState(
    layout=ParallelLayout(),
    rank=0,
    world_size=1,
    tp_rank=0,
    tp_group=cast(Any, None),
    dp_rank=0,
    dp_size=1,
    dp_group=cast(Any, None),
    device=torch.device("cpu"),
)
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


@pytest.fixture(autouse=True)
def one_file_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are the bytes in the state, so that no ranks are needed."""

    def write(folder: Path, state: dict[str, Any], parallel: ParallelState, group: Any) -> None:
        (folder / "__0_0.distcp").write_bytes(state["weights"])

    monkeypatch.setattr(store, "stage_sharded", lambda state, parallel, stager: state)
    monkeypatch.setattr(store, "write_staged", write)


def save(folder: Path, step: int, keep: int = 2, weights: bytes | None = None, background: bool = False) -> Path:
    def companions(path: Path) -> None:
        (path / "hf").mkdir()
        (path / "hf" / "config.json").write_text("{}")

    sharded = {"weights": weights or bytes([step % 256] * 1000)}
    checkpoints = CheckpointStore(folder, keep, background=background)
    path = checkpoints.save(step, sharded, {"iteration": step}, companions, ALONE)
    checkpoints.wait()
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(point: int, folder: Path, step: int, weights: bytes, background: bool) -> bool:
    """Save in a process that gets SIGKILL before its file operation number `point`; False when it has fewer."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, _: Any) -> None:
            nonlocal count
            if event in CHANGES:
                count += 1
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            save(folder, step, weights=weights, background=background)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize(
    ("step", "background"),
    [
        pytest.param(3, False, id="a-new-step"),
        pytest.param(2, False, id="the-same-step-again"),
        pytest.param(3, True, id="in-the-background"),
    ],
)
def test_killed_at_any_file_operation_leaves_whole_checkpoints(tmp_path: Path, step: int, background: bool) -> None:
    template, folder = tmp_path / "template", tmp_path / "checkpoints"
    for number in (1, 2):
        save(template, number)
    new = b"new" * 500
    outcomes = set()
    for point in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        if not killed(point, folder, step, new, background):
            break
        checkpoints = CheckpointStore(folder, 2)
        for path in checkpoints.completed():
            checkpoints.verify(path)  # whatever can be seen is whole
        checkpoints.clean(ALONE)
        assert names(folder) == [path.name for path in checkpoints.completed()]
        latest = checkpoints.latest()
        assert latest is not None
        checkpoints.verify(latest)
        weights = (latest / "sharded" / "__0_0.distcp").read_bytes()
        assert weights in (bytes([2] * 1000), new)
        outcomes.add((latest.name, weights == new))
        again = save(folder, step, weights=new)
        checkpoints.verify(again)
        assert (again / "sharded" / "__0_0.distcp").read_bytes() == new
    assert point > 15, "the operations were not counted"
    assert outcomes == {("step_000002", False), (f"step_{step:06d}", True)}


def test_background_save_is_seen_only_when_it_is_complete(tmp_path: Path) -> None:
    writing, go = threading.Event(), threading.Event()

    def late(path: Path) -> None:
        writing.set()
        assert go.wait(30)

    checkpoints = CheckpointStore(tmp_path, 2, background=True)
    path = checkpoints.save(1, {"weights": b"1"}, {}, late, ALONE)
    assert writing.wait(30)
    assert checkpoints.completed() == []
    go.set()
    checkpoints.wait()
    assert checkpoints.latest_valid(ALONE) == path


def test_next_save_waits_for_the_one_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or two saves would write into one folder, and remove each other's."""
    order: list[str] = []
    go = threading.Event()

    def late(path: Path) -> None:
        assert go.wait(30)
        order.append("first is written")

    checkpoints = CheckpointStore(tmp_path, 2, background=True)
    checkpoints.save(1, {"weights": b"1"}, {}, late, ALONE)
    wait = checkpoints.wait

    def let_go_and_wait() -> None:
        go.set()
        wait()

    def prepare(state: dict[str, Any], parallel: ParallelState, stager: Any) -> dict[str, Any]:
        order.append("second begins")
        return state

    monkeypatch.setattr(checkpoints, "wait", let_go_and_wait)
    monkeypatch.setattr(store, "stage_sharded", prepare)
    checkpoints.save(2, {"weights": b"2"}, {}, None, ALONE)
    checkpoints.wait()
    assert order == ["first is written", "second begins"]


def test_background_error_is_raised_by_the_next_save_and_by_wait(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    checkpoints = CheckpointStore(tmp_path, 2, background=True)
    checkpoints.save(1, {"weights": b"1"}, {}, full, ALONE)
    with pytest.raises(UserError, match=r"disk full while saving .*step_000001; there is no earlier checkpoint"):
        checkpoints.save(2, {"weights": b"2"}, {}, None, ALONE)
    checkpoints.save(2, {"weights": b"2"}, {}, full, ALONE)
    with pytest.raises(UserError, match=r"disk full while saving .*step_000002"):
        checkpoints.wait()
    checkpoints.wait()  # told once
    assert names(tmp_path) == []


def test_damaged_checkpoint_set_aside_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    """Or a run that fell back and then saves would keep the damaged one as its newest."""
    for step in (1, 3):
        save(tmp_path, step)
    (tmp_path / "step_000003" / "state.json").unlink()
    said: list[str] = []
    checkpoints = CheckpointStore(tmp_path, 1)
    assert checkpoints.latest_valid(ALONE, fall_back=True, log=said.append) == tmp_path / "step_000001"
    assert len(said) == 1
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step_000002", "step_000003.damaged"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 1_000_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["step_000015", "step_1000000"]
    assert CheckpointStore(tmp_path, 2).latest() == tmp_path / "step_1000000"
    save(tmp_path, 1_000_001, keep=0)
    assert names(tmp_path) == ["step_1000001"], "the newest must stay whatever keep says"


def test_unfinished_folder_is_not_a_checkpoint_and_is_removed_at_the_start(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_000001", tmp_path / "step_000002.incomplete")
    shutil.copytree(tmp_path / "step_000001", tmp_path / "my_copy_of_step_000001")
    checkpoints = CheckpointStore(tmp_path, 2)
    assert checkpoints.latest() == tmp_path / "step_000001"
    checkpoints.clean(ALONE)
    assert names(tmp_path) == ["my_copy_of_step_000001", "step_000001"]
    assert CheckpointStore(tmp_path / "none", 2).latest() is None
    CheckpointStore(tmp_path / "none", 2).clean(ALONE)


def test_layout_and_state(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    assert files == ["hf/config.json", "manifest.json", "sharded/__0_0.distcp", "state.json"]
    assert CheckpointStore.load_state(path) == {"iteration": 7}
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == set(files) - {"manifest.json"}


@pytest.mark.parametrize("file", ["sharded/__0_0.distcp", "state.json", "hf/config.json"])
@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing"])
def test_damaged_checkpoint_is_refused_with_the_name_of_the_file(tmp_path: Path, file: str, damage: str) -> None:
    path = save(tmp_path, 1)
    CheckpointStore.verify(path)
    content = (path / file).read_bytes()
    if damage == "flipped bit":
        (path / file).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "truncated":
        (path / file).write_bytes(content[:-1])
    else:
        (path / file).unlink()
    with pytest.raises(UserError, match=f"damaged checkpoint: {path / file} .*remove {path}"):
        CheckpointStore.verify(path)


@pytest.mark.parametrize("content", ["", '{"files"', "[]", '{"files": 3}', '{"files": {"state.json": 3}}'])
def test_broken_manifest_is_refused(tmp_path: Path, content: str) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=f"damaged checkpoint: {path / 'manifest.json'} "):
        CheckpointStore.verify(path)


def test_new_run_has_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none", 2).latest_valid(ALONE) is None


def test_folder_without_manifest_or_state_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint \(manifest.json is missing\)"):
        CheckpointStore.verify(tmp_path)
    with pytest.raises(UserError, match=r"state.json: cannot be read"):
        CheckpointStore.load_state(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_says_so_and_leaves_what_was_there(tmp_path: Path, number: int) -> None:
    def full(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path / "tokenizer.json"))

    folder = tmp_path / "checkpoints"
    checkpoints = CheckpointStore(folder, 2)
    with pytest.raises(UserError) as failure:
        checkpoints.save(1, {"weights": b"1"}, {}, full, ALONE)
    assert str(failure.value) == f"disk full while saving {folder / 'step_000001'}; there is no earlier checkpoint"
    good = save(folder, 1)
    with pytest.raises(UserError, match=f"disk full while saving .*; the last good checkpoint is {good}$"):
        checkpoints.save(2, {"weights": b"1"}, {}, full, ALONE)
    assert names(folder) == ["step_000001"]
    checkpoints.verify(good)


def test_other_write_errors_name_the_file_and_program_errors_keep_their_kind(tmp_path: Path) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path / "hf"))

    def wrong(path: Path) -> None:
        raise KeyError("tokenizer")

    checkpoints = CheckpointStore(tmp_path, 2)
    with pytest.raises(UserError, match=r"cannot save .*step_000001: .*Permission denied.*hf; there is no earlier"):
        checkpoints.save(1, {"weights": b"1"}, {}, forbidden, ALONE)
    with pytest.raises(RuntimeError, match="KeyError: 'tokenizer'"):
        checkpoints.save(1, {"weights": b"1"}, {}, wrong, ALONE)
    assert names(tmp_path) == []


def test_state_that_json_cannot_hold_is_refused_before_anything_is_seen(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not JSON compliant"):
        CheckpointStore(tmp_path, 2).save(1, {"weights": b"1"}, {"loss": float("nan")}, None, ALONE)
    assert names(tmp_path) == []


def test_checkpoint_of_another_model_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    config = SimpleNamespace(
        architectures=["Qwen3ForCausalLM"],
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=112,
        tie_word_embeddings=True,
    )
    expected = config_fingerprint(config)
    found = json.loads(json.dumps(expected))
    check_config_fingerprint(expected, found, tmp_path)
    for name in expected:
        other = {**found, name: 0}
        with pytest.raises(
            UserError, match=f"{tmp_path}: a checkpoint of another model: its {name} is 0, .* {expected[name]}"
        ):
            check_config_fingerprint(expected, other, tmp_path)
