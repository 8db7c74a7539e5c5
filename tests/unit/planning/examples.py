"""Recipes and models that the plan's tests share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from eaopd_megatron.config import load_recipe
from eaopd_megatron.models.supported import find_model
from eaopd_megatron.planning.memory import GpuMemory, StudentGpus
from eaopd_megatron.planning.planner import Planner
from eaopd_megatron.planning.times import find_gpu
from eaopd_megatron.planning.workload import PlannedLayout, PlannedTeacher, Workload

ROOT = Path(__file__).resolve().parents[3]
COUNTDOWN = str(ROOT / "recipes/countdown/eopd.yaml")
RECIPES = sorted((ROOT / "recipes/qwen3").glob("*.yaml"))
USUAL = ROOT / "recipes/qwen3/4b_from_8b.yaml"
SIZES = {
    "vocab_size": 310,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "llama": {},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
    },
}


def of_family(kind: str) -> dict[str, Any]:
    return {"model_type": kind, "architectures": [ARCHITECTURES[kind]], **SIZES, **FAMILIES[kind]}


def planner(teacher: str = "8B", *, limit: float = 80, **changes: Any) -> Planner:
    work = replace(Workload.from_recipe(load_recipe(USUAL)), **changes)
    student, other = (find_model(f"Qwen/Qwen3-{size}", "student.model") for size in ("4B-Base", teacher))
    return Planner(student, (PlannedTeacher(other),), work, find_gpu("h100"), limit)


def colocated(
    *scorers: PlannedTeacher, layout: PlannedLayout | None = None, student: str = "4B-Base", **changes: Any
) -> GpuMemory:
    """Memory of the student's GPUs."""
    shape = find_model(f"Qwen/Qwen3-{student}", "student.model").shape
    return StudentGpus(shape, scorers, layout or PlannedLayout(), planner(**changes).work, 0).memory()


def held(memory: GpuMemory, name: str) -> list[tuple[float, str]]:
    """Bytes and phase of the teachers' parts of this name."""
    return [(part.bytes, part.phase) for part in memory.parts if (part.role, part.name) == ("teacher", name)]
