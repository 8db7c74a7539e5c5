"""Every family at every kind of layout against transformers: logits, gradients and their norm; and out again.

Four gloo ranks are launched once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.ranks import Ranks

CHECKS = Path(__file__).with_name("checks_models.py")
TP2_SP = {"tensor_parallel": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"tensor_parallel": 2},
    "TP2+SP": TP2_SP,
    "TP4": {"tensor_parallel": 4},
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "EP2": {"expert_parallel": 2},
    "EP4": {"expert_parallel": 4},
    "TP2+SP": TP2_SP,
    "TP2+SP, ETP2": {**TP2_SP, "expert_tensor_parallel": 2},
    "TP2+SP, EP2": {**TP2_SP, "expert_parallel": 2},
}
CASES = [
    (name, layout)
    for name, (kind, _) in tiny_models.MODELS.items()
    for layout in (EXPERT_LAYOUTS if kind == "qwen3_moe" else LAYOUTS)
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as started:
        yield started


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for name in tiny_models.MODELS:
        tiny_models.write(name, root / name)
    return {name: root / name for name in tiny_models.MODELS}


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_and_gradients_are_transformers(ranks: Ranks, folders: dict[str, Path], name: str, layout: str) -> None:
    """Sequences are longer than the original context of the scaled rotary positions."""
    kinds = {**LAYOUTS, **EXPERT_LAYOUTS}
    ranks.run(CHECKS, "check_logits_and_gradients", folder=str(folders[name]), layout=kinds[layout])
