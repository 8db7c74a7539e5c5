"""A checkpoint from a stranger: nothing in it runs code, and each try is refused in one line."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from eaopd_megatron.checkpoint import dist_checkpoint
from eaopd_megatron.checkpoint.convert import single_process_group, stored_dtype
from eaopd_megatron.checkpoint.dist_checkpoint import load_sharded, save_sharded
from eaopd_megatron.distributed.parallel_state import ParallelState
from eaopd_megatron.errors import UserError

EMBEDDING = "model.embedding.word_embeddings.weight"


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def state(fill: float, extra: Any) -> dict[str, Any]:
    weight = torch.full((4, 2), fill)
    return {
        "weight": ShardedTensor.from_rank_offsets(EMBEDDING, weight),
        "extra": ShardedObject("model.layer._extra_state", extra, (1,), (0,)),
        "iteration": 3,
    }


@pytest.fixture(scope="module")
def parallel() -> Iterator[ParallelState]:
    with single_process_group() as one:
        yield one


@pytest.fixture
def folder(tmp_path: Path, parallel: ParallelState) -> Path:
    folder = tmp_path / "step" / "sharded"
    folder.mkdir(parents=True)
    save_sharded(folder, state(7.0, io.BytesIO(b"scales")), parallel)
    return folder


def refused(folder: Path, parallel: ParallelState) -> str:
    with pytest.raises(UserError) as caught:
        load_sharded(folder, state(0.0, None), parallel)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{folder}: ") and len(line) < 500
    assert not (folder.parent / "mark").exists(), "code ran"
    return line


def test_an_honest_checkpoint_is_refused(folder: Path, parallel: ParallelState) -> None:
    loaded = load_sharded(folder, state(0.0, None), parallel)
    assert torch.equal(loaded["weight"], torch.full((4, 2), 7.0)) and loaded["iteration"] == 3
    assert loaded["extra"].getvalue() == b"scales"
    assert stored_dtype(folder.parent) == torch.float32
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ and pickle.load.__module__ == "_pickle"


def test_metadata_runs_code(folder: Path, parallel: ParallelState) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(folder.parent / "mark")))
    assert "it names posix.mkdir, which no checkpoint needs" in refused(folder, parallel)
    with pytest.raises(UserError, match=r"it names posix\.mkdir"):
        stored_dtype(folder.parent)
    assert not (folder.parent / "mark").exists()


def test_common_pt_runs_code_or_is_told_in_35_lines(folder: Path, parallel: ParallelState) -> None:
    torch.save({"iteration": Evil(folder.parent / "mark")}, folder / "common.pt")
    assert "it names posix.mkdir" in refused(folder, parallel)


def test_an_object_runs_code(tmp_path: Path, parallel: ParallelState) -> None:
    folder = tmp_path / "step" / "sharded"
    folder.mkdir(parents=True)
    save_sharded(folder, state(7.0, Evil(tmp_path / "step" / "mark")), parallel)
    assert "it names posix.mkdir" in refused(folder, parallel)


def test_a_tensor_that_is_an_object_runs_code(tmp_path: Path, parallel: ParallelState) -> None:
    folder = tmp_path / "step" / "sharded"
    folder.mkdir(parents=True)
    hostile = state(7.0, None)
    hostile["weight"] = ShardedObject(EMBEDDING, Evil(tmp_path / "step" / "mark"), (1,), (0,))
    save_sharded(folder, hostile, parallel)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = f"{EMBEDDING}/shard_0_1"
    metadata.state_dict_metadata[EMBEDDING] = metadata.state_dict_metadata.pop(name)
    metadata.storage_data = {
        replace(index, fqn=EMBEDDING if index.fqn == name else index.fqn): info
        for index, info in metadata.storage_data.items()
    }
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(folder, parallel)


@pytest.mark.parametrize("path", ["../other/__0_0.distcp", "/etc/passwd", "..", ""])
def test_a_tensor_lies_in_another_folder(folder: Path, parallel: ParallelState, path: str) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = path
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "outside the folder" in refused(folder, parallel)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"{}", pickle.dumps(7), pickle.dumps({"a": 1}), b"\x80\x05" + b"(" * 10]
)
def test_damaged_metadata_is_a_traceback(folder: Path, parallel: ParallelState, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    refused(folder, parallel)


@pytest.mark.parametrize("name", [("builtins", "eval"), ("os", "system"), ("torch", "load"), ("torch", "nn.Module")])
def test_other_classes_of_metadata_are_refused(name: tuple[str, str]) -> None:
    text = b"\x80\x02c%s\n%s\n." % (name[0].encode(), name[1].encode())
    with pytest.raises(pickle.UnpicklingError, match=f"it names {name[0]}.{name[1]}"):
        dist_checkpoint._load_metadata(io.BytesIO(text))
