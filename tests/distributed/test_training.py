"""The trainer on four gloo ranks (one launch), at TP 1, 2, 4, TP2 + sequence parallelism, with DP 4, 2 and 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.ranks import Ranks

CHECKS = Path(__file__).with_name("checks_training.py")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4, limit=120) as started:
        yield started


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A random student and teacher, whose vocabulary of 112 leaves rank 3 of 4 without a valid column."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    for name, hidden, layers, tied in (("student", 32, 4, False), ("teacher", 48, 4, True)):
        config = Qwen3Config(
            vocab_size=112,
            hidden_size=hidden,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            pad_token_id=None,
            initializer_range=0.2,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder / name)
    return {"student": str(folder / "student"), "teacher": str(folder / "teacher")}


@pytest.mark.parametrize(
    ("preset", "signal"), [("opd", "topk"), ("eopd", "topk"), ("eopd", "logits"), ("eopd_exact", "hidden")]
)
def test_an_update_is_the_same_at_every_layout(ranks: Ranks, pair: dict[str, str], preset: str, signal: str) -> None:
    ranks.run(CHECKS, "check_an_update_is_the_same_at_every_layout", **pair, preset=preset, signal=signal)


def test_a_rank_without_a_sample_changes_nothing(ranks: Ranks, pair: dict[str, str]) -> None:
    ranks.run(CHECKS, "check_a_rank_without_a_sample_changes_nothing", **pair)


def test_rollouts_are_the_same_at_every_layout(ranks: Ranks, pair: dict[str, str]) -> None:
    ranks.run(CHECKS, "check_rollouts_are_the_same_at_every_layout", student=pair["student"])


def test_the_terminal_maps(ranks: Ranks, pair: dict[str, str]) -> None:
    ranks.run(CHECKS, "check_the_terminal_maps_give_the_students_stop_the_teachers_meaning", **pair)
