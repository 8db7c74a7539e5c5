"""The real server: what the double copies of it, whose log-probs it has, and how it looks when it dies.

One server, started once, serves all tests here; the last test kills it. `tools/test.sh --all` runs them.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.data.types import Prompt, Sample, SamplingParams
from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang import identity
from eaopd_megatron.rollout.sglang.identity import ExpectedModel, LogprobProbe, verify_server
from eaopd_megatron.rollout.sglang.requests import GenerateRequest, GenerationOutput, LengthLimits
from eaopd_megatron.rollout.sglang.server import SGLangServer, SGLangSettings, sglang_command, sglang_servers
from eaopd_megatron.serving.http import HttpResponse, SGLangClient
from eaopd_megatron.serving.pool import ServerPool
from eaopd_megatron.serving.process import _REDACTED
from eaopd_megatron.serving.supervisor import Supervisor
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.served import ServedBackend
from tests.sglang.exchanges import CONTEXT, EXCHANGES, STUDENT, same
from tests.sglang.pooled import all_samples, pooled
from tools.sglang_double.server import Double
from tools.sglang_double.student import StudentDouble

KEY = "a-key-for-this-test"
SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=16, stop_token_ids=(109,))
EXPECTED = ExpectedModel("Qwen3ForCausalLM", vocab_size=112, total_tokens=CONTEXT - 2)
PROMPTS = [Prompt(f"p{i}", (1 + i % 12, 20 + i % 7, 40 + i % 5, 3), {}) for i in range(48)]
pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]


class InPieces(SGLangSettings):
    """A server that takes longer prompts than this piece by piece."""

    PIECE = 32

    def flags(self, port: int, *, cuda: bool) -> list[str]:
        return [*super().flags(port, cuda=cuda), "--chunked-prefill-size", str(self.PIECE)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    try:
        sglang_command(cuda=torch.cuda.is_available())
    except UserError as missing:
        pytest.skip(str(missing))
    settings = InPieces(
        STUDENT, CONTEXT, precision="fp32", mem_fraction_static=0.1, max_concurrent_requests=16, api_key=KEY
    )
    servers = sglang_servers(settings, 1, tmp_path_factory.mktemp("logs"))
    with Supervisor(servers):
        yield servers[0]


@pytest.fixture(scope="module")
def logits() -> Callable[[list[int]], torch.Tensor]:
    """Token ids → logits [s, V] of the student by transformers, fp32."""
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)

    @torch.no_grad()
    def compute(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0]

    return compute


def with_client(real: SGLangServer, work: Callable[[SGLangClient], Coroutine[Any, Any, Any]], **settings: Any) -> Any:
    async def run() -> Any:
        client = SGLangClient(real.url, **{"api_key": KEY, **settings})
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(run())


async def admit(client: SGLangClient) -> LengthLimits:
    return await verify_server(client, EXPECTED)


@pytest.mark.parametrize("make", [Double, partial(StudentDouble, STUDENT)], ids=["double", "student"])
def test_the_double_is_another_server(real: SGLangServer, make: Callable[..., Double]) -> None:
    """One exchange after the other with both; fields, types, status codes, messages and kinds of content are equal."""

    async def send(url: str, key: str | None, method: str, path: str, body: Any) -> HttpResponse:
        client = SGLangClient(url, api_key=key)
        try:
            return await client._send(method, path, b"" if body is None else json.dumps(body).encode(), 60.0)
        finally:
            await client.close()

    async def exchange(url: str) -> list[HttpResponse]:
        found = []
        for number, (method, path, body) in enumerate(EXCHANGES):
            if path == "/generate":  # what is still on its way of one request would end another of the same id
                body = {**body, "rid": f"{make}-{number}"}
            found.append(await send(url, KEY, method, path, body))
        return found

    async def both() -> tuple[list[HttpResponse], list[HttpResponse]]:
        async with make(api_key=KEY, max_total_num_tokens=16 * CONTEXT) as double:
            for key in (None, "wrong"):
                for url in (double.url, real.url):
                    refusal = await send(url, key, "GET", "/model_info", None)
                    assert (refusal.status, json.loads(refusal.content)) == (401, {"error": "Unauthorized"}), url
            return await exchange(double.url), await exchange(real.url)

    differences = []
    for (method, path, body), ours, theirs in zip(EXCHANGES, *asyncio.run(both()), strict=True):
        try:
            assert ours.status == theirs.status
            assert ours.headers.get("content-type") == theirs.headers.get("content-type")
            if ours.headers.get("content-type") == "application/json":
                same(path, json.loads(ours.content), json.loads(theirs.content))
            else:
                assert ours.content == theirs.content
        except AssertionError as error:
            first = str(error).splitlines()[:1]
            answers = f"  double: {ours.content!r}\n  real: {theirs.content[:2000]!r}"
            differences.append(f"{method} {path} {body}: {first}\n{answers}")
    assert not differences, "\n".join(differences)


def test_the_double_of_a_student_holds_another_one(real: SGLangServer) -> None:
    """Greedy responses of the same batch: tokens, log-probs, ends and versions."""
    greedy = replace(SAMPLING, temperature=0.0)
    requests = [GenerateRequest(prompt.id, prompt.token_ids, greedy) for prompt in PROMPTS]

    async def respond(url: str) -> dict[str, GenerationOutput]:
        pool = ServerPool([SGLangClient(url, api_key=KEY)], admit)
        await pool.open()
        found = {completion.id: completion async for completion in pool.run(requests)}
        await pool.close()
        return found

    async def both() -> tuple[dict[str, GenerationOutput], dict[str, GenerationOutput]]:
        async with StudentDouble(STUDENT, api_key=KEY) as double:
            return await respond(double.url), await respond(real.url)

    ours, theirs = asyncio.run(both())
    gap = 0.0
    for name, one in ours.items():
        other = theirs[name]
        assert replace(one, logprobs=[], server="") == replace(other, logprobs=[], server="")
        gap = max(gap, *(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)))
    print(f"largest gap {gap:.2e}")
    assert gap <= 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probs_are_of_another_distribution(
    real: SGLangServer, logits: Callable[[list[int]], torch.Tensor], temperature: float
) -> None:
    """In fp32 they are the student's own, at the sampling temperature (greedy: at temperature 1)."""
    sampling = replace(SAMPLING, temperature=temperature)
    with pooled(SGLangClient(real.url, api_key=KEY, connections=16), admit) as write:
        samples = all_samples(write(PROMPTS, sampling))
    assert [sample.prompt for sample in samples] == PROMPTS
    gap = 0.0
    for sample in samples:
        before = logits(sample.token_ids)[len(sample.prompt.token_ids) - 1 : -1] / (temperature or 1.0)
        theirs = torch.log_softmax(before, -1)
        tokens = torch.tensor(sample.response_ids)
        ours = torch.tensor(sample.rollout_logprobs)
        gap = max(gap, (theirs.gather(-1, tokens[:, None])[:, 0] - ours).abs().max().item())
        if temperature == 0:
            assert torch.equal(theirs.argmax(-1), tokens)
        assert sample.weight_versions == [(0, 0, len(sample.response_ids))]
        assert (sample.finish_reason == "stop") == (sample.response_ids[-1] == 109)
    print(f"temperature {temperature}: largest gap {gap:.2e} over {sum(len(s.response_ids) for s in samples)} tokens")
    assert gap <= 1e-4


