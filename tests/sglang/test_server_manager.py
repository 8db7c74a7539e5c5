"""Which dead servers are started again, and which of those that are there are given work."""

from __future__ import annotations

import asyncio
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config import load_recipe
from eaopd_megatron.rollout.sglang.identity import LogprobProbe, verify_server
from eaopd_megatron.rollout.sglang.server_manager import _RESTARTS, ServerManager
from eaopd_megatron.rollout.weight_sync.session import UpdateSession
from eaopd_megatron.serving.http import Busy, ServerGone, SGLangClient
from eaopd_megatron.serving.pool import NotYet
from eaopd_megatron.serving.supervisor import Supervisor
from tests.sglang.test_pool import EXPECTED, QUICK
from tests.sglang.test_router import RouterDouble
from tools.sglang_double.server import Double

COUNTDOWN = Path(__file__).resolve().parents[2] / "recipes/countdown"


class CountedServer:
    """A dead server that only counts how often it was started."""

    kind, url, starts = "rollout server", "http://127.0.0.1:1", 0
    on_exit = None

    def start(self) -> None:
        self.starts += 1

    def stop(self) -> None:
        """It is dead."""

    def alive(self) -> bool:
        return False

    def exit_reason(self) -> str:
        return "was killed by 9"


def manager_of(folder: Path, reported: list[str], *overrides: str) -> ServerManager:
    student = HfFolder.open(str(COUNTDOWN / "student"))
    config = load_recipe(COUNTDOWN / "eopd.yaml", overrides).servers
    manager = ServerManager(config, student, "fp32", folder, first_gpu=0, report=reported.append)
    manager.expected = EXPECTED
    return manager


@pytest.mark.parametrize(
    ("took_weights", "starts"), [(True, 3 * _RESTARTS.max_restarts), (False, _RESTARTS.max_restarts)]
)
def test_a_server_that_is_killed_often_is_given_up(tmp_path: Path, took_weights: bool, starts: int) -> None:
    """But for one that never comes up whole."""
    reported: list[str] = []
    manager = manager_of(tmp_path, reported)
    client, server = SGLangClient("http://127.0.0.1:1"), CountedServer()
    stand_in: Any = server
    manager._server_of[client] = stand_in
    manager._supervisor = Supervisor([stand_in], policy=_RESTARTS, report=reported.append)
    for _ in range(3 * _RESTARTS.max_restarts):
        manager._supervisor._look_at(stand_in)
        manager.mark_updated([client], {} if took_weights else {client: "it is gone"})
    manager.close()
    assert server.starts == starts
    assert any("died 5 times in a row and is not started again" in line for line in reported) != took_weights


@pytest.mark.parametrize("in_session", [True, False])
@pytest.mark.timeout(20)
def test_a_server_that_a_killed_trainer_left_paused_is_waited_for(tmp_path: Path, in_session: bool) -> None:
    """... as long as for a response, silently; or what a part of an update made of it counts as the student."""
    reported: list[str] = []
    manager = manager_of(tmp_path, reported)
    manager.expected = replace(EXPECTED, probe=LogprobProbe([1, 2, 3], [100.0, 100.0], versions={"0"}))

    async def work() -> None:
        async with Double() as double:
            client = SGLangClient(double.url, timeouts=replace(QUICK, control=0.3))
            await UpdateSession(5.0).begin_update(client)
            double.session = in_session
            manager.clients = [client]
            await manager._verify_all()
            assert not double.paused and not double.session
            await client.close()

    asyncio.run(work())
    assert len(reported) == 1 and "is paused by an update that broke off" in reported[0]
    manager.close()


@pytest.mark.timeout(20)
def test_a_server_is_continued_in_the_middle_of_an_update(tmp_path: Path) -> None:
    manager = manager_of(tmp_path, [])
    manager._allowed_versions = frozenset({"0"})

    async def work() -> None:
        async with Double() as double:
            client = SGLangClient(double.url, timeouts=replace(QUICK, control=0.3))
            await UpdateSession(5.0).begin_update(client)
            with pytest.raises(Busy, match="is paused and waits for the student's weights"):
                await manager._admit_server(client)
            assert double.paused and double.session and manager.outdated() == [client]
            await client.close()

    asyncio.run(work())
    manager.close()


@pytest.mark.timeout(20)
def test_a_server_that_cannot_be_given_weights_is_waited_for_without_end(tmp_path: Path) -> None:
    """One that waits for them is, while the trainer trains."""
    manager = manager_of(tmp_path, [])
    manager._allowed_versions = frozenset({"1"})

    async def work() -> None:
        async with Double() as double:
            client = SGLangClient(double.url, timeouts=QUICK)
            with pytest.raises(NotYet, match="it has weights '0' and waits for the student's weights"):
                await manager._admit_server(client)
            manager.mark_updated([client], {client: "its disk is full"})
            with pytest.raises(Busy) as raised:
                await manager._admit_server(client)
            assert not isinstance(raised.value, NotYet)
            await client.close()

    asyncio.run(work())
    manager.close()


@pytest.mark.timeout(20)
def test_a_server_that_is_paused_while_it_is_identified_is_waited_for_like_a_response() -> None:
    class Late(SGLangClient):
        async def ready(self) -> bool:
            """It is paused right after this, for a moment."""
            return True

    async def work() -> None:
        async with Double() as double:
            client = Late(double.url, timeouts=replace(QUICK, control=0.3))
            await UpdateSession(5.0).begin_update(client)
            with pytest.raises(ServerGone):
                await verify_server(client, EXPECTED)
            await client.close()

    asyncio.run(work())


def test_a_server_that_warms_up_counts_as_paused() -> None:
    """... or one that was found unhealthy: both call themselves not ready, as a paused one does."""

    class WarmingUp(SGLangClient):
        async def ready(self) -> bool:
            return False

    async def work() -> None:
        async with Double() as double:
            client = WarmingUp(double.url, timeouts=QUICK)
            assert (await verify_server(client, EXPECTED)).vocab_size == 112
            await client.close()

    asyncio.run(work())


@pytest.mark.timeout(20)
def test_servers_behind_a_router_get_the_work_of_one(tmp_path: Path) -> None:
    ports = queue.SimpleQueue[str]()
    ended = threading.Event()

    async def serve() -> None:
        async with Double() as one, Double() as two:
            router = RouterDouble(one, two)
            await router.start()
            ports.put(router.url)
            await asyncio.to_thread(ended.wait)
            await router.die()

    with ThreadPoolExecutor(1) as thread:
        serving = thread.submit(asyncio.run, serve())
        router = f"servers.router={ports.get(timeout=10)}"
        chosen = ("rollout.engine=sglang", router, "servers.max_concurrent_requests=5")
        manager = manager_of(tmp_path, [], *chosen)
        try:
            manager.start(32)
            manager.expected = EXPECTED
            for _ in manager.wait_until_ready():
                pass
            assert manager._router is not None and manager._router.connections == 2 * 5
            assert [client.connections for client in manager.clients] == [5, 5]
        finally:
            manager.close()
            ended.set()
        serving.result()
