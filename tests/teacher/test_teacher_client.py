"""The client of a separate teacher: every request ends with its rows, or with one clear line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from eaopd_megatron.data.types import Prompt, Sample
from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.http import Busy, ServerGone, Timeouts
from eaopd_megatron.serving.pool import ServerPool
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.protocol import TeacherInfo
from eaopd_megatron.teacher.separate import SeparateBackend, TeacherClient, TokenLimit, check_same_teacher
from tests.teacher.scoring_double import INFO, ScoringDouble

pytestmark = pytest.mark.timeout(60)
QUICK = Timeouts(attempts=3, backoff=0.001)
Work = Callable[[ScoringDouble, TeacherClient], Awaitable[None]]


def source(info: TeacherInfo = INFO, budget: int = 64) -> SeparateBackend:
    return SeparateBackend(info, budget=budget, terminal=TerminalMap(*info.terminal), connections=4)


def made(count: int, response: int = 3) -> list[Sample]:
    return [
        Sample(Prompt(str(i), (1, 2), {}), [i % 100] * response, "stop", [0.0] * response, 0, i) for i in range(count)
    ]


def served(work: Work, *, key: str | None = None, given: str | None = None, timeouts: Timeouts = QUICK) -> None:
    """given: the key that the client shows."""

    async def run() -> None:
        double = ScoringDouble(INFO, key=key)
        await double.start()
        client = TeacherClient(double.url, api_key=given, connections=4, timeouts=timeouts)
        try:
            await work(double, client)
        finally:
            double.faults.returns = False
            await double.die()
            await client.close()

    asyncio.run(run())


def scored(
    client: TeacherClient, info: TeacherInfo = INFO, samples: list[Sample] | None = None
) -> Awaitable[torch.Tensor]:
    ((call, _),) = source(info).calls(samples or made(2), "a")
    return call.attempt(client, 0)


def test_rows_of_one_sample_are_given_to_another() -> None:
    async def work(double: ScoringDouble, client: TeacherClient) -> None:
        rows = await scored(client)
        assert rows.tolist() == [[0] * 4] * 3 + [[1] * 4] * 3

    served(work)


def test_requests_are_larger_than_a_micro_batch() -> None:
    calls = source(budget=10).calls([*made(4), *made(1, response=20)], "n")
    assert [len(of) for _, of in calls] == [2, 2, 1]
    assert [call.id for call, _ in calls] == ["n-0", "n-1", "n-2"]
    with pytest.raises(UserError, match="22 tokens is longer than the teacher's 10"):
        calls[2][0].validate(TokenLimit(10))


def test_the_terminal_token_is_looked_up_where_no_stop_was() -> None:
    info = replace(INFO, signal="topk", top_k=2, terminal=("label", 3, 9))
    samples = made(4)
    samples[2].response_ids[-1] = samples[3].response_ids[-1] = 3
    samples[2] = replace(samples[2], finish_reason="length")
    ((call, _),) = source(info).calls(samples, "a")
    assert [sample.target_id for sample in call.request.samples] == [-1, -1, -1, 9]


def test_a_busy_teacher_is_given_up_at_once_or_asked_for_ever() -> None:
    async def work(double: ScoringDouble, client: TeacherClient) -> None:
        double.faults.busy = 2
        assert len(await scored(client)) == 6
        double.faults.busy = 3
        with pytest.raises(Busy, match="429: too many requests are in progress"):
            await scored(client)

    served(work)


def test_a_dropped_connection_is_a_traceback() -> None:
    async def work(double: ScoringDouble, client: TeacherClient) -> None:
        double.faults.deaths, double.faults.returns = 1, False
        with pytest.raises(ServerGone):
            await scored(client)
        assert not await client.reachable()

    served(work)


def test_an_answer_cut_short_is_taken_for_whole() -> None:
    async def work(double: ScoringDouble, client: TeacherClient) -> None:
        double.faults.short = True
        with pytest.raises(UserError, match="/score answered 20 bytes, and not 24"):
            await scored(client)

    served(work)


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        ("200 OK\r\nContent-Length: 23", UserError, "/score answered 23 bytes, and not 24"),
        ("200 OK\r\nContent-Length: 25", UserError, "/score answered 25 bytes, and not 24"),
        ("200 OK\r\nContent-Length: 99999999999", UserError, "/score answered 99999999999 bytes, and not 24"),
        ("200 OK\r\nTransfer-Encoding: chunked", ServerGone, "the answer to /score does not say how long it is"),
        ("200 OK", ServerGone, "the answer to /score does not say how long it is"),
        ("400 Bad Request\r\nContent-Length: 1048577", ServerGone, "the answer to /score is larger than 1048576 bytes"),
    ],
)
def test_an_answer_of_another_size_is_read_into_memory(head: str, error: type[Exception], message: str) -> None:
    """The server sends the head only and keeps the connection open: only a client that does not read the body ends."""
    closed = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {head}\r\n\r\n".encode())
        with suppress(ConnectionError):
            await reader.read()  # until the client closes
        writer.close()
        closed.set()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1")
        client = TeacherClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeouts=QUICK)
        with pytest.raises(error, match=message):
            await scored(client)
        await closed.wait()
        await client.close()
        server.close()

    asyncio.run(run())


def test_a_teacher_that_hangs_is_waited_for() -> None:
    async def work(double: ScoringDouble, client: TeacherClient) -> None:
        double.released.clear()
        with pytest.raises(ServerGone, match=r"no answer to /score within 0\.05 s"):
            await scored(client)

    served(work, timeouts=Timeouts(generate=0.05))


def test_a_request_that_is_given_up_keeps_its_thread() -> None:
    """Threads that still wait would hold up whoever waits for a free one, and the end of the process."""

    async def work(double: ScoringDouble, client: TeacherClient) -> None:
        double.released.clear()
        for _ in range(3):  # more than there are threads
            waiting = [asyncio.ensure_future(scored(client)) for _ in range(4)]
            await double.began.wait()
            double.began.clear()
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        double.released.set()
        assert len(await scored(client)) == 6

    served(work)


@pytest.mark.parametrize(("given", "message"), [(None, "asks for an API key"), ("other", "refuses the API key")])
def test_a_wrong_key_is_not_named(given: str | None, message: str) -> None:
    async def work(double: ScoringDouble, client: TeacherClient) -> None:
        for request in (scored(client), client.ready()):
            with pytest.raises(UserError, match=f"{double.url} {message}: .* into teacher.api_key_file"):
                await request

    served(work, key="secret", given=given)


def test_the_right_key_is_refused() -> None:
    async def work(double: ScoringDouble, client: TeacherClient) -> None:
        assert await client.info() == INFO

    served(work, key="secret", given="secret")


def test_a_server_of_something_else_is_a_traceback() -> None:
    async def work(double: ScoringDouble, client: TeacherClient) -> None:
        double.info = replace(INFO, protocol=0)
        with pytest.raises(UserError, match="cannot be used: it is no eaopd teacher of this version"):
            await client.info()

    served(work)


def test_a_teacher_that_still_loads_gets_work() -> None:
    async def work(double: ScoringDouble, client: TeacherClient) -> None:
        double.faults.loading = True
        with pytest.raises(Busy):
            await source().validate(client, 8)
        assert await client.reachable()
        double.faults.loading = False
        assert await source().validate(client, 8) == TokenLimit(64)

    served(work)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "beef"}, r"another teacher.model than this recipe: tiny \(beef\) there, tiny \(f00d\) here"),
        ({"signal": "topk"}, "another teacher.signal than this recipe: topk there, hidden here"),
        ({"terminal": ("swap", 3, 9)}, r"terminal_map .*: swap \(student 3, teacher 9\) there, none"),
        ({"vocab_size": 128}, "vocabulary.*: 128 there, 112 here"),
        ({"dtype": "fp32"}, "teacher.precision than this recipe: fp32 there, bf16 here"),
        ({"width": 4}, "hidden size"),
        ({"max_tokens": 9}, r"takes requests of 9 tokens, .* up to 64 \(train.micro_batch_tokens"),
    ],
)
def test_another_teacher_is_asked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_same_teacher("http://host:1", replace(INFO, **changes), INFO, "teacher")
    assert "http://host:1" in str(caught.value) and "start it again with `eaopd teach`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_does_not_matter_is_compared() -> None:
    check_same_teacher(
        "http://host:1", replace(INFO, model="elsewhere", layout="TP8", top_k=3, max_tokens=99), INFO, "teacher"
    )
    topk = replace(INFO, signal="topk", top_k=4)
    check_same_teacher("http://host:1", replace(topk, width=9, dtype="fp32"), topk, "teacher")
    with pytest.raises(UserError, match=r"objective\.top_k than this recipe: 3 there, 4 here"):
        check_same_teacher("http://host:1", replace(topk, top_k=3), topk, "teacher")


def test_a_replica_that_dies_takes_tokens_with_it() -> None:
    """Every request is answered once, whichever replicas die under it."""

    async def run() -> None:
        doubles = [ScoringDouble(INFO), ScoringDouble(INFO)]
        for double in doubles:
            await double.start()
        clients = [TeacherClient(double.url, connections=2, timeouts=QUICK) for double in doubles]
        asked = source(budget=10)

        async def admit(client: TeacherClient) -> TokenLimit:
            return await asked.validate(client, 5)

        pool = ServerPool(clients, admit, readmission_wait=0.001, report=lambda _: None)
        await pool.open()
        doubles[0].faults.deaths = 2
        calls = [call for call, _ in asked.calls(made(40), "a")]
        answers = [rows async for rows in pool.run(calls)]
        await pool.close()
        assert sorted(int(rows[0, 0]) for rows in answers) == [2 * i for i in range(20)]
        assert doubles[0].faults.deaths == 0
        for double in doubles:
            double.faults.returns = False
            await double.die()

    asyncio.run(run())
