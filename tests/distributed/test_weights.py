"""Servers get the weights of a model that is cut over ranks, and the loss of one of them is nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.ranks import Ranks
from tools.sglang_double.processes import DoubleProcess

CHECKS = Path(__file__).with_name("checks_weights.py")
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"tensor_parallel": 2, "pipeline_parallel": 2},  # tied: the last stage's copy must not be sent
    "qwen3_moe": {"expert_parallel": 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("weights")
    for name in MODELS:
        tiny_models.build(name).save_pretrained(root / name)
    return {name: str(root / name) for name in MODELS}


@pytest.fixture(scope="module")
def doubles() -> Iterator[list[str]]:
    """URLs of two servers that no check leaves broken."""
    with DoubleProcess() as one, DoubleProcess() as other:
        yield [one.url, other.url]


@pytest.mark.parametrize(
    ("model", "transport", "large"),
    [
        ("qwen3", "distributed", 2**20),
        ("qwen3", "distributed", 1),
        ("qwen3_moe", "distributed", 2**20),
        ("qwen3", "tensor", 0),
    ],
)
def test_a_server_has_other_weights_than_the_model(
    ranks: Ranks, folders: dict[str, str], doubles: list[str], tmp_path: Path, model: str, transport: str, large: int
) -> None:
    ranks.run(
        CHECKS,
        "check_arrives",
        folder=folders[model],
        layout=MODELS[model],
        transport=transport,
        large=large,
        scratch=str(tmp_path),
        urls=doubles,
    )


@pytest.mark.parametrize(
    "check",
    [
        "check_death_in_an_update",
        "check_no_server_answers",
        "check_folder_is_written_once",
        "check_error_of_the_main_rank",
        "check_checksums",
    ],
)
def test_one_server_stops_the_others_or_the_ranks(
    ranks: Ranks, folders: dict[str, str], doubles: list[str], tmp_path: Path, check: str
) -> None:
    ranks.run(CHECKS, check, folder=folders["qwen3"], scratch=str(tmp_path), urls=doubles)


@pytest.mark.parametrize(
    ("fault", "transport"), [("refuse", "distributed"), ("hang", "distributed"), ("refuse", "tensor")]
)
def test_a_server_that_is_there_is_lost_with_an_update(
    ranks: Ranks, folders: dict[str, str], doubles: list[str], tmp_path: Path, fault: str, transport: str
) -> None:
    ranks.run(
        CHECKS,
        "check_update_breaks_off",
        folder=folders["qwen3"],
        scratch=str(tmp_path),
        urls=doubles,
        fault=fault,
        transport=transport,
    )
