"""Bytes of each phase, what is sent, and the estimates of time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from eaopd_megatron.models.shapes import ParameterCounts
from eaopd_megatron.models.supported import built_in_shape, find_model
from eaopd_megatron.planning import memory, traffic
from eaopd_megatron.planning.activations import Activations, gpu_layer_path
from eaopd_megatron.planning.memory import StudentGpus
from eaopd_megatron.planning.times import GiB, TimeEstimates
from eaopd_megatron.planning.workload import PlannedLayout, PlannedMicroBatch, PlannedTeacher
from tests.unit.planning.examples import (
    colocated,
    held,
    planner,
)


def test_the_distributed_optimiser_shards_experts_over_the_wrong_ranks() -> None:
    layout = PlannedLayout(2, True, 1, 1, 2, 4, 1, data_parallel=4)  # 16 GPUs, 4 copies of each expert
    held = ParameterCounts(dense=800, expert=400)
    assert memory.moment_bytes(held, layout, distributed=False) == 8 * 1200
    assert memory.moment_bytes(held, layout, distributed=True) == 8 * (800 / 8 + 400 / 4)
    assert memory.main_parameter_bytes(held, layout, 2, distributed=True) == 4 * (800 / 8 + 400 / 4)
    assert memory.main_parameter_bytes(held, layout, 4, distributed=True) == 0


def test_parallelism_leaves_activations_as_they_are() -> None:
    shape = built_in_shape("Qwen/Qwen3-8B")
    assert shape is not None
    batch = PlannedMicroBatch(8192, 8192)

    def kept(**changes: Any) -> float:
        recompute = changes.pop("recompute", "none")
        layout = PlannedLayout(**changes)
        return Activations(shape, layout, 2, "fused", recompute).peak(batch, 0, 8)

    whole = kept()
    assert kept(tensor_parallel=2, sequence_parallel=True) == pytest.approx(whole / 2, rel=0.01)
    assert kept(context_parallel=2) == pytest.approx(whole / 2, rel=0.01)
    assert kept(tensor_parallel=2) > 1.1 * whole / 2  # norms and residuals are on every rank
    assert kept(pipeline_parallel=4) == pytest.approx(whole, rel=0.01)  # a quarter of the layers, four in flight
    assert kept(recompute="full") < 0.1 * whole
    assert whole > kept(recompute="selective") > 0.9 * whole


def test_a_phase_that_is_over_is_counted_with_the_next() -> None:
    layout = PlannedLayout(2, True, data_parallel=4)
    work = planner().work
    found = StudentGpus(planner().student.shape, planner().teachers, layout, work, 5 * GiB).memory()
    always = sum(part.bytes for part in found.parts if part.phase == "always")
    phases = {name: found.of(name) for name in memory.MEMORY_PHASES[:3]}
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
    small, large = (PlannedTeacher(find_model(f"Qwen/Qwen3-{size}", "teacher.model")) for size in ("1.7B", "8B"))
    both, alone = colocated(small, large), colocated(large)
    assert sorted(held(both, "weights")) == sorted([*held(colocated(small), "weights"), *held(alone, "weights")])
    assert both.of("scoring") == alone.of("scoring")
    assert both.of("update") == alone.of("update")


def test_weights_in_fp8_are_counted_as_bf16() -> None:
    """Embedding and output layer stay bf16."""
    scorer = planner().teachers[0]
    layers = scorer.shape.hf_parameters().total - 2 * scorer.shape.vocab * scorer.shape.hidden - scorer.shape.hidden
    assert scorer.weights(PlannedLayout(), 0) - replace(scorer, fp8=True).weights(PlannedLayout(), 0) == layers


@pytest.mark.parametrize(("tied", "more"), [(True, 152_064), (False, 128)])
def test_another_vocabulary_size_is_planned_with_the_teachers_own_rows(tied: bool, more: int) -> None:
    """The output layer has the student's rows; tied, it becomes one of its own."""
    shape = replace(planner().student.shape, tied=tied)
    counts = [shape.rank_parameters(PlannedLayout(), 0, size).total for size in (None, 151_936, 152_064)]
    assert counts[0] == counts[1]
    assert counts[2] - counts[0] == more * shape.hidden
    assert shape.rank_parameters(PlannedLayout(2), 0, 152_064) == shape.rank_parameters(
        PlannedLayout(2), 0
    )  # both are padded to 152,064