@pytest.mark.parametrize("kind", ["none", "swap", "label"])
def test_a_teacher_scores_other_tokens(
    real: SGLangServer, logits: Callable[[list[int]], torch.Tensor], kind: str
) -> None:
    """Top-k and log p(y) are those of each response token's own position, also where the prompt is in the server's
    cache and where prompt and response are longer than what it takes at once."""
    folder, terminal = HfFolder.open(str(STUDENT)), TerminalMap(kind, student_id=3, teacher_id=109)
    source = ServedBackend(folder, vocab_size=112, k=8, terminal=terminal, connections=16)
    long = [(7 * i) % 112 for i in range(4 * InPieces.PIECE - 10)]
    samples = [
        *(
            Sample(prompt, [20, 109, 111 - i, 3], "stop", [], 0)
            for i, prompt in enumerate([*PROMPTS[:4], *PROMPTS[:2]])
        ),
        Sample(Prompt("alone", (5,), {}), [3], "stop", [], 0),
        *(Sample(Prompt("long", tuple(long[:cut]), {}), long[cut:], "length", [], 0) for cut in (1, 32, 33, 110)),
    ]

    async def score(client: SGLangClient) -> list[torch.Tensor]:
        limits = await source.validate(client, longest=121)
        calls = [call for call, _ in source.calls(samples, "test")]
        for call in calls:
            call.validate(limits)
        return [await call.attempt(client, 0) for call in calls]

    gap = 0.0
    for sample, rows in zip(samples, with_client(real, score), strict=True):
        said = source.payload_format.decode(rows)
        before = logits(sample.token_ids)[len(sample.prompt.token_ids) - 1 : -1]
        if kind == "swap":
            before[:, [3, 109]] = before[:, [109, 3]]
        theirs = before.log_softmax(-1)
        tokens = torch.tensor(sample.response_ids)
        if kind == "label" and sample.finish_reason == "stop":
            tokens[-1] = 109
        best, ids = theirs.topk(8)
        assert torch.equal(said.ids, ids) and said.entropy is None
        own = theirs.gather(1, tokens[:, None])[:, 0]
        gap = max(gap, float((said.logprobs - best).abs().max()), float((said.token_logprob - own).abs().max()))
    print(f"largest gap {gap:.2e}")
    assert gap <= 1e-4


