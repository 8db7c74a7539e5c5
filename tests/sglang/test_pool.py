"""Servers die, hang, lie and come back; every request still ends with one response, or with one clear line."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from eaopd_megatron.data.types import SamplingParams
from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang.identity import ExpectedModel, verify_server
from eaopd_megatron.rollout.sglang.requests import GenerateRequest, GenerationOutput, LengthLimits
from eaopd_megatron.serving.http import SGLangClient, Timeouts
from eaopd_megatron.serving.pool import NotYet, ServerPool
from tools.sglang_double.server import Double

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=8, stop_token_ids=(109,))
EXPECTED = ExpectedModel("Qwen3ForCausalLM", vocab_size=112, total_tokens=64)
QUICK = Timeouts(connect=5.0, health=5.0, control=5.0, generate=60.0, attempts=3, backoff=0.001)
pytestmark = pytest.mark.timeout(60)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def requests(count: int) -> list[GenerateRequest]:
    return [GenerateRequest(f"r{i}", [1 + i % 100, 2, 3], SAMPLING) for i in range(count)]


async def admit(client: SGLangClient) -> LengthLimits:
    return await verify_server(client, EXPECTED)


@asynccontextmanager
async def pool_of(
    *doubles: Double,
    connections: int = 4,
    timeouts: Timeouts = QUICK,
    reported: list[str] | None = None,
    unavailable: float = 60.0,
    heartbeat: float = 60.0,
) -> AsyncIterator[ServerPool[SGLangClient, LengthLimits]]:
    clients = [SGLangClient(double.url, connections=connections, timeouts=timeouts) for double in doubles]
    report = (reported if reported is not None else []).append
    pool = ServerPool(
        clients,
        admit,
        unavailable_timeout=unavailable,
        heartbeat_interval=heartbeat,
        readmission_wait=0.001,
        report=report,
    )
    try:
        await pool.open()
        yield pool
    finally:
        await pool.close()


async def collect(
    pool: ServerPool[SGLangClient, LengthLimits],
    wanted: Sequence[GenerateRequest],
    versions: Collection[str] | None = None,
) -> list[GenerationOutput]:
    calls = [replace(request, allowed_versions=lambda: versions) for request in wanted]
    return [completion async for completion in pool.run(calls)]


def each_once(completions: Sequence[GenerationOutput], wanted: Sequence[GenerateRequest]) -> None:
    assert sorted(c.id for c in completions) == sorted(r.id for r in wanted)


def test_requests_pile_up_on_one_server_or_over_its_limit() -> None:
    async def work() -> None:
        async with Double() as one, Double() as two, pool_of(one, two, connections=4) as pool:
            one.hold()
            two.hold()
            wanted = requests(20)
            answers = asyncio.create_task(collect(pool, wanted))
            await one.until_running(4)
            await two.until_running(4)
            await asyncio.sleep(0)
            assert (len(one.running), len(two.running)) == (4, 4)
            two.released.set()  # the free server takes all that is left
            await two.until_finished(16)
            assert len(one.running) == 4
            one.released.set()
            each_once(await answers, wanted)

    run(work())


def test_a_response_waits_for_the_slowest_one() -> None:
    async def work() -> None:
        async with Double() as slow, Double() as quick, pool_of(slow, quick, connections=1) as pool:
            slow.hold()
            answers = pool.run(requests(4))
            first = [await anext(answers) for _ in range(3)]
            assert len({c.id for c in first}) == 3
            slow.released.set()
            await anext(answers)
            await answers.aclose()

    run(work())


def test_a_killed_server_takes_requests_with_it() -> None:
    async def work() -> None:
        reported: list[str] = []
        async with Double() as one, Double() as two, pool_of(one, two, reported=reported) as pool:
            one.hold()
            two.hold()
            wanted = requests(16)
            answers = asyncio.create_task(collect(pool, wanted))
            await one.until_running(4)
            await two.until_running(4)
            await one.die()
            two.released.set()
            completions = await answers
            each_once(completions, wanted)
            assert {c.server for c in completions} == {two.url}
            assert pool.available() and [client.url for client in pool.available()] == [two.url]
            assert sum("is gone" in line for line in reported) == 1, reported

    run(work())


def test_a_server_that_came_back_gets_no_work() -> None:
    async def work() -> None:
        reported: list[str] = []
        async with Double() as one, pool_of(one, reported=reported) as pool:
            one.hold()
            wanted = requests(8)
            answers = asyncio.create_task(collect(pool, wanted))
            await one.until_running(4)
            await one.die()
            one.released.set()
            while not any("all rollout servers are down" in line for line in reported):
                await asyncio.sleep(0.001)
            await one.start()
            each_once(await answers, wanted)
            assert sum("is back" in line for line in reported) == 1, reported

    run(work())


def test_waiting_for_dead_servers_has_no_end() -> None:
    async def work() -> None:
        one = Double()
        await one.start()
        async with pool_of(one, unavailable=0.05) as pool:
            await one.die()
            with pytest.raises(UserError, match=rf"no rollout server has been there for 0.05 s \({one.url}: .*refused"):
                await collect(pool, requests(3))
            with pytest.raises(UserError, match="no rollout server"):  # and it does not start waiting anew
                await collect(pool, requests(1))

    run(work())


def test_a_server_that_is_down_while_nobody_asks_ends_the_run() -> None:
    async def work() -> None:
        reported: list[str] = []
        async with Double() as one, pool_of(one, unavailable=5.0, reported=reported) as pool:
            await one.die()
            pool.mark_lost(pool.available()[0], "it was killed by 9")
            await asyncio.sleep(5.5)  # the trainer trains
            answers = asyncio.create_task(collect(pool, requests(2)))
            await asyncio.sleep(0.1)
            await one.start()
            each_once(await answers, requests(2))
            assert sum("all rollout servers are down" in line for line in reported) == 1, reported

    run(work())


def test_a_server_that_waits_for_weights_counts_as_down() -> None:
    """Responses are written ahead while the trainer trains, which gives it the weights afterwards."""

    async def work() -> None:
        async with Double() as one:
            stale = False

            async def admit_unless_stale(client: SGLangClient) -> LengthLimits:
                if stale:
                    raise NotYet("it waits for the student's weights")
                return await admit(client)

            client = SGLangClient(one.url, timeouts=QUICK)
            pool = ServerPool(
                [client], admit_unless_stale, unavailable_timeout=0.2, readmission_wait=0.001, report=lambda _: None
            )
            await pool.open()
            stale = True
            pool.mark_lost(client, "it was killed by 9")
            answers = asyncio.create_task(collect(pool, requests(2)))
            await asyncio.sleep(0.5)
            stale = False
            each_once(await answers, requests(2))
            await pool.close()

    run(work())


def test_a_server_that_comes_back_after_the_pool_gave_up_gets_no_work() -> None:
    async def work() -> None:
        reported: list[str] = []
        async with Double() as one, pool_of(one, unavailable=0.05, reported=reported) as pool:
            await one.die()
            with pytest.raises(UserError, match="no rollout server"):
                await collect(pool, requests(1))
            await one.start()
            while not any("is back" in line for line in reported):
                await asyncio.sleep(0.001)
            each_once(await collect(pool, requests(2)), requests(2))

    run(work())


def test_no_server_at_the_start_is_an_error_of_the_first_request_only() -> None:
    async def work() -> None:
        one = Double()
        await one.start()
        await one.die()
        async with pool_of(one) as pool:
            answers = asyncio.create_task(collect(pool, requests(2)))
            await one.start()
            each_once(await answers, requests(2))
        await one.die()

    run(work())


def test_a_hanging_server_holds_its_requests_for_ever() -> None:
    async def work() -> None:
        timeouts = Timeouts(connect=5.0, health=0.05, control=5.0, generate=60.0, attempts=3, backoff=0.001)
        async with Double() as one, Double() as two, pool_of(one, two, timeouts=timeouts, heartbeat=0.01) as pool:
            one.faults.mute = True
            each_once(await collect(pool, requests(12)), requests(12))
            assert [client.url for client in pool.available()] == [two.url]

    run(work())


def test_a_process_known_to_be_dead_is_asked_until_its_connection_fails() -> None:
    async def work() -> None:
        async with Double() as one, Double() as two, pool_of(one, two) as pool:
            one.hold()
            answers = asyncio.create_task(collect(pool, requests(4)))
            await one.until_running(1)
            pool.mark_lost(pool.available()[0], "it was killed by 9")
            each_once(await answers, requests(4))
            assert len(two.finished) == 4

    run(work())


@pytest.mark.parametrize("fault", ["drop", "fail", "abort"])
def test_a_living_server_is_given_up_for_one_bad_answer(fault: str) -> None:
    async def work() -> None:
        reported: list[str] = []
        async with Double() as one, pool_of(one, reported=reported) as pool:
            setattr(one.faults, fault, 3)
            each_once(await collect(pool, requests(6)), requests(6))
            assert reported == []

    run(work())


def test_an_answer_to_a_given_up_attempt_counts_twice() -> None:
    async def work() -> None:
        async with Double() as one, pool_of(one) as pool:
            one.faults.drop = 2
            await collect(pool, requests(1))
            assert one.finished == ["r0.2"]  # each attempt has an id of its own

    run(work())


def test_a_request_that_every_server_fails_on_is_sent_for_ever() -> None:
    async def work() -> None:
        async with Double() as one, pool_of(one) as pool:
            one.faults.drop = 10**6
            with pytest.raises(UserError, match=r"request r0 failed on 8 attempts.*connection was dropped"):
                await collect(pool, requests(1))

    run(work())


def test_leaving_early_leaves_requests_on_the_servers() -> None:
    async def work() -> None:
        async with Double() as one, pool_of(one, connections=1) as pool:
            answers = pool.run(requests(8))
            await anext(answers)
            await answers.aclose()
            each_once(await collect(pool, requests(2)), requests(2))  # the places are free again
            assert len(one.finished) <= 4

    run(work())


def test_a_bad_request_reaches_a_server_and_kills_it() -> None:
    async def work() -> None:
        async with Double() as one, pool_of(one) as pool:
            with pytest.raises(UserError, match=r"request bad\.0: 112 in its prompt is no token id"):
                await collect(pool, [*requests(3), GenerateRequest("bad", [112], SAMPLING)])
            assert one.finished == []  # checked before the first was sent

    run(work())


def test_another_model_behind_a_url_that_came_back_is_given_work() -> None:
    async def work() -> None:
        one = Double()
        await one.start()
        async with pool_of(one) as pool:
            one.hold()
            answers = asyncio.create_task(collect(pool, requests(3)))
            await one.until_running(3)
            await one.die()
            async with Double(vocab_size=200, port=one.port):
                with pytest.raises(UserError, match=r"with 200 tokens; the student's vocabulary has 112"):
                    await answers

    run(work())


def test_a_server_that_restarted_unseen_answers_with_old_weights() -> None:
    async def work() -> None:
        async with Double(weight_version="3") as one, Double(weight_version="3") as two, pool_of(one, two) as pool:
            two.weight_version = "0"
            completions = await collect(pool, requests(8), versions={"3"})
            each_once(completions, requests(8))
            assert {span.version for c in completions for span in c.weight_spans} == {"3"}

    run(work())


def test_random_deaths_lose_or_double_a_request() -> None:
    """Servers die and come back all the time, in a random order, while requests run."""

    async def work() -> None:
        numbers = random.Random(0)
        doubles = [Double() for _ in range(3)]
        for double in doubles:
            await double.start()
        wanted = requests(300)
        async with pool_of(*doubles, connections=8) as pool:
            answers = asyncio.create_task(collect(pool, wanted))
            for finished in range(10, 300, 10):
                while sum(len(double.finished) for double in doubles) < finished:
                    await asyncio.sleep(0)
                double = numbers.choice(doubles)
                await double.die()
                for _ in range(numbers.randrange(200)):
                    await asyncio.sleep(0)
                await double.start()
            each_once(await answers, wanted)
        for double in doubles:
            await double.die()

    run(work())
