"""Parameters, FLOPs and layouts, from a model's configuration alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eaopd_megatron.errors import UserError
from eaopd_megatron.models.families import family_of
from eaopd_megatron.models.shapes import ModelShape, ParameterCounts
from eaopd_megatron.models.supported import ModelInfo, built_in_shape, find_model
from eaopd_megatron.planning import times as flops
from eaopd_megatron.planning.workload import PlannedLayout, PlannedTeacher, enumerate_layouts, layout_refusals
from tests.unit.planning.examples import (
    ARCHITECTURES,
    FAMILIES,
    ROOT,
    SIZES,
    of_family,
    planner,
)

PUBLISHED = {
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
    "30B-A3B": 30_532_122_624,
    "235B-A22B": 235_093_634_560,
}


def test_planning_waits_for_megatron() -> None:
    program = "import sys, eaopd_megatron.planning.plan_report; print({'megatron', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(("size", "count"), PUBLISHED.items())
def test_the_built_in_table_is_of_another_model(size: str, count: int) -> None:
    shape = built_in_shape(f"Qwen/Qwen3-{size}")
    assert shape is not None and shape.hf_parameters().total == count
    assert built_in_shape(f"Qwen/Qwen3-{size}-Base") == shape
    assert built_in_shape(f"Qwen/Qwen3-{size}-FP8") is None


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_counts_other_parameters_than_transformers(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**of_family(kind))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    assert ModelShape.of(of_family(kind)).hf_parameters().total == count
    assert ModelShape.of(config) == ModelShape.of(config.to_dict())
    assert ModelShape.of(config).hf_parameters().total == count


@pytest.mark.parametrize("kind", FAMILIES)
def test_ranks_lose_or_repeat_parameters(kind: str) -> None:
    """Over all ranks of one copy, shards add up to the model with its padding, and what is held twice is known."""
    shape = ModelShape.of(of_family(kind))
    layout = PlannedLayout(2, True, 2, expert_parallel=2, expert_tensor_parallel=1, data_parallel=1)
    held = ParameterCounts()
    for stage in range(2):
        for _ in range(2):
            held += shape.rank_parameters(layout, stage)
    norms = 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)
    router = shape.expert_layers * shape.hidden * shape.experts
    padding = (512 - shape.vocab) * shape.hidden * 2  # of embedding and output layer, both on ranks of their own
    copy_of_tied = shape.vocab * shape.hidden if shape.tied else 0
    repeated = shape.layers * norms + shape.hidden + router
    assert held.total == shape.hf_parameters().total + repeated + padding + copy_of_tied
    assert held.expert == shape.hf_parameters().expert


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architecture GPT2LMHeadModel is not supported; supported: Qwen3ForCausalLM, Qwen3MoeForCausalLM, "
            "Qwen2ForCausalLM, LlamaForCausalLM (another one needs a mapping in eaopd_megatron/models/families.py)",
        ),
        (
            {"architectures": ["LlamaForCausalLM"]},
            "config.json has num_hidden_layers=None; it must be a whole number from 1",
        ),
        (of_family("qwen3") | {"hidden_size": 0}, "config.json has hidden_size=0; it must be a whole number from 1"),
    ],
)
def test_a_configuration_without_a_size_ends_in_a_traceback(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as raised:
        ModelShape.of(config, "x")
    assert str(raised.value) == f"x: {said}"


def test_a_model_is_guessed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"student.model: there is no folder a/b, HF_HUB_OFFLINE is set, and it is not"):
        find_model("a/b", "student.model")
    with pytest.raises(UserError, match=r"student.model: .*: config.json is missing"):
        find_model(str(tmp_path), "student.model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"student.model: .*config.json is no JSON: line 1"):
        find_model(str(tmp_path), "student.model")
    (tmp_path / "config.json").write_text(json.dumps(of_family("qwen3")))
    assert find_model(str(tmp_path), "student.model").shape == ModelShape.of(of_family("qwen3"))
    assert find_model("Qwen/Qwen3-8B", "teacher.model").source == "built-in table: HF_HUB_OFFLINE is set"


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        ((200, json.dumps(of_family("qwen3"))), "config.json from the hub"),
        ((404, ""), "built-in table: the Hugging Face hub answers 404"),
        (
            (200, "<html>"),
            "built-in table: the Hugging Face hub cannot be reached (JSONDecodeError)",
        ),
        ((200, "[]"), "built-in table: the Hugging Face hub's config.json is broken"),
    ],
)
def test_the_hub_is_asked_for_more_than_the_configuration(
    monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str], source: str
) -> None:
    asked: list[str] = []

    def download(url: str, headers: Mapping[str, str]) -> tuple[int, bytes]:
        asked.append(url)
        return answer[0], answer[1].encode()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("eaopd_megatron.models.supported._download", download)
    found = find_model("Qwen/Qwen3-4B", "student.model")
    assert [url.rpartition("/")[2] for url in asked] == ["config.json"]
    assert found.source == source
    assert (found.shape == ModelShape.of(of_family("qwen3"))) == (source == "config.json from the hub")


# FLOPs


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama"])
def test_flops_are_not_those_that_torch_counts(kind: str) -> None:
    """torch counts attention without the causal mask: every query with every key."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    length = 24
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**of_family(kind)), attn_implementation="eager")
    with FlopCounterMode(display=False) as forward:
        loss = model(torch.zeros(1, length, dtype=torch.long), use_cache=False).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    said = flops.forward_flops(ModelShape.of(of_family(kind)), length)
    rotations = model.config.head_dim * length if kind != "qwen2" else SIZES["hidden_size"] // 8 * length
    counted = forward.get_total_flops() - rotations  # transformers makes the angles by a product
    assert length * (said.layers + said.head + said.attention * 2 * length / (length + 1)) == pytest.approx(counted)
    assert backward.get_total_flops() == 2 * counted
    shape = ModelShape.of(of_family(kind))
    assert flops.flops_per_token(shape, length) == said.total
    assert flops.flops_per_token(shape, length, training=True) == 3 * said.total


