"""Schedule, sampling, averages, terminal map: small parts with large consequences."""

import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eaopd_megatron.config import load_recipe
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.data.packing import collate
from eaopd_megatron.data.types import Prompt, Sample
from eaopd_megatron.megatron.generation import decode_mode
from eaopd_megatron.objective import Objective
from eaopd_megatron.reporting.alerts import AlertMonitor, alert_rules
from eaopd_megatron.rollout.local import sample_tokens
from eaopd_megatron.teacher.build import model_layouts
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.training.measurement import MetricAccumulator, ProfilerWindow, ThroughputMeter
from eaopd_megatron.training.schedule import LearningRateSchedule, ObjectiveSchedule


def test_the_learning_rate_depends_on_completed_updates_alone() -> None:
    schedule = LearningRateSchedule(peak=1.0, total=110, warmup=10, floor=0.1)
    assert schedule(0) == pytest.approx(0.1)  # the first update is not lost to a rate of 0
    assert schedule(9) == schedule(10) == 1.0
    assert schedule(60) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule(110) == schedule(500) == pytest.approx(0.1)
    assert LearningRateSchedule(1.0, 100, "linear")(25) == 0.75
    assert LearningRateSchedule(1.0, 100, "constant", warmup=4)(77) == 1.0
    assert schedule(60) == schedule(60)


def test_threshold_and_weight_follow_completed_updates() -> None:
    start = Objective.preset("eopd")
    schedule = ObjectiveSchedule(start, total=10, threshold_end=1.2, forward_weight_end=0.0)
    assert schedule(0) == start
    assert schedule(5).threshold == pytest.approx(1.0)
    assert schedule(5).forward_weight == pytest.approx(0.5)
    assert (schedule(10).threshold, schedule(99).forward_weight) == (1.2, 0.0)
    assert ObjectiveSchedule(start, total=10)(7) == start


def test_samples_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    tokens = sample_tokens(probs.log().expand(len(grid), 4), grid, temperature=1.0, top_p=1.0)
    share = torch.bincount(tokens, minlength=4) / len(grid)
    assert torch.allclose(share, probs, atol=2e-4)
    assert share[1] == 0


def test_a_token_of_probability_zero_is_never_drawn_at_the_ends() -> None:
    logprobs = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).log()
    for u in (0.0, math.nextafter(1.0, 0.0)):
        assert sample_tokens(logprobs, torch.tensor([u], dtype=torch.float64), temperature=1.0, top_p=1.0).item() in (
            1,
            2,
        )


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probs = torch.tensor([0.1, 0.6, 0.3])
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    tokens = sample_tokens(probs.log().expand(len(grid), 3), grid, temperature=1.0, top_p=0.8)
    share = torch.bincount(tokens, minlength=3) / len(grid)
    assert torch.allclose(share, torch.tensor([0.0, 2 / 3, 1 / 3]), atol=2e-3)
    assert sample_tokens(probs.log()[None], torch.tensor([0.99]).double(), temperature=1.0, top_p=0.01).item() == 1
    assert sample_tokens(probs.log()[None], torch.tensor([0.99]).double(), temperature=0.0, top_p=1.0).item() == 1


def test_expert_parallelism_is_that_of_the_model_with_experts() -> None:
    """Given to the dense one it would be refused, and no dense model could learn from a mixture of experts."""

    def folder(*sizes: str) -> Any:
        return SimpleNamespace(family=SimpleNamespace(has_experts="experts" in sizes))

    layout = ParallelLayout(2, True, expert_parallel=2, expert_tensor_parallel=2)
    dense = ParallelLayout(2, True)
    assert model_layouts(layout, [folder(), folder("experts")]) == [dense, layout]
    assert model_layouts(layout, [folder("experts"), folder()]) == [layout, dense]
    assert model_layouts(layout, [folder("experts"), folder("experts")]) == [layout, layout]
    assert model_layouts(layout, [folder(), folder()]) == [layout, layout]  # and `check_supported` refuses it


class Engine(torch.nn.Module):
    """Transformer Engine's attention as far as context parallelism goes."""

    def __init__(self) -> None:
        super().__init__()
        self.set_context_parallel_group("group", [0, 1], "stream", "a2a")

    def set_context_parallel_group(self, group: Any, ranks: Any, stream: Any, kind: str = "p2p") -> None:
        self.cp_group, self.cp_global_ranks, self.cp_stream, self.cp_comm_type = group, ranks, stream, kind


def test_decoding_leaves_the_engines_attention_without_its_context_group() -> None:
    """Left on, each rank would attend to its part of another rank's sequence; left off, training would be wrong."""
    engine = Engine()
    model: Any = torch.nn.ModuleList([engine])
    model.gpts = [model]
    model.rotary_pos_emb = SimpleNamespace(cp_group="group")
    model.config = SimpleNamespace(sequence_parallel=False)
    with pytest.raises(KeyError), decode_mode(model):
        assert (engine.cp_group, model.rotary_pos_emb.cp_group, model.training) == (None, None, False)
        raise KeyError
    assert (engine.cp_group, engine.cp_global_ranks, engine.cp_stream, engine.cp_comm_type) == (
        "group",
        [0, 1],
        "stream",
        "a2a",
    )
    assert (model.rotary_pos_emb.cp_group, model.training) == ("group", True)


