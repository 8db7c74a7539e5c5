"""The trainer on four gloo ranks (one launch), at tensor, sequence, pipeline (interleaved, too), context, expert and
data parallelism and their products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.distributed.random_pairs import SHAPE
from tests.ranks import Ranks

CHECKS = Path(__file__).with_name("checks_training.py")
IMPORTANCE = Path(__file__).with_name("checks_importance.py")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random student that is a mixture of experts."""
    folder = tmp_path_factory.mktemp("experts")
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        **SHAPE,
        hidden_size=32,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("preset", "signal", "sizes", "layouts", "budget", "offload"),
    [
        ("opd", "topk", (112, 112), "SIMPLE_LAYOUTS", 10_000, False),
        ("eopd", "topk", (300, 250), "SIMPLE_LAYOUTS", 1, True),
        # data-parallel ranks have other numbers of micro-batches
        ("eopd", "topk", (112, 112), "WIDE_LAYOUTS", 16, False),
        ("eopd_exact", "hidden", (300, 250), "SIMPLE_LAYOUTS", 16, False),
        ("eopd_exact", "hidden", (250, 300), "WIDE_LAYOUTS", 16, True),
        ("eopd_exact", "logits", (250, 300), "TENSOR_LAYOUTS", 16, True),
    ],
)
def test_an_update_is_the_same_at_every_layout(
    ranks: Ranks,
    pairs: Callable[[int, int], dict[str, str]],
    preset: str,
    signal: str,
    sizes: tuple[int, int],
    layouts: str,
    budget: int,
    offload: bool,
) -> None:
    """Vocabularies of 250 and 300 have other paddings on 1 and 2 tensor-parallel ranks, and the same on 4; a teacher's
    weights may be on the device only while it scores."""
    check = "check_an_update_is_the_same_at_every_layout"
    pair = pairs(*sizes)
    if signal == "hidden":  # the other way round: a student with tied embeddings
        pair = {"student": pair["teacher"], "teacher": pair["student"]}
    options = {"preset": preset, "signal": signal, "layouts": layouts, "budget": budget, "offload": offload}
    ranks.run(CHECKS, check, **pair, **options)


@pytest.mark.parametrize("signal", ["topk", "hidden"])
def test_two_teachers_give_the_sum_of_what_each_gives_to_its_samples(
    ranks: Ranks, pairs: Callable[[int, int], dict[str, str]], signal: str
) -> None:
    """One denominator: the tokens of all. Each data-parallel rank has samples of one teacher alone."""
    check, teachers = "check_an_update_is_the_same_at_every_layout", [pairs(112, 112), pairs(300, 250)]
    two = {"math": teachers[0]["teacher"], "code": teachers[1]["teacher"]}
    options = {"preset": "eopd", "layouts": "ROUTED_LAYOUTS", "budget": 16, "offload": False}
    ranks.run(CHECKS, check, student=teachers[1]["student"], teacher=two, signal=signal, **options)


def test_experts_over_ranks_change_no_update(ranks: Ranks, pair: dict[str, str], experts: str) -> None:
    """A dense teacher on the same ranks."""
    check, options = "check_an_update_is_the_same_at_every_layout", {"preset": "eopd", "signal": "hidden", "budget": 16}
    ranks.run(CHECKS, check, student=experts, teacher=pair["teacher"], layouts="EXPERT_LAYOUTS", **options)


def test_a_rank_without_a_sample_changes_nothing(ranks: Ranks, pair: dict[str, str]) -> None:
    ranks.run(CHECKS, "check_a_rank_without_a_sample_changes_nothing", **pair)


def test_stale_samples_are_weighted_and_fresh_ones_are_not(ranks: Ranks, pair: dict[str, str]) -> None:
    ranks.run(IMPORTANCE, "check_stale_samples_are_weighted_and_fresh_ones_are_not", **pair)


@pytest.mark.parametrize("layouts", ["SIMPLE_LAYOUTS", "WIDE_LAYOUTS"])
def test_rollouts_are_the_same_at_every_layout(ranks: Ranks, pair: dict[str, str], layouts: str) -> None:
    check = "check_rollouts_are_the_same_at_every_layout"
    ranks.run(CHECKS, check, student=pair["student"], layouts=layouts)


@pytest.mark.parametrize("layouts", ["SIMPLE_LAYOUTS", "WIDE_LAYOUTS"])
def test_a_signal_ends_generation_on_every_rank(ranks: Ranks, pair: dict[str, str], layouts: str) -> None:
    ranks.run(CHECKS, "check_a_signal_ends_generation_on_every_rank", student=pair["student"], layouts=layouts)


def test_a_signal_ends_generation_of_experts_over_ranks(ranks: Ranks, experts: str) -> None:
    ranks.run(CHECKS, "check_a_signal_ends_generation_on_every_rank", student=experts, layouts="EXPERT_LAYOUTS")


def test_experts_over_ranks_change_no_rollout(ranks: Ranks, experts: str) -> None:
    """A rank that is done while others decode would leave them waiting for its part of the exchange."""
    check = "check_rollouts_are_the_same_at_every_layout"
    ranks.run(CHECKS, check, student=experts, layouts="EXPERT_LAYOUTS")


def test_a_packed_sequence_sees_no_other(ranks: Ranks, pair: dict[str, str]) -> None:
    ranks.run(CHECKS, "check_a_packed_sequence_sees_no_other", student=pair["student"])


@pytest.mark.parametrize("sizes", [(112, 112), (112, 300)])
def test_the_terminal_maps(ranks: Ranks, pairs: Callable[[int, int], dict[str, str]], sizes: tuple[int, int]) -> None:
    ranks.run(CHECKS, "check_the_terminal_maps_give_the_students_stop_the_teachers_meaning", **pairs(*sizes))
