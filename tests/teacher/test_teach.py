"""The rank of a teacher's service: what it refuses to start with, and what it says while it works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eaopd_megatron.config import load_recipe
from eaopd_megatron.errors import UserError
from eaopd_megatron.teacher.protocol import ScoredSample, ScoreRequest
from eaopd_megatron.teacher.service.run import ScoringMeter, serve_teacher

RECIPE = Path(__file__).resolve().parents[2] / "recipes/countdown/eopd.yaml"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["teacher.pipeline_parallel=2"],
            "teacher.tensor_parallel, pipeline_ and expert_parallel take 2 ranks; 3 were",
        ),
        (["teacher.expert_parallel=3"], "Qwen3ForCausalLM has no experts; set expert_parallel"),
        (["teacher.tensor_parallel=3"], "tensor_parallel=3 does not divide"),
        (["teacher.model=/nowhere/t"], "teacher.model: there is no folder /nowhere/t"),
        (["teacher.precision=fp8"], "teacher.precision=fp8 needs CUDA and Transformer Engine"),
    ],
)
def test_ranks_meet_for_a_teacher_that_they_cannot_hold(
    monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError) as raised:
        serve_teacher(load_recipe(RECIPE, ["teacher.placement=separate", *options]), "")
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_an_idle_teacher_fills_its_log() -> None:
    said = list[str]()
    meter = ScoringMeter(seconds=0.0, report=said.append)
    meter.tick()
    assert not said
    meter.add([ScoreRequest("a", [ScoredSample(2, 3)], torch.zeros(5, dtype=torch.int32))] * 2)
    meter.tick()
    meter.tick()
    assert len(said) == 1 and said[0].startswith("2 requests, 10 tokens in 0 s: ")
