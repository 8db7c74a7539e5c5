from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ranks import Ranks

HERE = Path(__file__).parent
FOUR_RANKS = Ranks(4, limit=120)  # they start with the first check


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four gloo ranks, launched once for all modules that check models on ranks."""
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
    """Idle ranks poll, hundreds of times a second for each group that they ever had: they end with this folder."""
    if nextitem is None or HERE not in nextitem.path.parents:
        FOUR_RANKS.close()
