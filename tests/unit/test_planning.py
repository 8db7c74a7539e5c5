"""`eaopd plan`: counts, memory, FLOPs and layouts, without a model that is run for them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from eaopd_megatron.checkpoint.families import family_of
from eaopd_megatron.cli import main
from eaopd_megatron.config import load_recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.planning import flops, memory, traffic
from eaopd_megatron.planning.activations import Activations, MicroBatch
from eaopd_megatron.planning.configs import Model, built_in, find_model
from eaopd_megatron.planning.hardware import GiB, gpu_named
from eaopd_megatron.planning.layouts import Layout, faults, layouts
from eaopd_megatron.planning.memory import Colocated, Memory
from eaopd_megatron.planning.planner import Plan, Planner
from eaopd_megatron.planning.scorer import Scorer
from eaopd_megatron.planning.shapes import ModelShape, Parameters
from eaopd_megatron.planning.times import Clock
from eaopd_megatron.planning.workload import Workload

ROOT = Path(__file__).resolve().parents[2]
COUNTDOWN = str(ROOT / "recipes/countdown/eopd.yaml")
RECIPES = sorted((ROOT / "recipes/qwen3").glob("*.yaml"))
USUAL = ROOT / "recipes/qwen3/4b_from_8b.yaml"
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
SIZES = {
    "vocab_size": 310,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "llama": {},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
}


def of_family(kind: str) -> dict[str, Any]:
    return {"model_type": kind, **SIZES, **FAMILIES[kind]}


@pytest.fixture(autouse=True)
def _without_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no_cache"))


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `eaopd plan`; (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["plan", *arguments])
        shown = capsys.readouterr()
        return int(stopped.value.code or 0), shown.out, shown.err

    return run


def planner(teacher: str = "8B", *, limit: float = 80, **changes: Any) -> Planner:
    work = replace(Workload.of(load_recipe(USUAL)), **changes)
    student, other = (find_model(f"Qwen/Qwen3-{size}", "student.model") for size in ("4B-Base", teacher))
    return Planner(student, (Scorer(other),), work, gpu_named("h100"), limit)


def colocated(*scorers: Scorer, layout: Layout | None = None, student: str = "4B-Base", **changes: Any) -> Memory:
    """Memory of the student's GPUs."""
    shape = find_model(f"Qwen/Qwen3-{student}", "student.model").shape
    return Colocated(shape, scorers, layout or Layout(), planner(**changes).work, 0).memory()


def held(memory: Memory, name: str) -> list[tuple[float, str]]:
    """Bytes and phase of the teachers' parts of this name."""
    return [(part.bytes, part.phase) for part in memory.parts if (part.role, part.name) == ("teacher", name)]


def test_planning_waits_for_megatron() -> None:
    program = "import sys, eaopd_megatron.planning.command; print({'megatron', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


# Parameters


@pytest.mark.parametrize(("size", "count"), PUBLISHED.items())
def test_the_built_in_table_is_of_another_model(size: str, count: int) -> None:
    shape = built_in(f"Qwen/Qwen3-{size}")
    assert shape is not None and shape.whole().total == count
    assert built_in(f"Qwen/Qwen3-{size}-Base") == shape
    assert built_in(f"Qwen/Qwen3-{size}-FP8") is None


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_counts_other_parameters_than_transformers(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**of_family(kind))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    assert ModelShape.of(of_family(kind)).whole().total == count
    assert ModelShape.of(config) == ModelShape.of(config.to_dict())
    assert ModelShape.of(config).whole().total == count