def test_a_mean_over_micro_batches_counts_tokens_and_not_batches() -> None:
    averages = MetricAccumulator()
    averages.add("x", torch.tensor([1.0]))
    averages.add("x", torch.tensor([4.0, 7.0]), where=torch.tensor([True, True]))
    averages.add("gated", torch.tensor([5.0, 9.0]), where=torch.tensor([False, True]))
    averages.add("nobody", torch.tensor([5.0]), where=torch.tensor([False]))
    averages.add_minimum("least", torch.tensor([3.0, -2.0]))
    averages.add_minimum("least", torch.tensor([1.0]))
    averages.add_minimum("none", torch.tensor([]))
    assert averages.reduce(None) == {"x": 4.0, "gated": 9.0, "least": -2.0}


def test_the_terminal_map_touches_only_the_students_stop() -> None:
    stopped = Sample(Prompt("a", (1,), {}), [7, 2, 7], "stop", [0.0] * 3, 0)
    cut = Sample(Prompt("b", (1,), {}), [7, 7], "length", [0.0] * 2, 0)
    other = Sample(Prompt("c", (1,), {}), [9], "stop", [0.0], 0)  # stopped by the teacher's own id
    batch = collate([stopped, cut, other], torch.device("cpu"))
    label = TerminalMap.between("label", [7], [9, 7])
    found = label.batch_target_ids(batch)
    assert found is not None and found.tolist() == [7, 2, 9, 7, 7, 9]
    assert label.row_map() is None
    swap = TerminalMap.between("swap", [7], [9, 7])
    assert swap.batch_target_ids(batch) is None
    assert swap.row_map() == {7: 9, 9: 7}


@pytest.mark.parametrize("kind", ["swap", "label", "none"])
def test_a_pair_that_agrees_needs_no_map(kind: str) -> None:
    terminal = TerminalMap.between(kind, [7], [7, 9])
    assert terminal.kind == "none"
    assert terminal.row_map() is None


def test_the_profiler_misses_its_window(tmp_path: Path) -> None:
    window = ProfilerWindow(tmp_path / "profile", 3, first=2, count=2)
    for iteration in (1, 2, 3, 4):
        window.begin(iteration)
        torch.ones(4).cumsum(0)
        window.end()
    traces = sorted((tmp_path / "profile").iterdir())
    assert [trace.name for trace in traces] == [f"iteration_00000{i}_rank_3.json.gz" for i in (2, 3)]
    events = json.loads(gzip.decompress(traces[0].read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::cumsum" for event in events)
    off = ProfilerWindow(tmp_path / "off", 0, first=None, count=1)
    off.begin(1)
    off.end()
    assert not (tmp_path / "off").exists()


def test_a_warning_is_said_every_iteration_or_never_again() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/countdown/eopd.yaml", ["rollout.warn_truncated=null"])
    alerts = AlertMonitor(alert_rules(recipe.rollout, recipe.train.updates_per_iteration, recipe.teachers))
    good = {"rollout/logprob_gap": 0.03, "teacher/terminal_logprob": -0.1, "rollout/truncated": 1.0}
    bad = {**good, "rollout/logprob_gap": 0.25}
    assert alerts.check(good) == []
    assert alerts.check(bad) == [
        "warning: the rollout's log-probabilities lie more than 0.1 nats from the trainer's (0.25): "
        "the rollout may have other weights or another precision: see weight_sync.verify, student.precision"
    ]
    assert alerts.check(bad) == [] == alerts.check({})  # an iteration without the metric was not a good one
    (other,) = alerts.check({**bad, "teacher/terminal_logprob": -14.0})
    assert "the stopping token is below -10 nats (-14)" in other and "teacher.terminal_map" in other
    assert alerts.check(good) == []
    assert len(alerts.check(bad)) == 1


def test_utilisation_counts_the_padding_or_forgets_the_backward_pass() -> None:
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 16,
        "vocab_size": 10,
        "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    }
    meter = ThroughputMeter(config, ranks=4)
    samples = [Sample(Prompt("", (1, 2), {}), [3] * n, "stop", [0.0] * n, 0) for n in (1, 3)]
    found = meter.sample_flops(samples).tolist()
    matrices = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16 + 8 * 10  # q, k, v; o; gated MLP; head
    for flops, length in zip(found, (3, 5), strict=True):
        assert flops == 3 * (2 * matrices * length + 4 * 8 * sum(range(1, length + 1)))
    rates = meter.rates({"rollout": 2.0, "teacher": 1.0, "student": 4.0}, 6, 5.0, 2e12)
    assert rates["throughput/tflops_per_rank"] == 6 * 2 / 4 / 4
    assert rates["rollout/tokens_per_second"] == 15 and rates["throughput/tokens_per_second"] == pytest.approx(30 / 7)
