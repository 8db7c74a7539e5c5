from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four gloo ranks, launched once for all modules that check models on ranks."""
    with Ranks(4, limit=120) as started:
        yield started
