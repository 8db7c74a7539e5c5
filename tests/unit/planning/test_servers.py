"""SGLang servers in a plan: elsewhere, or on the trainer's GPUs in turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eaopd_megatron.config import load_recipe
from eaopd_megatron.planning.planner import Plan
from eaopd_megatron.planning.times import GiB
from eaopd_megatron.planning.workload import PlannedLayout, PlannedServers
from tests.unit.planning.examples import ROOT, USUAL, planner

LAYOUT = PlannedLayout(2, True, data_parallel=4)
COLOCATED = ("rollout.engine=sglang", "servers.placement=colocated", "weight_sync.transport=tensor", "servers.count=8")


def plan(servers: PlannedServers | None, **changes: Any) -> Plan:
    return Plan(replace(planner(**changes), servers=servers), LAYOUT, 8)


def test_the_servers_of_a_recipe_are_others() -> None:
    assert PlannedServers.from_recipe(load_recipe(USUAL)) is None
    assert PlannedServers.from_recipe(load_recipe(ROOT / "recipes/qwen3/0.6b_from_8b.yaml")) == PlannedServers(count=4)
    there = ["rollout.engine=sglang", "servers.urls=[http://a:1,http://b:1,http://c:1]", "rollout.max_staleness=1"]
    assert PlannedServers.from_recipe(load_recipe(USUAL, there)) == PlannedServers(count=3, ahead=True)
    found = PlannedServers.from_recipe(
        load_recipe(USUAL, [*COLOCATED, "servers.mem_fraction_static=0.5", "servers.max_concurrent_requests=7"])
    )
    assert found == PlannedServers(8, 1, "colocated", 0.5, 7)


def test_servers_elsewhere_take_the_trainers_memory() -> None:
    mine, theirs = plan(None).own, plan(PlannedServers()).own
    assert mine is not None and theirs is not None
    assert mine.memory.of("generation") > 0 and theirs.memory.of("generation") == 0
    assert [part for part in mine.memory.parts if part.role != "rollout"] == list(theirs.memory.parts)


def test_both_have_the_memory_at_the_same_time() -> None:
    """Gradients, main parameters and moments are away while colocated servers write; weights and teacher stay."""
    servers = PlannedServers(8, placement="colocated", mem_fraction_static=0.5)
    alone, shared = plan(None).own, plan(servers).own
    assert alone is not None and shared is not None
    before, memory = alone.memory, shared.memory
    away = [part.name for part in memory.parts if part.phase == "training"]
    assert away == ["gradients (fp32)", "main parameters", "Adam's moments"]
    lent, process = memory.of("training"), (3 + 7 * 0.5) * GiB  # the other seven read weights on the first GPU
    assert memory.of("always") + lent == before.of("always") + process
    assert memory.at("generation") == before.at("update") - before.of("update") - lent + process + 40 * GiB
    assert memory.at("update") == before.at("update") + process
    moved = plan(servers, offloaded_moments=True).own
    assert moved is not None
    assert (moved.memory.at("generation"), moved.memory.at("step")) == (memory.at("generation"), memory.at("step"))
    assert moved.memory.at("update") < memory.at("update")


def test_a_server_without_room_starts(planned: Callable[..., Any]) -> None:
    few = plan(PlannedServers(mem_fraction_static=0.1))
    assert not few.fits
    assert few.remedy() == (
        "servers.mem_fraction_static=0.1 of 80 GiB holds the student's weights (7.5 GiB a GPU) and 3,696 tokens, fewer "
        "than the 5,120 of a prompt and its response; raise servers.mem_fraction_static or servers.tensor_parallel"
    )
    assert "and 0 tokens" in plan(PlannedServers(mem_fraction_static=0.05)).remedy()
    assert plan(PlannedServers(tensor_parallel=2, mem_fraction_static=0.1)).fits
    code, shown, said = planned(str(USUAL), "rollout.engine=sglang", "servers.tensor_parallel=3", "--gpus", "8")
    refusal = "servers: Qwen/Qwen3-4B-Base: tensor_parallel=3 does not divide num_attention_heads=32"
    assert (code, said) == (1, f"error: {refusal}\n")
    assert f"the recipe's servers cannot work: {refusal}" in shown


def test_the_share_that_servers_may_have_is_not_said(planned: Callable[..., Any]) -> None:
    large = ("student.recompute=full", "--gpus", "2", "--teacher", "Qwen/Qwen3-14B")
    code, _, said = planned(str(USUAL), *COLOCATED, *large)
    assert code == 1
    share = said.strip().rpartition("change servers.mem_fraction_static, to at most ")[2]
    assert 0 < float(share) < 0.8
    assert planned(str(USUAL), *COLOCATED, *large, f"servers.mem_fraction_static={share}")[0] == 0
    more = f"servers.mem_fraction_static={float(share) + 0.02:g}"
    assert planned(str(USUAL), *COLOCATED, *large, more)[0] == 1


def test_generation_by_servers_has_the_trainers_time() -> None:
    times = {count: plan(PlannedServers(count)).own.seconds for count in (1, 8)}  # type: ignore[union-attr]
    assert times[8]["generation"] < times[1]["generation"] < plan(None).own.seconds["generation"]  # type: ignore[union-attr]
    one = plan(PlannedServers(max_concurrent_requests=1)).own
    assert one is not None  # 128 responses one after the other
    assert one.seconds["generation"] > 10 * times[1]["generation"]
    assert times[8]["weight sync"] == pytest.approx(8 * times[1]["weight sync"])


def test_responses_written_ahead_take_time_of_their_own() -> None:
    usual, ahead = plan(PlannedServers(8)).own, plan(PlannedServers(8, ahead=True)).own
    assert usual is not None and ahead is not None
    assert ahead.seconds == usual.seconds
    rest = usual.total - usual.seconds["generation"]
    assert ahead.total == pytest.approx(max(usual.seconds["generation"], rest)) != usual.total


def test_the_servers_numbers_are_not_shown(planned: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    recipe = str(ROOT / "recipes/qwen3/0.6b_from_8b.yaml")
    code, shown, _ = planned(recipe, "--gpus", "4", "--json", str(out))
    assert code == 0
    assert "servers: 4 on 4 more GPUs, one GPU each, 80% of its memory: " in shown
    numbers = json.loads(out.read_text())["servers"]
    weights = 596_049_920 * 2
    assert numbers["weight_sync_bytes"] == 4 * weights
    assert numbers["weight_bytes"] == weights
    assert numbers["cached_tokens"] == int((0.8 * 80 * GiB - weights) / (28 * 2 * 8 * 128 * 2))
    assert "servers: 8 on the trainer's GPUs" in planned(str(USUAL), *COLOCATED, "--gpus", "8")[1]
