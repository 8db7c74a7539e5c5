"""Two gloo ranks on which Megatron-Core found Transformer Engine, and the random models of every family."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny_models
from tests.ranks import Ranks

WITHOUT = "needs the environment of tools/install_te_cpu.sh"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("te_start") is None
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.te)
            if missing:
                item.add_marker(pytest.mark.skip(reason=WITHOUT))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with Ranks(2, limit=120) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for name in tiny_models.MODELS:
        tiny_models.write(name, root / name)
    return {name: root / name for name in tiny_models.MODELS}
