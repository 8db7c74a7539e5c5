"""The optimiser's path is transformers' and torch's; a checkpoint resumes it bit for bit, and is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eaopd_megatron.checkpoint.store import CheckpointStore
from tests.ranks import RankFailure, Ranks

CHECKS = Path(__file__).with_name("checks_checkpoint.py")
SAMPLES = [
    [3, 77, 5, 9, 200, 13, 17, 21, 8],
    [4, 4, 90, 31, 2, 254, 7, 7, 1, 60, 30, 15],
    [11, 12, 13],
    [250, 9, 33, 6, 2],
]
LAYOUTS = {
    "TP1": (1, 1, False),
    "TP2": (2, 2, False),
    "TP2+SP": (2, 2, True),
    "DP2": (2, 1, False),
    "TP2xDP2": (4, 2, False),
}  # ranks, tensor parallel, sequence parallel


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Qwen3 as a Hugging Face folder, and how transformers and torch.optim.AdamW train it for three steps."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        initializer_range=0.1,  # the gradient's norm is above 1: it is clipped
        tie_word_embeddings=True,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    (folder / "samples.json").write_text(json.dumps(SAMPLES))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (folder / "expected.json").write_text(json.dumps({"parameters": parameters, "updates": _transformers(model)}))
    return str(folder)


def _transformers(model: torch.nn.Module) -> list[tuple[float, float]]:
    """(loss, gradient norm) of three updates, with the learning rates of the checks."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    figures = []
    for learning_rate in (3e-3, 2e-3, 1e-3):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = learning_rate
        loss, tokens = torch.zeros(()), 0
        for ids in map(torch.tensor, SAMPLES):
            logits = model(ids[None, :-1]).logits[0]
            loss = loss + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
            tokens += len(ids) - 1
        (loss / tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        figures.append(((loss / tokens).item(), norm.item()))
    assert all(norm > 1 for _, norm in figures), "the case does not exercise clipping"
    return figures


@pytest.mark.parametrize("layout", LAYOUTS)
def test_update_gives_transformers_loss_and_gradient_norm(ranks: Ranks, hf: str, tmp_path: Path, layout: str) -> None:
    count, tp, sp = LAYOUTS[layout]
    ranks.run(CHECKS, "check_update", folder=str(tmp_path), hf=hf, ranks=count, tp=tp, sp=sp)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["TP1", "TP2+SP", "TP2xDP2"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    ranks: Ranks, hf: str, tmp_path: Path, layout: str, precision: str
) -> None:
    count, tp, sp = LAYOUTS[layout]
    arguments = {"ranks": count, "tp": tp, "sp": sp, "precision": precision}
    ranks.run(CHECKS, "check_resume", folder=str(tmp_path), hf=hf, **arguments)


@pytest.mark.parametrize(
    ("rank", "file", "limit"),
    [
        pytest.param(2, "__1_0.distcp", None, id="not-that-ranks-file"),
        pytest.param(1, "__1_0.distcp", None, id="a-shard"),
        pytest.param(0, "common.pt", None, id="common"),
        pytest.param(0, ".metadata.tmp", None, id="index"),
        pytest.param(0, "../state.json", None, id="state"),
        pytest.param(1, "", 5000, id="half-a-shard"),
    ],
)
def test_full_disk_on_one_rank_reaches_all_and_keeps_the_last_checkpoint(
    ranks: Ranks, hf: str, tmp_path: Path, rank: int, file: str, limit: int | None
) -> None:
    ranks.run(CHECKS, "check_disk_full", folder=str(tmp_path), hf=hf, rank=rank, file=file, limit=limit)


@pytest.mark.parametrize(
    "check",
    [
        "check_gradient_that_is_not_finite",
        "check_recipe_wins",
        "check_error_of_one_rank",
        "check_damaged_checkpoint",
        "check_background_save",
        "check_background_save_on_a_full_disk",
        "check_tensors_that_do_not_fit",
        "check_no_process_is_started",
        "check_writer_and_reader_agree",
    ],
)
def test_on_four_ranks(ranks: Ranks, hf: str, tmp_path: Path, check: str) -> None:
    ranks.run(CHECKS, check, folder=str(tmp_path), hf=hf)


@pytest.mark.parametrize(
    "options", [{}, {"distributed": True, "overlap": True, "bucket_size": 3000}], ids=["plain", "distributed"]
)
def test_a_background_save_reuses_the_host_buffers_of_the_one_before(
    ranks: Ranks, hf: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    ranks.run(CHECKS, "check_reused_host_buffers", folder=str(tmp_path), hf=hf, options=options)


def test_killed_save_leaves_the_last_checkpoint(ranks: Ranks, hf: str, tmp_path: Path) -> None:
    """The last test of the module: it ends the ranks."""
    with pytest.raises(RankFailure, match="rank 0 died with exit code -9"):
        ranks.run(CHECKS, "check_killed_before_the_rename", folder=str(tmp_path), hf=hf)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_000001", "step_000002.incomplete"]
    checkpoints = CheckpointStore(folder, 1)
    latest = checkpoints.latest()
    assert latest == folder / "step_000001"
    checkpoints.verify(latest)