def test_a_server_takes_what_a_teacher_is_refused(real: SGLangServer) -> None:
    """The longest that `admit` promises is scored; one more is refused beforehand."""
    folder = HfFolder.open(str(STUDENT))
    source = ServedBackend(folder, vocab_size=112, k=112, terminal=TerminalMap("none", -1, -1), connections=16)

    async def look(client: SGLangClient) -> None:
        with pytest.raises(UserError, match=f"{real.url} takes 121 tokens a request .* need 122"):
            await source.validate(client, longest=122)
        limits = await source.validate(client, longest=121)
        for count in (121, 122):
            sample = Sample(PROMPTS[0], [1] * (count - 4), "length", [], 0)
            ((call, _),) = source.calls([sample], "test")
            if count > 121:
                with pytest.raises(UserError, match="122 prompt tokens and up to 0 new ones do not fit"):
                    call.validate(limits)
            else:
                call.validate(limits)
                assert (await call.attempt(client, 0)).shape == (117, source.payload_format.bytes_per_token)

    with_client(real, look)


def test_the_limits_are_not_the_servers(real: SGLangServer) -> None:
    async def look(client: SGLangClient) -> None:
        limits = await admit(client)
        for prompt in (limits.prompt_tokens, 3):
            new = limits.total_tokens - prompt
            sampling = {"max_new_tokens": new, "temperature": 1.0, "top_p": 1.0, "ignore_eos": True}
            body = {"input_ids": [1] * prompt, "sampling_params": sampling}
            limits.validate(body)
            assert len((await client.generate(body))["output_ids"]) == new
        beyond = {"input_ids": [1] * (limits.prompt_tokens + 1), "sampling_params": {**sampling, "max_new_tokens": 1}}
        with pytest.raises(UserError, match="exceeds the maximum allowed length"):
            await client.generate(beyond)

    with_client(real, look)


def test_a_wrong_server_is_named(
    real: SGLangServer, logits: Callable[[list[int]], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [1, 2, 3, 4]
    own = torch.log_softmax(logits(ids), -1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    probed = replace(EXPECTED, probe=LogprobProbe(ids, own, tolerance=1e-4))
    assert with_client(real, lambda c: verify_server(c, probed)) == LengthLimits(112, 121, 126)
    shifted = replace(EXPECTED, probe=LogprobProbe(ids, [lp - 1 for lp in own]))
    for expected, message in (
        (shifted, r"log-probs of a probe lie 1 nats from the student's on average"),
        (replace(EXPECTED, vocab_size=113), "with 112 tokens; the student's vocabulary has 113"),
        (replace(EXPECTED, total_tokens=127), "takes 126 tokens a request"),
        (replace(EXPECTED, architecture="LlamaForCausalLM"), "a Qwen3ForCausalLM; the student is a LlamaForCausalLM"),
    ):
        with pytest.raises(UserError, match=message):
            with_client(real, lambda c, e=expected: verify_server(c, e))  # type: ignore[misc]
    with pytest.raises(UserError, match="refuses the API key"):
        with_client(real, admit, api_key="wrong")
    monkeypatch.setattr(identity, "SGLANG_VERSIONS", ("0.6.0",))
    with pytest.raises(UserError, match=r"runs SGLang 0\.5\.2[123]; this speaks to 0\.6\.0"):
        with_client(real, admit)


def test_the_key_is_seen_by_others(real: SGLangServer) -> None:
    assert real.pid is not None
    family = [psutil.Process(real.pid), *psutil.Process(real.pid).children(recursive=True)]
    assert len(family) > 1
    assert not any(KEY in argument for process in family for argument in process.cmdline())
    assert KEY not in real.log.read_text() and _REDACTED in real.log.read_text()


def test_a_paused_server_counts_as_dead(real: SGLangServer) -> None:
    async def work(client: SGLangClient) -> None:
        said: list[str] = []
        pool = ServerPool([client], admit, heartbeat_interval=0.05, report=said.append)
        await pool.open()
        await client.request("POST", "/pause_generation", {"mode": "retract"})
        assert not await client.ready()
        answers = asyncio.create_task(anext(pool.run([GenerateRequest("r", [1, 2, 3], SAMPLING)])))
        await asyncio.sleep(0.3)  # some heartbeats
        assert not answers.done() and said == []
        await client.request("POST", "/continue_generation", {})
        assert (await answers).id == "r"
        await pool.close()

    with_client(real, work)


def test_the_end_of_a_killed_server_goes_unnoticed(real: SGLangServer) -> None:
    """Killed in the middle of responses: its process and its connections tell, and nothing of it stays."""
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    real.on_exit = ended.put
    assert real.pid is not None
    family = [psutil.Process(real.pid), *psutil.Process(real.pid).children(recursive=True)]
    said: list[str] = []

    async def work(client: SGLangClient) -> None:
        pool = ServerPool([client], admit, unavailable_timeout=0.2, report=said.append)
        await pool.open()
        long = replace(SAMPLING, max_new_tokens=100, stop_token_ids=())
        answers = pool.run([GenerateRequest(f"r{i}", [1, 2, i], long) for i in range(32)])
        await anext(answers)
        assert real.pid is not None
        os.kill(real.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"no rollout server has been there for 0\.2 s"):
            async for _ in answers:
                pass
        await pool.close()

    with_client(real, work)
    assert "unfinished requests go elsewhere" in said[0] and "all rollout servers are down" in said[1]
    assert "was killed by 9" in ended.get(timeout=30)
    _, left = psutil.wait_procs(family, timeout=30)
    assert not left
