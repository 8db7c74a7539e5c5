"""Where the optimiser's states lie changes no update; a checkpoint goes on at another layout as if nothing were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import Ranks

CHECKS = Path(__file__).with_name("checks_optimizer.py")
SAMPLES = [[3, 77, 5, 9, 100, 13, 17, 21], [4, 4, 90, 31, 2, 54, 7], [11, 12, 13], [50, 9, 33, 6, 2]]
COMMON: dict[str, Any] = {
    "vocab_size": 256,  # no padding at any layout: the cross entropy is over all columns
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": None,
}
SHARDED: dict[str, Any] = {"distributed": True}
OVERLAPPED: dict[str, Any] = {"distributed": True, "overlap": True, "bucket_size": 3000}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models as Hugging Face folders; `gradient` in each holds tensors of the same shapes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    root = tmp_path_factory.mktemp("models")
    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    }
    configs = {
        "tied": Qwen3Config(**COMMON, num_hidden_layers=4, tie_word_embeddings=True),
        "untied": Qwen3Config(**COMMON, num_hidden_layers=2, tie_word_embeddings=False),
        "experts": Qwen3MoeConfig(**COMMON, **experts, num_hidden_layers=2, tie_word_embeddings=False),
    }
    for seed, (name, config) in enumerate(configs.items()):
        for folder in (root / name, root / name / "gradient"):
            torch.manual_seed(seed + len(str(folder)))
            (Qwen3MoeForCausalLM if name == "experts" else Qwen3ForCausalLM)(config).save_pretrained(folder)
        (root / name / "samples.json").write_text(json.dumps(SAMPLES))
    return {name: str(root / name) for name in configs}


def place(ranks: int, tp: int = 1, options: dict[str, Any] | None = None, **layout: Any) -> dict[str, Any]:
    return {"ranks": ranks, "layout": {"tensor_parallel": tp, **layout}, "options": options or {}}


MATRIX = {
    "TP2-to-TP1": ("tied", place(2, 2), place(1)),
    "TP2-to-DP2": ("tied", place(2, 2), place(2)),
    "PP2-to-TP2": ("tied", place(2, pipeline_parallel=2), place(2, 2)),
    "PP2-untied-to-TP1": ("untied", place(2, pipeline_parallel=2), place(1)),
    "interleaved-to-PP2-distributed": (
        "tied",
        place(2, pipeline_parallel=2, virtual_pipeline=2),
        place(4, pipeline_parallel=2, options=SHARDED),
    ),
    "TP2xPP2+SP-to-interleaved-overlapped": (
        "tied",
        place(4, 2, pipeline_parallel=2, sequence_parallel=True),
        place(4, pipeline_parallel=2, virtual_pipeline=2, options=OVERLAPPED),
    ),
    "DP2-distributed-to-TP2": ("tied", place(2, options=SHARDED), place(2, 2)),
    "DP2-overlapped-to-TP2xDP2-distributed": ("untied", place(2, options=OVERLAPPED), place(4, 2, options=SHARDED)),
    "TP2-to-DP2-distributed-on-the-host": ("tied", place(2, 2), place(2, options={**SHARDED, "offload": "moments"})),
    "EP2-to-EP1": ("experts", place(2, expert_parallel=2), place(1)),
    "TP2xETP2-distributed-to-EP2": (
        "experts",
        place(4, 2, sequence_parallel=True, expert_tensor_parallel=2, options=SHARDED),
        place(2, expert_parallel=2),
    ),
    "EP2-distributed-to-TP2+SP": (
        "experts",
        place(4, expert_parallel=2, options=SHARDED),
        place(2, 2, sequence_parallel=True),
    ),
}


@pytest.mark.parametrize("case", MATRIX)
def test_resumed_at_another_layout_loses_nothing(
    ranks: Ranks, models: dict[str, str], tmp_path: Path, case: str
) -> None:
    name, before, after = MATRIX[case]
    arguments = {"before": before, "after": after, "precision": "fp32"}
    ranks.run(CHECKS, "check_resume_elsewhere", folder=str(tmp_path), hf=models[name], **arguments)


@pytest.mark.parametrize("case", ["TP2-to-DP2", "PP2-to-TP2", "DP2-distributed-to-TP2", "EP2-to-EP1"])
def test_losses_of_a_run_resumed_at_another_layout_are_the_uninterrupted_ones(
    ranks: Ranks, models: dict[str, str], tmp_path: Path, case: str
) -> None:
    name, before, after = MATRIX[case]
    check = "check_losses_go_on_elsewhere"
    ranks.run(CHECKS, check, folder=str(tmp_path), hf=models[name], before=before, after=after)


def test_main_parameters_of_bf16_weights_survive_another_layout(
    ranks: Ranks, models: dict[str, str], tmp_path: Path
) -> None:
    arguments = {"before": place(2, options=SHARDED), "after": place(2, 2), "precision": "bf16"}
    ranks.run(CHECKS, "check_resume_elsewhere", folder=str(tmp_path), hf=models["tied"], **arguments)


@pytest.mark.parametrize(
    ("count", "layout", "precision"),
    [
        pytest.param(2, {}, "fp32", id="DP2"),
        pytest.param(2, {}, "bf16", id="DP2-bf16"),
        pytest.param(4, {"tensor_parallel": 2}, "fp32", id="TP2xDP2"),
        pytest.param(4, {"pipeline_parallel": 2}, "fp32", id="PP2xDP2"),
    ],
)
def test_states_elsewhere_change_no_update(
    ranks: Ranks, models: dict[str, str], tmp_path: Path, count: int, layout: dict[str, int], precision: str
) -> None:
    """Embeddings are tied: under PP2 the last stage's copy gets its gradient from the loss, the first's from the
    rest."""
    arguments = {"ranks": count, "layout": layout, "precision": precision}
    ranks.run(CHECKS, "check_placements", folder=str(tmp_path), hf=models["tied"], **arguments)


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        pytest.param({}, "fp32", id="DP2"),
        pytest.param({}, "bf16", id="DP2-bf16"),
        pytest.param({"tensor_parallel": 2}, "bf16", id="TP2-bf16"),
    ],
)
def test_memory_that_is_lent_changes_an_update(
    ranks: Ranks, models: dict[str, str], tmp_path: Path, layout: dict[str, int], precision: str
) -> None:
    arguments = {"ranks": 2, "layout": layout, "precision": precision}
    ranks.run(CHECKS, "check_memory_is_lent", folder=str(tmp_path), hf=models["tied"], **arguments)


@pytest.mark.parametrize(
    "check",
    [
        "check_loss_waits_for_its_weight",
        "check_reduction_begins_with_the_last_micro_batch",
        "check_states_are_parts",
        "check_extra_state",
    ],
)
def test_on_two_ranks(ranks: Ranks, models: dict[str, str], tmp_path: Path, check: str) -> None:
    ranks.run(CHECKS, check, folder=str(tmp_path), hf=models["untied"])


def test_a_checkpoint_gathers_a_distributed_optimisers_states(ranks: Ranks, tmp_path: Path) -> None:
    wide = COMMON | {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 8192, "num_hidden_layers": 2}
    config = wide | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 128,
        "tie_word_embeddings": True,
    }
    ranks.run(CHECKS, "check_a_checkpoint_gathers_nothing", folder=str(tmp_path), config=config)
