"""Remote teachers, used by four gloo ranks of the student (one launch)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import load_recipe
from eaopd_megatron.teacher.protocol import TeacherInfo
from eaopd_megatron.teacher.replicas import TeacherReplicas
from tests.ranks import Ranks
from tests.teacher.scoring_double import INFO, ScoringDouble, running

CHECKS = Path(__file__).with_name("checks_remote.py")
HIDDEN = replace(INFO, dtype="fp32")
TOPK = replace(HIDDEN, signal="topk", top_k=16)
MINE, THEIRS = 7, 90
RECIPE = str(Path(__file__).resolve().parents[2] / "recipes/countdown/eopd.yaml")


class RemotePair:
    """A student and its teacher, with replicas of the teacher as doubles."""

    def __init__(self, pair: dict[str, str]) -> None:
        self.pair = pair
        self.models = {
            name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for name, path in pair.items()
        }

    def replica(self, info: TeacherInfo, teacher: str = "teacher") -> ScoringDouble:
        model = self.models[teacher]
        return ScoringDouble(replace(info, width=model.config.hidden_size), model)

    def arguments(self, double: ScoringDouble) -> dict[str, Any]:
        """Return the arguments that every check takes."""
        return {**self.pair, "info": double.info.to_json()}


@pytest.fixture(scope="module")
def remote_pair(pair: dict[str, str]) -> RemotePair:
    return RemotePair(pair)


@pytest.mark.parametrize("where", ["narrow", "wide", "mixed"])
@pytest.mark.parametrize(("preset", "info"), [("eopd", TOPK), ("eopd_exact", HIDDEN)])
def test_rows_are_exchanged_wrongly_at_a_layout(
    ranks: Ranks, remote_pair: RemotePair, preset: str, info: TeacherInfo, where: str
) -> None:
    one, other = remote_pair.replica(info), remote_pair.replica(info)
    one.faults.deaths = 1
    with running(one, other):
        ranks.run(
            CHECKS,
            "check_a_separate_teacher_changes_no_update",
            **remote_pair.arguments(other),
            preset=preset,
            urls=[one.url, other.url],
            where=where,
        )
    assert one.faults.deaths == 0, "no replica died while it scored"


def test_a_teacher_of_more_rows_gives_students_probability_away(
    ranks: Ranks, pairs: Callable[[int, int], dict[str, str]]
) -> None:
    """The same tokenizer with another padding: rows beyond the smaller vocabulary are unused."""
    remote_pair = RemotePair(pairs(112, 300))
    with running(double := remote_pair.replica(HIDDEN)):
        check, options = "check_a_separate_teacher_changes_no_update", {"preset": "eopd_exact", "where": "narrow"}
        ranks.run(CHECKS, check, **remote_pair.arguments(double), **options, urls=[double.url])


@pytest.mark.server
def test_a_teachers_own_layout_changes_an_update(ranks: Ranks, pair: dict[str, str], tmp_path: Path) -> None:
    """Real services: teacher TP1 x PP2 for a student at TP2, teacher TP2 for a student at TP1 x DP4."""
    changes = [f"{role}.model={pair[role]}" for role in pair]
    changes += [
        "teacher.placement=separate",
        "teacher.signal=hidden",
        "teacher.precision=fp32",
        "student.precision=fp32",
    ]
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text("a-key")
    services = {}
    with ExitStack() as stack:
        for tensor, pipeline in ((1, 2), (2, 1)):
            layout = (f"teacher.tensor_parallel={tensor}", f"teacher.pipeline_parallel={pipeline}")
            recipe = load_recipe(RECIPE, [*changes, *layout, f"teacher.api_key_file={key}"])
            logs = tmp_path / f"{tensor}x{pipeline}"
            replicas = TeacherReplicas(recipe, "", logs, first_gpu=0, report=lambda _: None)
            stack.callback(replicas.close)
            replicas.start(64)
            services[f"{tensor} x {pipeline}"] = replicas
        folder = HfFolder.open(pair["teacher"])
        info = replace(HIDDEN, fingerprint=folder.fingerprint, width=folder.config.hidden_size)
        urls = {name: url for name, replicas in services.items() for url in wait_for(replicas)}
        check, options = "check_a_service_changes_no_update", {"services": urls, "key": str(key)}
        ranks.run(CHECKS, check, **pair, info=info.to_json(), **options)


def wait_for(replicas: TeacherReplicas) -> list[str]:
    waiting = replicas.wait_urls()
    while True:
        try:
            next(waiting)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("kind", ["swap", "label"])
@pytest.mark.parametrize("info", [TOPK, HIDDEN])
def test_the_students_stop_is_punished(ranks: Ranks, remote_pair: RemotePair, info: TeacherInfo, kind: str) -> None:
    with running(double := remote_pair.replica(replace(info, terminal=(kind, MINE, THEIRS)))):
        ranks.run(CHECKS, "check_terminal_maps", **remote_pair.arguments(double), urls=[double.url])


def test_a_row_that_is_not_there_is_taken_for_zero(ranks: Ranks, remote_pair: RemotePair) -> None:
    with running(double := remote_pair.replica(HIDDEN)):
        check = "check_a_row_that_is_not_there_is_never_zero"
        ranks.run(CHECKS, check, **remote_pair.arguments(double), urls=[double.url])


def test_a_rank_waits_for_ranks_that_have_stopped(ranks: Ranks, remote_pair: RemotePair) -> None:
    gone, held = remote_pair.replica(HIDDEN), remote_pair.replica(HIDDEN)
    gone.faults.deaths, gone.faults.returns = 1, False
    with running(gone, held):
        held.released.clear()
        urls = {"gone": gone.url, "held": held.url}
        ranks.run(CHECKS, "check_all_ranks_stop_together", **remote_pair.arguments(held), **urls)
