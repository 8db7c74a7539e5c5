"""Gloo ranks and random models for all tests of this folder."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.ranks import Ranks

HERE = Path(__file__).parent
MEGATRON_VARIABLE = "EAOPD_TEST_MEGATRON"
"""The version of megatron-core that must be tested; empty: the environment's."""
TWO_RANKS, FOUR_RANKS = Ranks(2, limit=120), Ranks(4, limit=120)  # they start with their first check


def pytest_report_header() -> str:
    return f"megatron-core {version('megatron-core')}"


@pytest.fixture(scope="session", autouse=True)
def tested_megatron() -> None:
    """Fail where another megatron-core would be tested than was asked for."""
    found, wanted = version("megatron-core"), os.environ.get(MEGATRON_VARIABLE)
    assert not wanted or found == wanted, f"{MEGATRON_VARIABLE} is {wanted}, and megatron-core {found} is imported"


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two gloo ranks for all modules."""
    with TWO_RANKS:
        yield TWO_RANKS


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four gloo ranks for all modules."""
    with FOUR_RANKS:
        yield FOUR_RANKS


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], dict[str, str]]:
    """(vocabulary sizes) → a random student and a random teacher."""

    @functools.cache
    def made(student: int, teacher: int) -> dict[str, str]:
        from tests.distributed.random_pairs import write_pair  # transformers takes its time

        return write_pair(tmp_path_factory.mktemp("pair"), (student, teacher))

    return made


@pytest.fixture(scope="session")
def pair(pairs: Callable[[int, int], dict[str, str]]) -> dict[str, str]:
    """One whose vocabulary of 112 leaves rank 3 of 4 without a valid column."""
    return pairs(112, 112)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the ranks after the last test of this folder: idle ones poll hundreds of times a second per group."""
    if nextitem is None or HERE not in nextitem.path.parents:
        TWO_RANKS.close()
        FOUR_RANKS.close()
