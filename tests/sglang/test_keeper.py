"""Which dead servers are started again."""

from __future__ import annotations

from pathlib import Path

import pytest

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import load_recipe
from eaopd_megatron.rollout.sglang.keeper import DEATHS, Keeper
from eaopd_megatron.services.client import Client

COUNTDOWN = Path(__file__).resolve().parents[2] / "recipes/countdown"


class CountedServer:
    """A server that only counts how often it was started."""

    starts = 0

    def start(self) -> None:
        self.starts += 1


@pytest.mark.parametrize(("took_weights", "starts"), [(True, 3 * DEATHS), (False, DEATHS - 1)])
def test_a_server_that_is_killed_often_is_given_up(tmp_path: Path, took_weights: bool, starts: int) -> None:
    """But for one that never comes up whole."""
    said: list[str] = []
    folder = HfFolder.open(str(COUNTDOWN / "student"))
    keeper = Keeper(load_recipe(COUNTDOWN / "eopd.yaml"), folder, tmp_path, first_gpu=0, report=said.append)
    client, server = Client("http://127.0.0.1:1"), CountedServer()
    keeper._server_of[client] = server  # type: ignore[assignment]
    for _ in range(3 * DEATHS):
        keeper._died(client, "was killed by 9")
        keeper.given([client], {} if took_weights else {client: "it is gone"})
    keeper._starter.shutdown()
    keeper.close()
    assert server.starts == starts
    assert any("is not started again" in line for line in said) != took_weights