def test_moments_on_the_host_stay_on_the_gpu() -> None:
    layout, usual = PlannedLayout(2, True, data_parallel=4), planner()
    kept, moved = (
        StudentGpus(usual.student.shape, (), layout, replace(usual.work, offloaded_moments=offloaded), 0).memory()
        for offloaded in (False, True)
    )
    count = memory.moment_bytes(usual.student.shape.rank_parameters(layout, 0), layout, distributed=False)
    assert kept.of("always") - moved.of("always") == moved.of("step") == count


def test_a_teacher_with_swapped_rows_shares_them_with_its_embedding() -> None:
    tied = planner().student
    weights = [PlannedTeacher(tied, swapped_rows=swapped).weights(PlannedLayout(), 0) for swapped in (False, True)]
    assert weights[1] - weights[0] == 2 * tied.shape.vocab * tied.shape.hidden


# Traffic


def test_traffic_counts_itself_on_one_gpu() -> None:
    shape, one = planner().student.shape, PlannedLayout()
    flows = [
        *traffic.training_traffic(shape, one, 4096, 2048, 2),
        *traffic.gradient_traffic(shape.hf_parameters(), one, 2, distributed=False),
    ]
    assert sum(flow.bytes for flow in flows) == 0


def test_sequence_parallel_sends_other_bytes_than_its_collectives() -> None:
    shape, tokens = replace(planner().student.shape, layers=1), 1024
    states = tokens * shape.hidden * 2
    plain = traffic.forward_traffic(shape, PlannedLayout(4), tokens, 2)[0]
    assert plain.bytes == pytest.approx(3 * 2 * 3 / 4 * states)  # attention, MLP, embedding: an all-reduce each
    forward = traffic.forward_traffic(shape, PlannedLayout(4, True), tokens, 2)[0]
    assert forward.bytes == pytest.approx((2 * 2 + 2) * 3 / 4 * states)  # the same, as a gather and a scatter each


def test_gradients_of_the_distributed_optimiser_are_reduced_to_all() -> None:
    layout, held = PlannedLayout(data_parallel=4), ParameterCounts(1000)
    (plain,) = traffic.gradient_traffic(held, layout, 2, distributed=False)
    (sharded,) = traffic.gradient_traffic(held, layout, 2, distributed=True)
    assert plain.bytes == 2 * 3 / 4 * 4 * 1000
    assert sharded.bytes == 3 / 4 * (4 + 2) * 1000


# Times


def test_an_estimate_forgets_the_bubble_or_the_launches() -> None:
    shape, work = planner().student.shape, replace(planner().work, mini_batch=8, micro_batch_tokens=5120)
    clock = planner().clock(work)
    free = TimeEstimates(replace(clock.gpu, host_link=1e30, network=1e30), clock.assumed, work)
    whole, staged = (
        free.scoring(shape, layout, 8 * 5120, head=False) for layout in (PlannedLayout(), PlannedLayout(1, False, 4))
    )
    assert staged == pytest.approx(whole / 4 * (1 + 3 / 8))
    assert (
        clock.generation(shape, PlannedLayout(8, True))
        > work.longest_response * shape.layers * clock.assumed.decode_layer
    )
    assert clock.update(shape, PlannedLayout()) < TimeEstimates(
        clock.gpu, clock.assumed, replace(work, recompute="full")
    ).update(shape, PlannedLayout())


def test_activations_without_transformer_engine_are_not_planned() -> None:
    """Not padded but where torch pads: in fp32. Its norms and MLPs keep more."""
    shape, short = planner().student.shape, PlannedMicroBatch(8192, 8192)
    padded = replace(short, padded=65536)

    def kept(batch: PlannedMicroBatch, element: int, engine: bool) -> float:
        path = gpu_layer_path(element, transformer_engine=engine)
        return Activations(shape, PlannedLayout(), element, path).of_stage(batch, 0)

    assert kept(padded, 2, True) == kept(short, 2, True) < kept(short, 2, False) == kept(padded, 2, False)
    assert kept(padded, 4, False) > 1.5 * kept(short, 4, False)
    one, other = (
        replace(planner(), transformer_engine=engine).memory(PlannedLayout(), planner().work)
        for engine in (True, False)
    )
    assert other.of("update") > one.of("update") and other.of("always") == one.of("always")


def test_a_checkpoint_takes_every_ranks_states_of_a_host() -> None:
    layout, held = PlannedLayout(data_parallel=4), ParameterCounts(dense=800, expert=0)
    assert memory.checkpoint_host_bytes(held, layout, 2, distributed=False) == (2 + 12) * 800
    assert memory.checkpoint_host_bytes(held, layout, 2, distributed=True) == (2 + 12 / 4) * 800
