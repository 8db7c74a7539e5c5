"""Servers on the trainer's GPUs: the order in which they and the trainer have the memory."""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang.colocation import ColocatedServers, release_memory_occupation
from eaopd_megatron.serving.http import ServerGone, SGLangClient, Timeouts
from tools.sglang_double.server import Double

TIMEOUTS = Timeouts(attempts=1)
BODY = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4}}
BOTH = {"weights", "kv_cache"}


@asynccontextmanager
async def two_servers() -> AsyncIterator[tuple[list[Double], list[SGLangClient]]]:
    async with Double() as one, Double() as other:
        doubles = [one, other]
        clients = [SGLangClient(double.url, timeouts=TIMEOUTS) for double in doubles]
        yield doubles, clients
        for client in clients:
            await client.close()


async def push(clients: list[SGLangClient], version: int) -> None:
    for client in clients:
        await client.request("POST", "/begin_weight_update", {})
        nothing = base64.b64encode(pickle.dumps([])).decode()
        body = {"serialized_named_tensors": [nothing], "weight_version": str(version)}
        await client.request("POST", "/update_weights_from_tensor", body)
        await client.request("POST", "/end_weight_update", {})


async def generate(clients: list[SGLangClient]) -> list[Any]:
    return await asyncio.gather(*(client.generate(BODY) for client in clients), return_exceptions=True)


def test_two_hold_the_memory_at_once_or_none_does() -> None:
    """Two iterations from the start of the servers; a phase that is called twice is not sent twice."""

    async def run() -> None:
        async with two_servers() as (doubles, clients):
            colocated = ColocatedServers()

            def away() -> list[set[str]]:
                return [double.away for double in doubles]

            assert await colocated.release_memory(clients) == {}
            for version in (0, 1):
                assert away() == [BOTH] * 2
                assert await colocated.resume_weights(clients) == {}
                assert away() == [{"kv_cache"}] * 2
                await push(clients, version)
                assert await colocated.resume_kv_cache(clients) == {}
                assert await colocated.resume_kv_cache(clients) == {}
                assert away() == [set()] * 2
                answers = await generate(clients)
                assert [answer["meta_info"]["weight_version"] for answer in answers] == [str(version)] * 2
                assert await colocated.release_memory(clients) == {}
                assert await colocated.release_memory(clients) == {}
            assert all(double.serving for double in doubles)

    asyncio.run(run())


Step = Callable[[ColocatedServers, list[SGLangClient]], Coroutine[Any, Any, Any]]
GENERATE_TOO_SOON: Step = lambda colocated, clients: clients[0].generate(BODY)  # noqa: E731
PUSH_TOO_SOON: Step = lambda colocated, clients: push(clients, 1)  # noqa: E731


@pytest.mark.parametrize("step", [GENERATE_TOO_SOON, PUSH_TOO_SOON], ids=["generate", "push"])
def test_a_wrong_order_passes_on_a_cpu(step: Step) -> None:
    """A real server without CUDA keeps its memory and would hide it."""

    async def run() -> None:
        async with two_servers() as (doubles, clients):
            colocated = ColocatedServers()
            await colocated.release_memory(clients)
            with pytest.raises(ServerGone):
                await step(colocated, clients)
            assert not doubles[0].serving

    asyncio.run(run())


def test_the_cache_comes_back_before_the_weights() -> None:
    async def run() -> None:
        async with two_servers() as (_, clients):
            colocated = ColocatedServers()
            await colocated.release_memory(clients)
            with pytest.raises(ValueError, match="has no weights: resume_weights and an update come first"):
                await colocated.resume_kv_cache(clients)

    asyncio.run(run())


def test_a_request_that_still_runs_kills_the_server() -> None:
    async def run() -> None:
        async with two_servers() as (doubles, clients):
            doubles[0].hold()
            running = asyncio.create_task(clients[0].generate(BODY))
            await doubles[0].until_running(1)
            with pytest.raises(UserError, match=r"flush_cache.* answered 400: Flush cache failed"):
                await release_memory_occupation(clients[0], ["kv_cache"], idle=0)
            assert doubles[0].serving and not doubles[0].away
            doubles[0].released.set()
            await running

    asyncio.run(run())


def test_a_server_that_came_back_dies_of_what_its_forerunner_released() -> None:
    """It is named when it is gone, the other goes on, and started again it has all of its memory."""

    async def run() -> None:
        async with two_servers() as (doubles, clients):
            colocated = ColocatedServers()
            await colocated.release_memory(clients)
            await doubles[0].die()
            assert list(await colocated.resume_weights(clients)) == clients[:1]
            doubles[0].away = set()
            await doubles[0].start()
            await push(clients, 1)
            assert await colocated.resume_kv_cache(clients) == {}
            assert not any(isinstance(answer, Exception) for answer in await generate(clients))

            await colocated.release_memory(clients)
            await doubles[1].die()  # and noticed by who watches its process
            doubles[1].away = set()
            await doubles[1].start()
            colocated.forget(clients[1])
            assert await colocated.resume_weights(clients) == {}
            assert all(double.serving for double in doubles)

    asyncio.run(run())
