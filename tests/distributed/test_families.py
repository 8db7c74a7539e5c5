"""Every family at every kind of layout against transformers: logits, gradients and their norm; and out again.

Four gloo ranks are launched once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from eaopd_megatron.checkpoint.convert import export_checkpoint
from tests import tiny_models
from tests.ranks import Ranks

CHECKS = Path(__file__).with_name("checks_models.py")
TP2_SP = {"tensor_parallel": 2, "sequence_parallel": True}
PP2 = {"pipeline_parallel": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor_parallel": 2},
    "TP2+SP": TP2_SP,
    "TP4": {"tensor_parallel": 4},
    "PP2": PP2,
    "TP2+SP, PP2": {**TP2_SP, **PP2},
    "CP2": {"context_parallel": 2},
}

EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "EP2": {"expert_parallel": 2},
    "EP4": {"expert_parallel": 4},
    "TP2+SP": TP2_SP,
    "TP2+SP, ETP2": {**TP2_SP, "expert_tensor_parallel": 2},
    "TP2+SP, EP2": {**TP2_SP, "expert_parallel": 2},
    "PP2": PP2,
    "PP2, EP2": {**PP2, "expert_parallel": 2},
    "CP2, EP2": {"context_parallel": 2, "expert_parallel": 2},
}
MORE = ("qwen2", "llama_tied", "qwen3_moe_tied")
"""Second models of a family: where tied embeddings, or the products of layouts, could go wrong."""
CASES = [
    (name, label, layout)
    for name, (kind, _) in tiny_models.MODELS.items()
    for label, layout in (EXPERT_LAYOUTS if kind == "qwen3_moe" else LAYOUTS).items()
    if name not in MORE or label in ("TP2+SP", "TP2+SP, PP2", "PP2, EP2")
]
CASES.append(("qwen2_yarn", "PP2, two chunks a rank", {**PP2, "virtual_pipeline": 2}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for name in tiny_models.MODELS:
        tiny_models.write(name, root / name)
    return {name: root / name for name in tiny_models.MODELS}


@pytest.mark.parametrize(("name", "label", "layout"), CASES, ids=[f"{name} {label}" for name, label, _ in CASES])
def test_logits_and_gradients_are_transformers(
    ranks: Ranks, folders: dict[str, Path], name: str, label: str, layout: dict[str, Any]
) -> None:
    """Sequences are longer than the original context of the scaled rotary positions."""
    ranks.run(CHECKS, "check_logits_and_gradients", folder=str(folders[name]), layout=layout)


@pytest.mark.parametrize(
    ("name", "label"),
    [(name, "TP1") for name, (kind, _) in tiny_models.MODELS.items() if name not in MORE]
    + [("qwen3", "TP2+SP"), ("qwen2_yarn", "PP2"), ("llama3", "CP2"), ("qwen3_moe", "CP2, EP2")],
)
def test_variable_length_attention_is_transformers(
    ranks: Ranks, folders: dict[str, Path], name: str, label: str
) -> None:
    layout = (EXPERT_LAYOUTS if tiny_models.MODELS[name][0] == "qwen3_moe" else LAYOUTS)[label]
    ranks.run(CHECKS, "check_varlen_logits_and_gradients", folder=str(folders[name]), layout=layout)


@pytest.mark.parametrize("label", ["TP1", "TP2+SP", "CP2"])
@pytest.mark.parametrize("name", ["qwen3", "qwen2_yarn", "llama3"])
def test_a_layer_reads_no_lengths_on_the_host(ranks: Ranks, folders: dict[str, Path], name: str, label: str) -> None:
    """Megatron-Core's rotary positions of packed sequences read them four times a layer, each a wait for the GPU."""
    ranks.run(CHECKS, "check_no_host_reads", folder=str(folders[name]), layout=LAYOUTS[label])


@pytest.mark.parametrize("name", ["qwen2_yarn", "llama3", "qwen3_moe"])
def test_greedy_tokens_are_transformers(ranks: Ranks, folders: dict[str, Path], name: str) -> None:
    """Decoding turns sequence parallelism off, and feeds positions one at a time to scaled rotary positions."""
    ranks.run(CHECKS, "check_decoding", folder=str(folders[name]), tp=2, sp=True)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3_moe", {**PP2, "expert_parallel": 2}),
        ("qwen3_moe_tied", {**TP2_SP, "expert_tensor_parallel": 2}),
        ("qwen3_moe_tied", {**TP2_SP, "expert_parallel": 4}),
        ("qwen2_yarn", {**PP2, "virtual_pipeline": 2, "tensor_parallel": 2}),
        ("llama_tied", PP2),
    ],
)
def test_a_round_trip_changes_no_bit(
    ranks: Ranks, folders: dict[str, Path], tmp_path: Path, name: str, layout: dict[str, Any]
) -> None:
    """An expert or a layer under another one's name, or a tied copy written as a tensor of its own, would show."""
    out = str(tmp_path / "out")
    options: dict[str, Any] = {"layout": layout, "shard_bytes": 10**9, "files": 1}
    ranks.run(CHECKS, "check_round_trip", folder=str(folders[name]), out=out, **options)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3_moe", {**PP2, "expert_parallel": 2}),
        ("qwen3_moe_tied", {**TP2_SP, "expert_parallel": 2, **PP2}),
        ("qwen2", {**TP2_SP, **PP2}),
    ],
)
def test_one_process_exports_what_was_imported_at_any_layout(
    ranks: Ranks, folders: dict[str, Path], tmp_path: Path, name: str, layout: dict[str, Any]
) -> None:
    imported, out = tmp_path / "mcore", tmp_path / "hf"
    ranks.run(CHECKS, "check_import", folder=str(folders[name]), out=str(imported), layout=layout)
    export_checkpoint(imported, out, verify=False, log=print)
    one, other = (load_file(folder / "model.safetensors") for folder in (folders[name], out))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("tp", [2, 4])
def test_a_vocabulary_of_real_size_keeps_its_rows(ranks: Ranks, tmp_path: Path, tp: int) -> None:
    """151,936 rows are padded to 152,064, so the last rank's rows end before its shard does."""
    tiny_models.build("qwen3", vocab_size=151_936, hidden_size=16).save_pretrained(tmp_path / "hf")
    layout = {"tensor_parallel": tp}
    ranks.run(CHECKS, "check_import", folder=str(tmp_path / "hf"), out=str(tmp_path / "mcore"), layout=layout)
