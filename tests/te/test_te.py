"""The project's models on Transformer Engine's own Python, whose compiled module is a stand-in of tools/te_cpu.

They run in the environment of `tools/install_te_cpu.sh`. What is checked: which of its layers are built and with what,
names, shapes, arguments, masks, saved tensors, and that the numbers are right where its kernels are. Not its kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.ranks import Ranks

CHECKS = Path(__file__).with_name("checks_te.py")
TP2_SP = {"tensor_parallel": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {"TP1": {}, "TP2+SP": TP2_SP, "PP2": {"pipeline_parallel": 2}}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {"TP1": {}, "EP2": {"expert_parallel": 2}, "TP2+SP": TP2_SP}
FAMILIES = list(tiny_models.MODELS)
YARN = ("qwen2_yarn", "qwen3_moe_tied")
"""Their attention factor is not 1, which Transformer Engine's rotary kernel does not know."""
LAYERS = ["TELayerNormColumnParallelLinear", "TERowParallelLinear", "EngineAttention", "RMSNorm"]
EXPERT_LAYERS = ["TEGroupedMLP", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear", "EngineAttention"]


def is_moe(name: str) -> bool:
    return tiny_models.MODELS[name][0] == "qwen3_moe"


CASES = [(name, label) for name in FAMILIES for label in (EXPERT_LAYOUTS if is_moe(name) else LAYOUTS)]


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_transformer_engines(ranks: Ranks, folders: dict[str, Path], name: str) -> None:
    expected = EXPERT_LAYERS if is_moe(name) else LAYERS
    ranks.run(CHECKS, "check_layers", folder=str(folders[name]), expected=expected, fused_rotary=name not in YARN)


@pytest.mark.parametrize(("name", "label"), CASES)
def test_logits_and_gradients_are_transformers(ranks: Ranks, folders: dict[str, Path], name: str, label: str) -> None:
    """Packed sequences, by its linear layers, norms, grouped products, attention, rotary kernel and optimizer."""
    layout = (EXPERT_LAYOUTS if is_moe(name) else LAYOUTS)[label]
    ranks.run(CHECKS, "check_logits_and_gradients", folder=str(folders[name]), layout=layout)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2])
def test_prompts_of_unequal_lengths_decode_as_transformers(
    ranks: Ranks, folders: dict[str, Path], name: str, tp: int
) -> None:
    """Its attention ignores the mask of the mask types that Megatron-Core gives it while it decodes."""
    ranks.run(CHECKS, "check_decoding", folder=str(folders[name]), tp=tp, sp=True)


@pytest.mark.parametrize("name", ["qwen3", "qwen2_yarn", "llama3"])
def test_a_layer_reads_no_lengths_on_the_host(ranks: Ranks, folders: dict[str, Path], name: str) -> None:
    ranks.run(CHECKS, "check_no_host_reads", folder=str(folders[name]), layout={})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("saved", "loaded"), [(False, True), (True, False)])
def test_a_checkpoint_goes_from_local_layers_to_its_and_back(
    ranks: Ranks, folders: dict[str, Path], tmp_path: Path, name: str, saved: bool, loaded: bool
) -> None:
    options = {"out": str(tmp_path), "saved": saved, "loaded": loaded}
    ranks.run(CHECKS, "check_checkpoint", folder=str(folders[name]), **options)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen3_moe"])
def test_an_fp8_teacher_has_the_parameters_of_another(ranks: Ranks, folders: dict[str, Path], name: str) -> None:
    ranks.run(CHECKS, "check_fp8_teacher", folder=str(folders[name]))
