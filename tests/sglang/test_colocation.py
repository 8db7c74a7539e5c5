"""The scheduler of a trainer and its colocated servers, whose program is the double."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import load_recipe
from eaopd_megatron.rollout.sglang import server
from eaopd_megatron.rollout.sglang.colocation import ColocationScheduler
from eaopd_megatron.rollout.sglang.server_manager import ServerManager

ROOT = Path(__file__).resolve().parents[2]
COLOCATED = ["rollout.engine=sglang", "servers.placement=colocated", "weight_sync.transport=tensor"]


@dataclass
class Memory:
    """The trainer's."""

    there: bool = True

    def offload(self) -> None:
        self.there = False

    def onload(self) -> None:
        self.there = True


def test_a_run_that_is_stopped_while_servers_write_cannot_be_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The servers are ended with their event loop; the trainer has its memory all the same."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(server, "sglang_command", lambda cuda: [sys.executable, "-m", "tools.sglang_double.server"])
    recipe = load_recipe(ROOT / "recipes/countdown/eopd.yaml", COLOCATED)
    student = HfFolder.open(recipe.student.model)
    manager = ServerManager(recipe.servers, student, "fp32", tmp_path, first_gpu=0, report=lambda _: None)
    memory, parallel = Memory(), SimpleNamespace(world_size=1)
    stand_ins: tuple[Any, Any] = parallel, memory
    scheduler = ColocationScheduler(*stand_ins, manager)
    try:
        scheduler.offload_trainer()
        manager.start(32)
        for _ in manager.wait_until_ready():
            pass
        manager.set_allowed_versions([0])
        for _ in range(2):
            scheduler.offload_trainer()
            assert not memory.there
            scheduler.resume_weights()
            scheduler.resume_kv_cache()
            scheduler.onload_trainer()
            assert memory.there
        scheduler.offload_trainer()
    finally:
        manager.close()
    scheduler.onload_trainer()
    assert memory.there