def test_experts_that_a_token_does_not_meet_are_counted() -> None:
    shape = built_in_shape("Qwen/Qwen3-30B-A3B")
    assert shape is not None
    without_attention = flops.flops_per_token(shape, 1) - flops.forward_flops(shape, 1).attention
    norms = (2 * shape.hidden + 2 * shape.head_dim) * shape.layers + shape.hidden
    assert without_attention == 2 * (shape.active_parameters() - shape.vocab * shape.hidden - norms)
    assert flops.model_flops_utilization(989e12, 2.0, 4, 989e12) == 0.125


# Layouts


def test_a_layout_that_cannot_work_is_not_explained() -> None:
    dense, experts = built_in_shape("Qwen/Qwen3-4B"), built_in_shape("Qwen/Qwen3-235B-A22B")
    assert dense is not None and experts is not None
    assert layout_refusals(dense, PlannedLayout(4, True, 2, 3, data_parallel=2)) == []
    assert layout_refusals(dense, PlannedLayout(3)) == [
        "student.model: tensor_parallel=3 does not divide num_attention_heads=32",
        "student.model: tensor_parallel=3 does not divide num_key_value_heads=8",
        "student.model: tensor_parallel=3 does not divide intermediate_size=9728",
    ]
    assert layout_refusals(dense, PlannedLayout(pipeline_parallel=8)) == [
        "student.model: pipeline_parallel=8 does not divide num_hidden_layers=36"
    ]
    assert layout_refusals(dense, PlannedLayout(pipeline_parallel=2, virtual_pipeline=4)) == [
        "student.model: pipeline_parallel=2 x virtual_pipeline=4 does not divide num_hidden_layers=36"
    ]
    assert layout_refusals(dense, PlannedLayout(virtual_pipeline=2)) == [
        "student.model: virtual_pipeline=2 needs pipeline_parallel of 2 or more"
    ]
    assert layout_refusals(experts, PlannedLayout(8, True, data_parallel=1), "teacher.model") == [
        "teacher.model: tensor_parallel=8 does not divide num_key_value_heads=4"
    ]
    assert layout_refusals(experts, PlannedLayout(4, pipeline_parallel=2, expert_parallel=3)) == [
        "student.model: expert_parallel=3 does not divide num_experts=128",
        "student.model: experts under tensor_parallel=4 need sequence_parallel=true, or every rank would send the same "
        "tokens to them",
        "student.model: expert_parallel x expert_tensor_parallel x pipeline_parallel=6 does not divide the 8 GPUs",
    ]


@pytest.mark.parametrize("teacher", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("student", ["qwen3", "qwen3_moe"])
def test_the_plan_and_the_trainer_refuse_different_layouts(
    student: str, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan proposes what the trainer lets pass, and nothing else that it has looked at."""
    from transformers import AutoConfig

    from eaopd_megatron.config.parallel import ParallelLayout as TrainerLayout
    from eaopd_megatron.models.supported import check_supported
    from eaopd_megatron.teacher.build import model_layouts

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # gloo's own limit is no limit of a plan
    dictionaries = [of_family(kind) | {"architectures": [ARCHITECTURES[kind]]} for kind in (student, teacher)]
    for each in dictionaries:
        each |= {"norm_topk_prob": True, "mlp_only_layers": []} if "num_experts" in each else {}
    models = [ModelInfo("", ModelShape.of(each), "") for each in dictionaries]
    plan = replace(planner(), student=models[0], teachers=(PlannedTeacher(models[1]),))
    configs = [AutoConfig.for_model(**each) for each in dictionaries]
    folders: list[Any] = [
        SimpleNamespace(config=config, family=family_of(config.architectures, "")) for config in configs
    ]
    checked = [
        *enumerate_layouts(8, experts=True),
        PlannedLayout(2, data_parallel=4),
        PlannedLayout(1, False, 2, 2, data_parallel=4),
    ]
    for layout in checked:
        trainer = TrainerLayout(**{name: value for name, value in asdict(layout).items() if name != "data_parallel"})
        refused = False
        try:
            trainer.check_world_size(layout.gpus)
            for folder, cut in zip(folders, model_layouts(trainer, folders), strict=True):
                check_supported(folder.config, cut, "")
        except UserError:
            refused = True
        assert bool(plan.refusals(layout)) == refused, layout


@pytest.mark.parametrize("gpus", [1, 6, 16])
def test_a_layout_is_missing_or_of_other_gpus(gpus: int) -> None:
    found = list(enumerate_layouts(gpus, experts=True))
    assert len(found) == len(set(found))
    assert {layout.gpus for layout in found} == {gpus}
    assert PlannedLayout(data_parallel=gpus) in found


def test_stages_hold_other_layers_than_megatron_gives_them() -> None:
    interleaved = PlannedLayout(pipeline_parallel=2, virtual_pipeline=2)
    assert [interleaved.layers_of(stage, 8) for stage in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [PlannedLayout(pipeline_parallel=4).in_flight(stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert PlannedLayout(pipeline_parallel=4).in_flight(0, 2) == 2
    assert interleaved.in_flight(0, 8) == 2.5  # chunks of half a stage: 2 (2 − 1) + (2 − 1) 2 + 1
