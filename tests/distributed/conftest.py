from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.ranks import Ranks

HERE = Path(__file__).parent
FOUR_RANKS = Ranks(4, limit=120)  # they start with the first check


SHAPE: dict[str, Any] = {
    "vocab_size": 112,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four gloo ranks, launched once for all modules that check models on ranks."""
    with FOUR_RANKS:
        yield FOUR_RANKS


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], dict[str, str]]:
    """(vocabulary sizes) → a random student, and a random teacher with tied embeddings."""

    @functools.cache
    def made(*sizes: int) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("pair")
        torch.manual_seed(0)
        for name, size, hidden, tied in zip(("student", "teacher"), sizes, (32, 48), (False, True), strict=True):
            shape = SHAPE | {"vocab_size": size, "hidden_size": hidden, "tie_word_embeddings": tied}
            config = Qwen3Config(**shape, num_hidden_layers=4, num_key_value_heads=4)
            Qwen3ForCausalLM(config).save_pretrained(folder / name)
        return {"student": str(folder / "student"), "teacher": str(folder / "teacher")}

    return made


@pytest.fixture(scope="session")
def pair(pairs: Callable[[int, int], dict[str, str]]) -> dict[str, str]:
    """One whose vocabulary of 112 leaves rank 3 of 4 without a valid column."""
    return pairs(112, 112)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Idle ranks poll, hundreds of times a second for each group that they ever had: they end with this folder."""
    if nextitem is None or HERE not in nextitem.path.parents:
        FOUR_RANKS.close()
