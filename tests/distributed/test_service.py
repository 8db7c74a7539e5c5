"""The teacher's own ranks against transformers, at every kind of layout of a service (four gloo ranks)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny_models
from tests.ranks import Ranks

CHECKS = Path(__file__).with_name("checks_service.py")


@pytest.mark.parametrize(
    ("name", "layouts", "vocab_size"),
    [
        (
            "qwen3",
            [{"tensor_parallel": 2, "pipeline_parallel": 2}, {"tensor_parallel": 2}, {"pipeline_parallel": 2}],
            110,
        ),
        (
            "qwen3_moe",
            [
                {"expert_parallel": 2},
                {"pipeline_parallel": 2, "expert_parallel": 2},
                {"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 2},
            ],
            300,
        ),
    ],
)
def test_a_layout_changes_what_the_teacher_says(
    ranks: Ranks, tmp_path: Path, name: str, layouts: list[dict[str, Any]], vocab_size: int
) -> None:
    """Also: a request scored together with others, a terminal map, a student with a smaller vocabulary."""
    model = tiny_models.build(name)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    tokens = torch.randint(vocab_size, (3, tiny_models.LENGTH))
    with torch.no_grad():
        hidden, logits = model.model(tokens).last_hidden_state, model(tokens).logits
    save_file({"tokens": tokens, "hidden": hidden, "logits": logits}, tmp_path / "values")
    for layout in layouts:
        options: dict[str, Any] = {"layout": layout, "swap": (3, 7), "vocab_size": vocab_size}
        ranks.run(CHECKS, "check_rows", folder=str(tmp_path), values=str(tmp_path / "values"), **options)
