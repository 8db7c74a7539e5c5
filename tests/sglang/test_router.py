"""A router answers for its servers, dead ones too, in words of its own (copied from sglang-router 0.3.2)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang.identity import ROUTER_READY_PATH, verify_workers
from eaopd_megatron.rollout.sglang.requests import LengthLimits
from eaopd_megatron.serving.http import SGLangClient
from eaopd_megatron.serving.pool import ServerPool
from tests.sglang.test_pool import QUICK, admit, collect, each_once, requests, run
from tools.sglang_double.plain_http import PlainServer, Refused
from tools.sglang_double.server import Double

pytestmark = pytest.mark.timeout(60)


class RouterDouble(PlainServer):
    """Sends /generate to its workers by scheduler, dead or not, and calls itself ready."""

    def __init__(self, *workers: Double) -> None:
        super().__init__()
        self.workers, self.turn = workers, 0

    async def answer(self, method: str, path: str, headers: dict[str, str], raw: bytes) -> Any:
        if path == ROUTER_READY_PATH:
            return {"status": "ready", "healthy_workers": len(self.workers), "total_workers": len(self.workers)}
        if path == "/workers":
            return {"workers": [{"url": worker.url, "is_healthy": True} for worker in self.workers]}
        if path != "/generate":
            raise Refused(404, None)
        self.turn += 1
        worker = self.workers[self.turn % len(self.workers)]
        if worker.serving:
            return await worker.answer(method, path, headers, raw)
        if any(worker.serving for worker in self.workers):
            raise self._error(500, "Internal Server Error", "call_upstream_request_error")
        raise self._error(503, "Service Unavailable", "no_available_workers")

    def _error(self, status: int, kind: str, code: str) -> Refused:
        body = {"error": {"type": kind, "code": code, "message": "error sending request"}}
        return Refused(status, body, {"x-smg-error-code": code})


async def pool_through(
    router: RouterDouble, reported: list[str], unavailable: float = 60.0
) -> ServerPool[SGLangClient, LengthLimits]:
    async def admit_router(client: SGLangClient) -> LengthLimits:
        return await verify_workers(client, admit, lambda url: SGLangClient(url, timeouts=QUICK))

    client = SGLangClient(router.url, connections=8, timeouts=QUICK, ready_path=ROUTER_READY_PATH)
    pool = ServerPool(
        [client], admit_router, unavailable_timeout=unavailable, readmission_wait=0.001, report=reported.append
    )
    await pool.open()
    return pool


def test_a_dead_server_behind_a_router_fails_its_requests() -> None:
    async def work() -> None:
        reported: list[str] = []
        async with Double() as one, Double() as two:
            router = RouterDouble(one, two)
            await router.start()
            pool = await pool_through(router, reported)
            each_once(await collect(pool, requests(10)), requests(10))
            assert one.finished and two.finished
            await one.die()
            each_once(await collect(pool, requests(10)), requests(10))
            assert reported == []  # the router itself is there
            await two.die()
            answers = asyncio.create_task(collect(pool, requests(4)))
            while not any("all rollout servers are down" in line for line in reported):
                await asyncio.sleep(0.001)
            await one.start()
            each_once(await answers, requests(4))
            await pool.close()
            await router.die()

    run(work())


def test_a_router_hides_that_a_server_is_another_model() -> None:
    async def work() -> None:
        async with Double() as one, Double(vocab_size=50) as two:
            router = RouterDouble(one, two)
            await router.start()
            with pytest.raises(UserError, match=f"{two.url} serves student with 50 tokens"):
                await pool_through(router, [])
            await router.die()

    run(work())


def test_a_server_is_taken_for_a_router() -> None:
    async def work() -> None:
        class Page(PlainServer):
            async def answer(self, method: str, path: str, headers: dict[str, str], raw: bytes) -> Any:
                return {}

        page = Page()
        await page.start()
        with pytest.raises(UserError, match="is no sglang-router: it lists no workers"):
            await verify_workers(SGLangClient(page.url), admit, SGLangClient)
        await page.die()

    run(work())