@pytest.mark.parametrize("kind", FAMILIES)
def test_ranks_lose_or_repeat_parameters(kind: str) -> None:
    """Over all ranks of one copy, shards add up to the model with its padding, and what is held twice is known."""
    shape = ModelShape.of(of_family(kind))
    layout = Layout(2, True, 2, expert_parallel=2, expert_tensor_parallel=1, data_parallel=1)
    held = Parameters()
    for stage in range(2):
        for _ in range(2):
            held += shape.on_rank(layout, stage)
    norms = 2 * shape.hidden + (2 * shape.head_dim if shape.qk_norm else 0)
    router = len(shape.expert_layers) * shape.hidden * shape.experts
    padding = (512 - shape.vocab) * shape.hidden * 2  # of embedding and output layer, both on ranks of their own
    copy_of_tied = shape.vocab * shape.hidden if shape.tied else 0
    repeated = shape.layers * norms + shape.hidden + router
    assert held.total == shape.whole().total + repeated + padding + copy_of_tied
    assert held.expert == shape.whole().expert


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' cannot be planned; supported: llama, qwen2, qwen3, qwen3_moe"),
        ({"model_type": "llama"}, "config.json has num_hidden_layers=None; it must be a whole number from 1"),
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
    with pytest.raises(UserError, match=r"student.model: .* has no config.json"):
        find_model(str(tmp_path), "student.model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"student.model: .*config.json cannot be read"):
        find_model(str(tmp_path), "student.model")
    (tmp_path / "config.json").write_text(json.dumps(of_family("qwen3")))
    assert find_model(str(tmp_path), "student.model").shape == ModelShape.of(of_family("qwen3"))
    assert find_model("Qwen/Qwen3-8B", "teacher.model").source == "built-in table: HF_HUB_OFFLINE is set"


@pytest.mark.parametrize(
    ("answer", "source"),
    [
        (httpx.Response(200, json=of_family("qwen3")), "config.json from the hub"),
        (httpx.Response(404), "built-in table: the Hugging Face hub answers 404"),
        (
            httpx.Response(200, text="<html>"),
            "built-in table: the Hugging Face hub cannot be reached (JSONDecodeError)",
        ),
        (httpx.Response(200, json=[]), "built-in table: the Hugging Face hub's config.json is broken"),
    ],
)
def test_the_hub_is_asked_for_more_than_the_configuration(
    monkeypatch: pytest.MonkeyPatch, answer: httpx.Response, source: str
) -> None:
    asked: list[str] = []

    def get(url: str, **options: Any) -> httpx.Response:
        asked.append(url)
        return answer

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("httpx.get", get)
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
    shape = built_in("Qwen/Qwen3-30B-A3B")
    assert shape is not None
    without_attention = flops.flops_per_token(shape, 1) - flops.forward_flops(shape, 1).attention
    norms = (2 * shape.hidden + 2 * shape.head_dim) * shape.layers + shape.hidden
    assert without_attention == 2 * (shape.active() - shape.vocab * shape.hidden - norms)
    assert flops.utilisation(989e12, 2.0, 4, 989e12) == 0.125


# Layouts


def test_a_layout_that_cannot_work_is_not_explained() -> None:
    dense, experts = built_in("Qwen/Qwen3-4B"), built_in("Qwen/Qwen3-235B-A22B")
    assert dense is not None and experts is not None
    assert faults(dense, Layout(4, True, 2, 3, data_parallel=2)) == []
    assert faults(dense, Layout(3)) == [
        "student.tensor_parallel=3 does not divide the student's num_attention_heads=32",
        "student.tensor_parallel=3 does not divide the student's num_key_value_heads=8",
        "student.tensor_parallel=3 does not divide the student's intermediate_size=9728",
    ]
    assert faults(dense, Layout(pipeline_parallel=8)) == [
        "student.pipeline_parallel=8 does not divide the student's num_hidden_layers=36"
    ]
    assert faults(dense, Layout(pipeline_parallel=2, virtual_pipeline=4)) == [
        "student.pipeline_parallel x virtual_pipeline=8 does not divide the student's num_hidden_layers=36"
    ]
    assert faults(dense, Layout(virtual_pipeline=2)) == [
        "student.virtual_pipeline=2 needs student.pipeline_parallel of 2 up"
    ]
    assert faults(experts, Layout(8, True, data_parallel=1), "teacher") == [
        "student.tensor_parallel=8 does not divide the teacher's num_key_value_heads=4"
    ]
    assert faults(experts, Layout(4, pipeline_parallel=2, expert_parallel=3)) == [
        "student.expert_parallel=3 does not divide the student's num_experts=128",
        "experts at student.tensor_parallel above 1 need student.sequence_parallel=true",
        "student.expert_parallel x expert_tensor_parallel x pipeline_parallel=6 does not divide the 8 GPUs",
    ]


@pytest.mark.parametrize("teacher", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("student", ["qwen3", "qwen3_moe"])
def test_the_plan_and_the_trainer_refuse_different_layouts(
    student: str, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan proposes what the trainer lets pass, and nothing else that it has looked at."""
    from transformers import AutoConfig

    from eaopd_megatron.megatron.architecture import check_config
    from eaopd_megatron.megatron.groups import Layout as TrainerLayout
    from eaopd_megatron.teacher.build import layouts_of

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # gloo's own limit is no limit of a plan
    dictionaries = [of_family(kind) | {"architectures": [ARCHITECTURES[kind]]} for kind in (student, teacher)]
    for each in dictionaries:
        each |= {"norm_topk_prob": True, "mlp_only_layers": []} if "num_experts" in each else {}
    models = [Model("", ModelShape.of(each), "") for each in dictionaries]
    plan = replace(planner(), student=models[0], teachers=(Scorer(models[1]),))
    configs = [AutoConfig.for_model(**each) for each in dictionaries]
    folders: list[Any] = [
        SimpleNamespace(config=config, family=family_of(config.architectures, "")) for config in configs
    ]
    checked = [*layouts(8, experts=True), Layout(2, data_parallel=4), Layout(1, False, 2, 2, data_parallel=4)]
    for layout in checked:
        trainer = TrainerLayout(**{name: value for name, value in asdict(layout).items() if name != "data_parallel"})
        refused = False
        try:
            trainer.check_world(layout.gpus)
            for folder, cut in zip(folders, layouts_of(trainer, folders), strict=True):
                check_config(folder.config, cut, "")
        except UserError:
            refused = True
        assert bool(plan.refusals(layout)) == refused, layout


@pytest.mark.parametrize("gpus", [1, 6, 16])
def test_a_layout_is_missing_or_of_other_gpus(gpus: int) -> None:
    found = list(layouts(gpus, experts=True))
    assert len(found) == len(set(found))
    assert {layout.gpus for layout in found} == {gpus}
    assert Layout(data_parallel=gpus) in found


def test_stages_hold_other_layers_than_megatron_gives_them() -> None:
    interleaved = Layout(pipeline_parallel=2, virtual_pipeline=2)
    assert [interleaved.layers_of(stage, 8) for stage in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [Layout(pipeline_parallel=4).in_flight(stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert Layout(pipeline_parallel=4).in_flight(0, 2) == 2
    assert interleaved.in_flight(0, 8) == 2.5  # chunks of half a stage: 2 (2 − 1) + (2 − 1) 2 + 1


# Memory


def test_the_distributed_optimiser_shards_experts_over_the_wrong_ranks() -> None:
    layout = Layout(2, True, 1, 1, 2, 4, 1, data_parallel=4)  # 16 GPUs, 4 copies of each expert
    held = Parameters(dense=800, expert=400)
    assert memory.moments(held, layout, distributed=False) == 8 * 1200
    assert memory.moments(held, layout, distributed=True) == 8 * (800 / 8 + 400 / 4)
    assert memory.main_parameters(held, layout, 2, distributed=True) == 4 * (800 / 8 + 400 / 4)
    assert memory.main_parameters(held, layout, 4, distributed=True) == 0


def test_parallelism_leaves_activations_as_they_are() -> None:
    shape = built_in("Qwen/Qwen3-8B")
    assert shape is not None
    batch = MicroBatch(8192, 8192)

    def kept(**changes: Any) -> float:
        recompute = changes.pop("recompute", "none")
        layout = Layout(**changes)
        return Activations(shape, layout, 2, "fused", recompute).peak(batch, 0, 8)

    whole = kept()
    assert kept(tensor_parallel=2, sequence_parallel=True) == pytest.approx(whole / 2, rel=0.01)
    assert kept(context_parallel=2) == pytest.approx(whole / 2, rel=0.01)
    assert kept(tensor_parallel=2) > 1.1 * whole / 2  # norms and residuals are on every rank
    assert kept(pipeline_parallel=4) == pytest.approx(whole, rel=0.01)  # a quarter of the layers, four in flight
    assert kept(recompute="full") < 0.1 * whole
    assert whole > kept(recompute="selective") > 0.9 * whole


def test_a_phase_that_is_over_is_counted_with_the_next() -> None:
    layout = Layout(2, True, data_parallel=4)
    work = planner().work
    found = Colocated(planner().student.shape, planner().teachers, layout, work, 5 * GiB).memory()
    always = sum(part.bytes for part in found.parts if part.phase == "always")
    phases = {name: found.of(name) for name in ("generation", "scoring", "update")}
    assert min(phases.values()) > 0
    assert found.peak == always + max(phases.values()) + 5 * GiB
    assert found.largest == max(found.parts, key=lambda part: part.bytes)


@pytest.mark.parametrize(
    ("placement", "signal", "part"),
    [
        ("colocated", "hidden", "hidden states of an update"),
        ("colocated", "topk", "top-k of the iteration"),
        ("separate", "hidden", "hidden states of a micro-batch"),
        ("separate", "hidden", "output layer"),
        ("served", "topk", "top-k of the iteration"),
    ],
)
def test_the_teachers_signal_takes_no_memory(placement: Any, signal: Any, part: str) -> None:
    found = colocated(replace(*planner().teachers, placement=placement, signal=signal))
    assert held(found, part)
    assert bool(held(found, "weights")) == (placement == "colocated")


@pytest.mark.parametrize(("signal", "head"), [("topk", []), ("hidden", [(151936 * 4096 * 2, "update")])])
def test_weights_on_the_host_stay_on_the_gpu(signal: Any, head: list[Any]) -> None:
    """They are there while they score, and the output layer while the objective reads it."""
    here = replace(*planner().teachers, signal=signal)
    away = replace(here, offloaded=True)
    ((count, when),) = held(colocated(here), "weights")
    assert when == "always" and not held(colocated(here), "output layer")
    assert held(colocated(away), "weights, else in host memory") == [(count, "scoring")]
    assert held(colocated(away), "output layer") == head


def test_of_several_teachers_one_is_counted() -> None:
    """All weights stay; they score one after the other."""
    small, large = (Scorer(find_model(f"Qwen/Qwen3-{size}", "teacher.model")) for size in ("1.7B", "8B"))
    both, alone = colocated(small, large), colocated(large)
    assert sorted(held(both, "weights")) == sorted([*held(colocated(small), "weights"), *held(alone, "weights")])
    assert both.of("scoring") == alone.of("scoring")
    assert both.of("update") == alone.of("update")


def test_weights_in_fp8_are_counted_as_bf16() -> None:
    """Embedding and output layer stay bf16."""
    scorer = planner().teachers[0]
    layers = scorer.shape.whole().total - 2 * scorer.shape.vocab * scorer.shape.hidden - scorer.shape.hidden
    assert scorer.weights(Layout(), 0) - replace(scorer, fp8=True).weights(Layout(), 0) == layers


@pytest.mark.parametrize(("tied", "more"), [(True, 152_064), (False, 128)])
def test_another_vocabulary_size_is_planned_with_the_teachers_own_rows(tied: bool, more: int) -> None:
    """The output layer has the student's rows; tied, it becomes one of its own."""
    shape = replace(planner().student.shape, tied=tied)
    counts = [shape.on_rank(Layout(), 0, size).total for size in (None, 151_936, 152_064)]
    assert counts[0] == counts[1]
    assert counts[2] - counts[0] == more * shape.hidden
    assert shape.on_rank(Layout(2), 0, 152_064) == shape.on_rank(Layout(2), 0)  # both are padded to 152,064


def test_moments_on_the_host_stay_on_the_gpu() -> None:
    layout, usual = Layout(2, True, data_parallel=4), planner()
    kept, moved = (
        Colocated(usual.student.shape, (), layout, replace(usual.work, offloaded_moments=offloaded), 0).memory()
        for offloaded in (False, True)
    )
    count = memory.moments(usual.student.shape.on_rank(layout, 0), layout, distributed=False)
    assert kept.of("always") - moved.of("always") == moved.of("step") == count


def test_a_teacher_with_swapped_rows_shares_them_with_its_embedding() -> None:
    tied = planner().student
    weights = [Scorer(tied, swapped_rows=swapped).weights(Layout(), 0) for swapped in (False, True)]
    assert weights[1] - weights[0] == 2 * tied.shape.vocab * tied.shape.hidden


# Traffic


def test_traffic_counts_itself_on_one_gpu() -> None:
    shape, one = planner().student.shape, Layout()
    flows = [*traffic.training(shape, one, 4096, 2048, 2), *traffic.gradients(shape.whole(), one, 2, distributed=False)]
    assert sum(flow.bytes for flow in flows) == 0


def test_sequence_parallel_sends_other_bytes_than_its_collectives() -> None:
    shape, tokens = replace(planner().student.shape, layers=1), 1024
    states = tokens * shape.hidden * 2
    plain = traffic.forward(shape, Layout(4), tokens, 2)[0]
    assert plain.bytes == pytest.approx(3 * 2 * 3 / 4 * states)  # attention, MLP, embedding: an all-reduce each
    forward = traffic.forward(shape, Layout(4, True), tokens, 2)[0]
    assert forward.bytes == pytest.approx((2 * 2 + 2) * 3 / 4 * states)  # the same, as a gather and a scatter each


def test_gradients_of_the_distributed_optimiser_are_reduced_to_all() -> None:
    layout, held = Layout(data_parallel=4), Parameters(1000)
    (plain,) = traffic.gradients(held, layout, 2, distributed=False)
    (sharded,) = traffic.gradients(held, layout, 2, distributed=True)
    assert plain.bytes == 2 * 3 / 4 * 4 * 1000
    assert sharded.bytes == 3 / 4 * (4 + 2) * 1000


# Times


def test_an_estimate_forgets_the_bubble_or_the_launches() -> None:
    shape, work = planner().student.shape, replace(planner().work, mini_batch=8, micro_batch_tokens=5120)
    clock = planner().clock(work)
    free = Clock(replace(clock.gpu, host_link=1e30, network=1e30), clock.assumed, work)
    whole, staged = (free.scoring(shape, layout, 8 * 5120, head=False) for layout in (Layout(), Layout(1, False, 4)))
    assert staged == pytest.approx(whole / 4 * (1 + 3 / 8))
    assert clock.generation(shape, Layout(8, True)) > work.longest_response * shape.layers * clock.assumed.decode_layer
    assert clock.update(shape, Layout()) < Clock(clock.gpu, clock.assumed, replace(work, recompute="full")).update(
        shape, Layout()
    )


# The plan


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_repository_does_not_fit(path: Path, planned: Callable[..., Any]) -> None:
    code, shown, said = planned(str(path), "--gpus", "8", "--gpu-memory", "80")
    assert (code, said) == (0, "")
    assert "of 80: fits" in shown
    assert "estimates" in shown
    tables = shown.split("\nassumed")[0].splitlines()
    assert all(
        len(line) <= 100
        for line in tables
        if "parameters" not in line and not line.startswith(("best", "the ", "teacher ("))
    )


def test_the_best_layout_cannot_be_pasted(planned: Callable[..., Any], tmp_path: Path) -> None:
    recipe = str(USUAL)
    out = tmp_path / "plan.json"
    code, shown, said = planned(recipe, "--teacher", "Qwen/Qwen3-32B", "--json", str(out))
    assert code == 1
    assert "does not fit" in shown
    assert said.count("\n") == 1
    numbers = json.loads(out.read_text())
    assert not numbers["fits"]
    best = numbers["layouts"][0]["overrides"]
    assert f"change student.tensor_parallel; the best layout that fits: {best}" in said
    assert planned(recipe, *best.split(), "--teacher", "Qwen/Qwen3-32B")[0] == 0


def test_a_teacher_that_is_too_large_is_not_given_gpus_of_its_own(planned: Callable[..., Any]) -> None:
    recipe = str(USUAL)
    code, shown, said = planned(recipe, "--teacher", "Qwen/Qwen3-235B-A22B", "--gpus", "4")
    assert code == 1
    assert "\nteacher on GPUs of its own (teacher.placement=separate):\n  8 GPUs, " in shown
    assert "layouts of the student alone on 4 GPUs that fit" in shown
    assert said.endswith(
        "no layout of 4 GPUs holds student.model and teacher.model together: "
        "take a smaller teacher.model, more --gpus, or teacher.placement=separate\n"
    )


ELSEWHERE = ("teacher.placement=separate", "teacher.tensor_parallel=2", "teacher.replicas=2", "--gpus", "8")


def test_a_separate_teacher_is_planned_on_the_students_gpus(planned: Callable[..., Any], tmp_path: Path) -> None:
    recipe, out = str(USUAL), tmp_path / "plan.json"
    code, shown, said = planned(recipe, *ELSEWHERE, "teacher.signal=hidden", "--json", str(out))
    assert (code, said) == (0, "")
    numbers = json.loads(out.read_text())
    (teacher,) = numbers["elsewhere"]
    assert (teacher["gpus"], teacher["layout"], teacher["bytes_a_token"]) == (4, "TP2", 8192)
    assert teacher["bytes_an_iteration"] == 128 * 4096 * 8192  # the design's 4.3 GB
    assert "2 x 2 GPUs, TP2: " in shown
    assert "hidden states of 8,192 bytes a response token over HTTP, at most 4.29 GB an iteration" in shown
    assert "layouts of the student alone that fit" in shown
    parts = {part["part"]: part["phase"] for part in numbers["recipe"]["parts"] if part["role"] == "teacher"}
    assert parts == {"output layer": "always", "hidden states of a micro-batch": "update"}
    assert "teacher" not in numbers["recipe"]["estimated_seconds"]


@pytest.mark.parametrize(("placement", "said"), [("separate", "136 bytes"), ("served", "132 bytes")])
def test_what_top_k_sends_is_unknown(planned: Callable[..., Any], placement: str, said: str) -> None:
    """A served teacher sends no entropy."""
    shown = planned(str(USUAL), f"teacher.placement={placement}", "teacher.signal=topk", "--gpus", "8")[1]
    assert f"top-16 of {said} a response token" in shown


def test_a_teacher_too_large_for_its_own_gpus_fits(planned: Callable[..., Any]) -> None:
    recipe = str(USUAL)
    two = ("teachers.math.offload=weights", "teachers.code.model=Qwen/Qwen3-32B", "teachers.code.placement=separate")
    code, shown, said = planned(recipe, *two, "--gpus", "8", "--gpu-memory", "64")
    assert code == 1 and "teacher code (separate): 1 GPUs, one GPU: " in shown
    assert said.startswith("error: teachers.code: a GPU of its own needs ") and said.count("\n") == 1
    assert "change teachers.code.tensor_parallel; the fewest GPUs that hold it: 2" in said
    code, _, said = planned(recipe, *two, "teachers.code.tensor_parallel=3", "--gpus", "8")
    assert said.startswith("error: teachers.code.tensor_parallel=3 does not divide the teacher code's num_attention")
    assert planned(recipe, *two, "teachers.code.tensor_parallel=4", "--gpus", "8", "--gpu-memory", "64")[0] == 0


def test_a_layout_that_is_left_out_is_not_explained(planned: Callable[..., Any]) -> None:
    shown = planned(str(ROOT / "recipes/qwen3/4b_from_30b_a3b.yaml"), "--gpus", "8")[1]
    assert " cannot be cut: student.tensor_parallel=8 does not divide the teacher's num_key_value_heads=4" in shown
    assert " cannot be cut: student.pipeline_parallel=8 does not divide the student's num_hidden_layers=36" in shown
    assert " need more memory; of them " in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "tpu"), "--gpu tpu: unknown; known are a100, h100, h200, b200"),
        (
            ("--teacher", "x/y", "teachers.math.signal=topk"),
            "--teacher is for one teacher; with several ",
        ),
        (("--teacher", "nowhere"), "teacher.model: nowhere is no folder with a config.json and no hub id owner/name"),
        (
            ("student.tensor_parallel=3", "--gpus", "3"),
            "student.tensor_parallel=3 does not divide the student's num_attention_heads=4",
        ),
        (
            ("--gpus", "3"),
            "the recipe's 2 GPUs a copy (tensor x pipeline x context parallel) do not divide 3",
        ),
        (
            ("student.expert_parallel=2",),
            "student.expert_parallel=2 needs experts, which the student does not have",
        ),
    ],
)
def test_bad_input_ends_in_a_traceback(planned: Callable[..., Any], arguments: tuple[str, ...], said: str) -> None:
    code, _, error = planned(COUNTDOWN, *arguments)
    assert code == 1
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_plan_writes_no_file_and_says_nothing(planned: Callable[..., Any], tmp_path: Path) -> None:
    code, _, said = planned(COUNTDOWN, "--json", str(tmp_path / "none" / "x.json"))
    assert (code, said) == (1, f"error: --json {tmp_path}/none/x.json: No such file or directory\n")


