from __future__ import annotations

from collections.abc import Iterator
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


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Idle ranks poll, hundreds of times a second for each group that they ever had: they end with this folder."""
    if nextitem is None or HERE not in nextitem.path.parents:
        FOUR_RANKS.close()
