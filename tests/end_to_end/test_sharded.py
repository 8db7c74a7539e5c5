"""Data-parallel ranks that share the optimiser, overlap their communication and save in the background: killed,
damaged, and gone on with at another layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.runs import Command, alive, wait_for, workers_of
from tools.lib.run_records import records

Start = Callable[..., Command]
SHORT = (
    "train",
    "recipes/countdown/eopd.yaml",
    "train.iterations=4",
    "train.prompts_per_iteration=12",
    "train.mini_batch=6",
    "evaluation.problems=2",
    "evaluation.samples=1",
    "run.save_interval=1",
)
SHARDED = (
    "student.tensor_parallel=1",
    "student.data_parallel=2",
    "optimizer.distributed=true",
    "optimizer.overlap=true",
    "run.async_save=true",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, _, err = Command(*SHORT, *SHARDED, f"run.folder={run}").wait()
    assert code == 0, err
    return run


def test_a_killed_sharded_run_goes_on_as_the_uninterrupted_one_there_and_at_another_layout(
    uninterrupted: Path, eaopd: Start, tmp_path: Path
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    command = eaopd(*SHORT, *SHARDED, f"run.folder={run}")
    wait_for(lambda: (run / "checkpoints" / "step_000002").exists(), command.process)
    ranks = workers_of(command.process.pid)
    command.process.kill()
    command.process.wait()
    while any(alive(pid) for pid in ranks):
        pass
    assert not (run / "finished.json").exists()
    shutil.copytree(run, moved)

    code, _, err = eaopd(*SHORT, *SHARDED, f"run.folder={run}").wait()
    assert code == 0, err
    assert records(run) == records(uninterrupted)
    one, other = (load_file(r / "student/model.safetensors") for r in (run, uninterrupted))
    assert all(torch.equal(one[name], other[name]) for name in one)

    newest = sorted((moved / "checkpoints").glob("step_??????"))[-1]
    common = newest / "sharded" / "common.pt"
    size = common.stat().st_size
    common.write_bytes(b"")
    elsewhere = ("student.tensor_parallel=2", "student.data_parallel=1", "run.on_corrupt_checkpoint=fall_back")
    code, _, err = eaopd(*SHORT, *elsewhere, f"run.folder={moved}").wait()
    assert code == 0, err
    log = (moved / "log.txt").read_text()
    assert f"common.pt has 0 bytes, {size} were written; it is now {newest.name}.damaged: falling back to " in log
    assert "was saved at tensor_parallel=1, data_parallel=2, optimizer.distributed=True; going on at tensor" in log
    for mine, theirs in zip(records(moved)[1:], records(uninterrupted)[1:], strict=True):
        for name in ("objective/loss", "optimizer/grad_norm", "teacher/entropy"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3), (mine["iteration"], name)