def test_the_fastest_layout_is_not_first() -> None:
    found = Plan(planner(), Layout(2, True, data_parallel=4), 8).together.options
    assert len(found) > 3
    assert found[0].total <= 1.02 * min(option.total for option in found)
    assert all(option.memory.peak <= 80 * GiB for option in found)


def test_memory_is_not_saved_before_a_layout_is_given_up() -> None:
    plain = planner(limit=46, micro_batch_tokens=32768)
    found = {option.layout: option.work for option in plain.search(8).options}
    assert {work.micro_batch_tokens for work in found.values()} > {5120, 32768}
    assert any(work.recompute == "full" for work in found.values())
    assert found[Layout(2, True, data_parallel=4)].distributed_optimizer
    assert all(not work.distributed_optimizer for work in found.values() if work == plain.work)


def test_overrides_leave_what_the_recipe_says_otherwise(planned: Callable[..., Any]) -> None:
    """A recipe at context_parallel=2 is told to set it back to 1."""
    recipe, own = (
        str(ROOT / "recipes/qwen3/4b_from_32b.yaml"),
        (
            "student.tensor_parallel=1",
            "student.sequence_parallel=false",
            "student.context_parallel=8",
            "student.recompute=selective",
        ),
    )
    code, _, said = planned(recipe, *own, "--gpus", "8")
    assert code == 1
    assert "; change student.tensor_parallel; " in said
    best = said.split("fits: ")[1].split()
    assert "student.context_parallel=1" in best
    assert planned(recipe, *own, *best)[0] == 0


def test_the_remedy_names_a_key_that_stays() -> None:
    work = planner(rollout_batch=128).work
    plan = Plan(replace(planner(), work=work), Layout(2, True), 2)
    assert "; change rollout.batch_size; the best layout that fits: rollout.batch_size=64 " in plan.remedy()
