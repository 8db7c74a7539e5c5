"""Teachers that live elsewhere, as four gloo ranks of the student see them (one launch)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from eaopd_megatron.teacher.wire import Info
from tests.distributed.test_training import pair  # noqa: F401
from tests.ranks import Ranks
from tests.teacher.scoring_double import INFO, ScoringDouble, running

CHECKS = Path(__file__).with_name("checks_remote.py")
HIDDEN = replace(INFO, dtype="fp32")
TOPK = replace(HIDDEN, signal="topk", top_k=16)
MINE, THEIRS = 7, 90


class Elsewhere:
    """Replicas of the teacher, all with its weights."""

    def __init__(self, pair: dict[str, str]) -> None:  # noqa: F811
        self.pair = pair
        self.models = {
            name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for name, path in pair.items()
        }

    def replica(self, info: Info, teacher: str = "teacher") -> ScoringDouble:
        model = self.models[teacher]
        return ScoringDouble(replace(info, width=model.config.hidden_size), model)

    def arguments(self, double: ScoringDouble) -> dict[str, Any]:
        """For every check."""
        return {**self.pair, "info": double.info.to_json()}


@pytest.fixture(scope="module")
def elsewhere(pair: dict[str, str]) -> Elsewhere:  # noqa: F811
    return Elsewhere(pair)


@pytest.mark.parametrize("where", ["narrow", "wide", "mixed"])
@pytest.mark.parametrize(("preset", "info"), [("eopd", TOPK), ("eopd_exact", HIDDEN)])
def test_rows_are_exchanged_wrongly_at_a_layout(
    ranks: Ranks, elsewhere: Elsewhere, preset: str, info: Info, where: str
) -> None:
    one, other = elsewhere.replica(info), elsewhere.replica(info)
    one.faults.deaths = 1
    with running(one, other):
        ranks.run(
            CHECKS,
            "check_a_separate_teacher_changes_no_update",
            **elsewhere.arguments(other),
            preset=preset,
            urls=[one.url, other.url],
            where=where,
        )
    assert one.faults.deaths == 0, "no replica died while it scored"


@pytest.mark.parametrize("kind", ["swap", "label"])
@pytest.mark.parametrize("info", [TOPK, HIDDEN])
def test_the_students_stop_is_punished(ranks: Ranks, elsewhere: Elsewhere, info: Info, kind: str) -> None:
    with running(double := elsewhere.replica(replace(info, terminal=(kind, MINE, THEIRS)))):
        ranks.run(CHECKS, "check_terminal_maps", **elsewhere.arguments(double), urls=[double.url])


def test_a_row_that_is_not_there_is_taken_for_zero(ranks: Ranks, elsewhere: Elsewhere) -> None:
    with running(double := elsewhere.replica(HIDDEN)):
        check = "check_a_row_that_is_not_there_is_never_zero"
        ranks.run(CHECKS, check, **elsewhere.arguments(double), urls=[double.url])


def test_a_rank_waits_for_ranks_that_have_stopped(ranks: Ranks, elsewhere: Elsewhere) -> None:
    gone, held = elsewhere.replica(HIDDEN), elsewhere.replica(HIDDEN)
    gone.faults.deaths, gone.faults.returns = 1, False
    with running(gone, held):
        held.released.clear()
        urls = {"gone": gone.url, "held": held.url}
        ranks.run(CHECKS, "check_all_ranks_stop_together", **elsewhere.arguments(held), **urls)
