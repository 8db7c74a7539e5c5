"""Random students and teachers, small enough for a second on four ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 112,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "initializer_range": 0.2,
}


def write_pair(folder: Path, sizes: tuple[int, int]) -> dict[str, str]:
    """Student and teacher with vocabularies of these sizes; the teacher's embeddings are tied."""
    torch.manual_seed(0)
    for name, size, hidden, tied in zip(("student", "teacher"), sizes, (32, 48), (False, True), strict=True):
        shape = SHAPE | {"vocab_size": size, "hidden_size": hidden, "tie_word_embeddings": tied}
        config = Qwen3Config(**shape, num_hidden_layers=4, num_key_value_heads=4)
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
    return {"student": str(folder / "student"), "teacher": str(folder / "teacher")}
