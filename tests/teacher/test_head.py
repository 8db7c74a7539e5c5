"""The teacher's output head, sharded as the student's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.checkpoint.hf_import import load_output_head
from eaopd_megatron.checkpoint.safetensors_io import LazyTensor
from eaopd_megatron.errors import UserError
from tests import tiny_models


@pytest.fixture(scope="module", params=["qwen3", "qwen3_untied"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[HfFolder, torch.Tensor]:
    """A model with 112 tied rows or 300 untied ones, and its output weight."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_models.build(request.param)
    model.save_pretrained(folder)
    return HfFolder.open(str(folder)), model.lm_head.weight.detach()


@pytest.mark.parametrize(("ranks", "rows"), [(1, 112), (2, 112), (4, 112), (2, 130), (2, 1000)])
def test_a_row_stands_for_another_token_than_the_students(
    teacher: tuple[HfFolder, torch.Tensor], ranks: int, rows: int
) -> None:
    """Vocabulary sizes may differ: the smaller one is shared, and other rows are never read."""
    folder, weight = teacher
    common = min(rows, len(weight))
    shards = [load_output_head(folder, tp_rank=i, tp_size=ranks, rows=rows, vocab_size=common) for i in range(ranks)]
    assert len({shard.shape for shard in shards}) == 1
    head = torch.cat(shards)
    assert len(head) == -(-rows // (128 * ranks)) * 128 * ranks
    assert torch.equal(head[:common], weight[:common]) and not head[common:].any()


def test_the_students_stop_keeps_its_row(teacher: tuple[HfFolder, torch.Tensor]) -> None:
    """With the padding of 300 rows the two swapped rows are on different ranks."""
    folder, weight = teacher
    own: dict[str, Any] = {"tp_size": 2, "rows": 300, "vocab_size": len(weight), "row_map": {3: 109, 109: 3}}
    head = torch.cat([load_output_head(folder, tp_rank=i, **own) for i in range(2)])
    assert torch.equal(head[[3, 109]], weight[[109, 3]])
    assert torch.equal(head[4:109], weight[4:109])


def test_the_head_model_is_read(teacher: tuple[HfFolder, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = teacher
    read: list[tuple[str, int]] = []
    rows = LazyTensor._rows

    def counted(self: LazyTensor, start: int, end: int) -> torch.Tensor:
        read.append((next(n for n, at in folder.files.locations.items() if at is self.location), end - start))
        return rows(self, start, end)

    monkeypatch.setattr(LazyTensor, "_rows", counted)
    load_output_head(folder, tp_rank=0, tp_size=2, rows=112, vocab_size=112)
    name = "model.embed_tokens.weight" if folder.config.tie_word_embeddings else "lm_head.weight"
    assert read == [(name, 112)]


def test_a_folder_without_its_head_is_a_traceback(teacher: tuple[HfFolder, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = teacher
    for file in folder.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_output_head(HfFolder.open(str(tmp_path)), tp_rank=0, tp_size=1, rows=112, vocab_size=112)
