"""A plan's bytes against models that Megatron-Core builds on four gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ranks

CHECKS = Path(__file__).with_name("checks_planning.py")
TINY: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "tie_word_embeddings": False,
}
TIED = TINY | {"tie_word_embeddings": True, "vocab_size": 700}
WIDE = TINY | {"hidden_size": 64, "intermediate_size": 384, "num_hidden_layers": 2, "head_dim": 32}
"""More MLP, wider heads than the hidden size has room for."""
FEW_KEYS = TINY | {"num_hidden_layers": 3, "num_key_value_heads": 2, "intermediate_size": 64, "hidden_size": 160}
BIASED = TIED | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "head_dim": 12}
LLAMA = TINY | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 12}
EXPERTS = TINY | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}
SP2 = {"tensor_parallel": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    "layout",
    [
        {},
        SP2,
        {"tensor_parallel": 4},
        {"pipeline_parallel": 2},
        {"pipeline_parallel": 2, "virtual_pipeline": 2},
        {"tensor_parallel": 2, "pipeline_parallel": 2},
    ],
    ids=str,
)
def test_parameters_are_estimated(ranks: Ranks, layout: dict[str, Any]) -> None:
    ranks.run(CHECKS, "check_parameters", configs=[TINY, TIED, BIASED, LLAMA], layout=layout)


@pytest.mark.parametrize("layout", [{}, SP2, SP2 | {"expert_tensor_parallel": 2}, {"expert_parallel": 4}], ids=str)
def test_experts_are_counted_on_the_wrong_ranks(ranks: Ranks, layout: dict[str, Any]) -> None:
    ranks.run(CHECKS, "check_parameters", configs=[EXPERTS], layout=layout)


@pytest.mark.parametrize(("precision", "distributed"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_gradients_and_optimiser_are_estimated(ranks: Ranks, precision: str, distributed: bool) -> None:
    arguments = {"config": TIED, "layout": SP2, "precision": precision, "distributed": distributed}
    ranks.run(CHECKS, "check_training_state", **arguments)


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel": 2}, SP2], ids=str)
def test_activations_are_a_guess(ranks: Ranks, layout: dict[str, Any]) -> None:
    cases = [(TINY, [40, 40]), (WIDE, [128]), (FEW_KEYS, [16, 8, 20, 12, 16])]
    if layout in ({}, SP2):
        cases.append((EXPERTS, [24, 40]))
    ranks.run(CHECKS, "check_activations", cases=cases, layout=layout, recompute="none")


@pytest.mark.parametrize(("config", "lengths"), [(TINY, [40, 8, 8, 8]), (FEW_KEYS, [16, 8, 20, 12, 16])])
def test_activations_of_variable_length_attention_are_a_guess(
    ranks: Ranks, config: dict[str, Any], lengths: list[int]
) -> None:
    ranks.run(CHECKS, "check_varlen_activations", config=config, lengths=lengths)


@pytest.mark.parametrize(("recompute", "layout"), [("selective", {}), ("full", {}), ("full", SP2)])
def test_recompute_is_planned_as_if_it_kept_what_is_made_again(
    ranks: Ranks, recompute: str, layout: dict[str, Any]
) -> None:
    ranks.run(CHECKS, "check_activations", cases=[(TINY, [24, 40])], layout=layout, recompute=recompute)
