"""What may be sent, what is taken for an answer, and which server is taken for the student's."""

from __future__ import annotations

import asyncio
import math
import re
import threading
import tomllib
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from eaopd_megatron.data.types import Prompt, SamplingParams
from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang import identity
from eaopd_megatron.rollout.sglang.identity import ExpectedModel, LogprobProbe, verify_server
from eaopd_megatron.rollout.sglang.requests import GenerateRequest, LengthLimits, RequestAborted, WeightSpan
from eaopd_megatron.serving.http import Busy, SGLangClient, Timeouts, read_api_key
from tests.sglang.pooled import all_samples, pooled
from tools.sglang_double.server import Double

SAMPLING = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=4, stop_token_ids=(109,))
REQUEST = GenerateRequest("r", [1, 2, 3], SAMPLING)
LIMITS = LengthLimits(vocab_size=112, prompt_tokens=20, total_tokens=24)
EXPECTED = ExpectedModel("Qwen3ForCausalLM", vocab_size=112, total_tokens=64)
QUICK = Timeouts(connect=5.0, health=5.0, control=5.0, generate=5.0, attempts=3, backoff=0.001)
pytestmark = pytest.mark.timeout(60)


def test_a_request_at_the_limits_is_refused() -> None:
    LIMITS.validate(
        GenerateRequest("r", [0, 111] * 10, replace(SAMPLING, temperature=0.0, stop_token_ids=(0, 111))).body()
    )
    LIMITS.validate({**REQUEST.body(), "top_logprobs_num": 112})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": []}, "request r.0 has no prompt tokens"),
        (
            {"input_ids": [1, -1]},
            "-1 in its prompt is no token id of the served model, whose vocabulary has 112",
        ),
        ({"input_ids": [112]}, "112 in its prompt"),
        ({"input_ids": [True]}, "True in its prompt"),
        ({"input_ids": [1.0]}, "1.0 in its prompt"),
        ({"input_ids": [1] * 21}, "21 prompt tokens and up to 4 new ones do not fit"),
        ({"max_new_tokens": 22}, "3 prompt tokens and up to 22 new ones do not fit"),
        ({"max_new_tokens": -1}, "max_new_tokens -1"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"stop_token_ids": [200]}, "200 in its stop_token_ids"),
        ({"top_logprobs_num": 113}, "the log-probs of 113 tokens; the vocabulary has 112"),
    ],
)
def test_a_request_that_ends_or_misleads_the_server_is_sent(change: dict[str, Any], message: str) -> None:
    body = REQUEST.body()
    for key, value in change.items():
        (body["sampling_params"] if key in body["sampling_params"] else body)[key] = value
    with pytest.raises(UserError) as raised:
        LIMITS.validate(body)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def answer(**changes: Any) -> dict[str, Any]:
    """A right answer to REQUEST, with changes of its meta_info (None: missing) and `output_ids`."""
    ids = changes.pop("output_ids", [7, 109])
    meta: dict[str, Any] = {
        "id": "r.0",
        "finish_reason": {"type": "stop", "matched": 109},
        "output_token_logprobs": [[-1.0, 7, None], [-0.5, 109, None]],
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
        **changes,
    }
    return {"output_ids": ids, "meta_info": {key: value for key, value in meta.items() if value is not None}}


def test_a_sample_loses_what_the_server_said() -> None:
    done = REQUEST.parse("r.0", answer(), "http://server")
    sample = done.to_sample(Prompt("p", (1, 2, 3), {}), index=5)
    assert (sample.response_ids, sample.rollout_logprobs, sample.finish_reason) == ([7, 109], [-1.0, -0.5], "stop")
    assert (sample.weight_version, sample.weight_versions, sample.index) == (3, [(3, 0, 1), (4, 1, 2)], 5)
    assert sample.record("")["weight_versions"] == [[3, 0, 1], [4, 1, 2]]


def test_weights_that_no_trainer_sent_are_trained_on() -> None:
    done = replace(REQUEST.parse("r.0", answer(), "http://server"), weight_spans=(WeightSpan("default", 0, 2),))
    with pytest.raises(UserError, match="http://server answered with weights 'default', which no trainer sent"):
        done.to_sample(Prompt("p", (1, 2, 3), {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "other"}, "with the answer to other"),
        ({"output_token_logprobs": None}, "without 'output_token_logprobs': is it SGLang's /generate"),
        ({"weight_versions": None}, "without 'weight_versions'"),
        ({"output_ids": []}, "with 0 tokens and log-probs of 2 others"),
        ({"output_ids": [8, 109]}, "log-probs of 2 others"),
        ({"output_token_logprobs": [[None, 7, None], [-0.5, 109, None]]}, "its weights may hold NaN"),
        ({"output_token_logprobs": [[math.nan, 7, None], [-0.5, 109, None]]}, "its weights may hold NaN"),
        (
            {"finish_reason": {"type": "stop", "matched": "NaN happened"}},
            "'NaN happened', which is none of its end tokens",
        ),
        ({"finish_reason": {"type": "stop", "matched": 50}}, "at 50, which is none of its end tokens"),
        ({"finish_reason": {"type": "length", "length": 2}}, "cut request r.0 after 2 tokens"),
        ({"weight_versions": [{"version": "3", "start": 0, "end": 1}]}, "do not cover its tokens"),
        ({"weight_versions": [{"version": "3", "start": 1, "end": 2}]}, "do not cover its tokens"),
    ],
)
def test_a_wrong_answer_is_trained_on(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        REQUEST.parse("r.0", answer(**changes), "http://server")
    assert message in str(raised.value) and "http://server" in str(raised.value)


def test_an_aborted_response_is_taken_for_a_whole_one() -> None:
    reason = {"type": "abort", "message": "Abort in waiting queue"}
    with pytest.raises(RequestAborted, match="Abort in waiting queue"):
        REQUEST.parse("r.0", {"meta_info": {"id": "r.0", "finish_reason": reason}}, "http://server")


def with_client(double: Double, work: Callable[[SGLangClient], Any], **settings: Any) -> Any:
    """What the coroutine function `work` returns for a client of a running double."""

    async def run() -> Any:
        async with double:
            client = SGLangClient(double.url, timeouts=QUICK, **settings)
            try:
                return await work(client)
            finally:
                await client.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("settings", "expected", "message"),
    [
        ({"version": "0.5.24"}, EXPECTED, "runs SGLang 0.5.24; this speaks to 0.5.21, 0.5.22, 0.5.23: start one"),
        ({"architecture": "LlamaForCausalLM"}, EXPECTED, "a LlamaForCausalLM; the student is a Qwen3ForCausalLM"),
        ({"vocab_size": 151936}, EXPECTED, "with 151936 tokens; the student's vocabulary has 112"),
        ({"context_length": 65}, EXPECTED, "takes 63 tokens a request (context length 65, cache of 16384 tokens)"),
        ({"max_total_num_tokens": 60}, EXPECTED, "the recipe's prompts and responses need 64"),
        ({}, replace(EXPECTED, probe=LogprobProbe([1, 2, 3], [-9.0, -9.0])), "it holds other weights"),
        ({"api_key": "right"}, EXPECTED, "refuses the API key"),
    ],
)
def test_another_server_is_taken_for_the_students(
    settings: dict[str, Any], expected: ExpectedModel, message: str
) -> None:
    double = Double(**settings)

    async def look(client: SGLangClient) -> None:
        with pytest.raises(UserError) as raised:
            await verify_server(client, expected)
        reported = str(raised.value)
        assert (
            message in reported and reported.startswith(client.url) and "\n" not in reported and "wrong" not in reported
        )

    with_client(double, look, api_key="wrong")


def test_the_students_own_server_is_refused() -> None:
    double = Double(api_key="right")
    logprobs = [double.policy([1])[2], double.policy([1, 2])[3]]
    expected = replace(EXPECTED, total_tokens=126, probe=LogprobProbe([1, 2, 3], logprobs, tolerance=1e-6))
    limits = with_client(double, lambda client: verify_server(client, expected), api_key="right")
    assert limits == LengthLimits(vocab_size=112, prompt_tokens=121, total_tokens=126)


def test_a_server_that_is_updated_while_it_is_verified_holds_other_weights() -> None:
    """The weights' version is read before the probe is answered: an update in between makes the probe meaningless."""

    class Updated(Double):
        def _model_info(self) -> dict[str, Any]:
            return {**super()._model_info(), "weight_version": "0"}

    async def look(client: SGLangClient) -> LengthLimits:
        probe = LogprobProbe([1, 2, 3], [-9.0, -9.0], versions={"0"})
        return await verify_server(client, replace(EXPECTED, probe=probe))

    assert with_client(Updated(weight_version="1"), look).vocab_size == 112
    with pytest.raises(UserError, match="it holds other weights"):
        with_client(Updated(weight_version="0"), look)


def test_a_missing_api_key_reads_like_a_wrong_one() -> None:
    async def look(client: SGLangClient) -> None:
        with pytest.raises(UserError, match=r"asks for an API key: put the key .* into servers\.api_key_file"):
            await client.model_info()

    with_client(Double(api_key="right"), look)


def test_a_web_page_is_taken_for_a_server() -> None:
    class Page(Double):
        def _server_info(self) -> dict[str, Any]:
            return {"hello": "world"}

    async def look(client: SGLangClient) -> None:
        with pytest.raises(UserError, match="answers, but is no SGLang server"):
            await verify_server(client, EXPECTED)

    with_client(Page(), look)


def test_a_busy_server_is_asked_only_once() -> None:
    class Overloaded(Double):
        asked = 0

        def _server_info(self) -> dict[str, Any]:
            self.asked += 1
            raise RuntimeError

    double = Overloaded()

    async def look(client: SGLangClient) -> None:
        with pytest.raises(Busy, match="/server_info answered 500: Internal Server Error"):
            await client.server_info()

    with_client(double, look)
    assert double.asked == QUICK.attempts


def test_a_key_that_others_can_read_is_used(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("secret\n")
    path.chmod(0o600)
    assert read_api_key(path) == "secret"
    path.chmod(0o640)
    with pytest.raises(UserError, match=rf"others may read it \(mode 0640\): chmod 600 {path}"):
        read_api_key(path)
    path.chmod(0o600)
    path.write_text("two words")
    with pytest.raises(UserError, match=r"holds no API key"):
        read_api_key(path)
    with pytest.raises(UserError, match=r"cannot be read from .*: No such file"):
        read_api_key(tmp_path / "none")


def test_a_trainer_gets_samples_of_other_prompts() -> None:
    """The synchronous side, in a thread of its own: samples stream, keep their prompt, and come in order when asked."""
    loop = asyncio.new_event_loop()  # the double's
    double = Double(policy=lambda ids: [0.0 if token == ids[-1] else -99.0 for token in range(112)])
    loop.run_until_complete(double.start())
    threading.Thread(target=loop.run_forever, daemon=True).start()
    prompts = [Prompt(f"p{i}", (1, i), {}) for i in range(40)]

    async def admit(client: SGLangClient) -> LengthLimits:
        return await verify_server(client, EXPECTED)

    with pooled(SGLangClient(double.url, timeouts=QUICK), admit) as write:
        samples = all_samples(write(prompts, SAMPLING))
        assert [sample.prompt for sample in samples] == prompts
        assert all(sample.response_ids == [sample.prompt.token_ids[-1]] * 4 for sample in samples)
        writing = write(prompts, SAMPLING)
        first = writing.next_sample()
        assert first is not None and first.prompt == prompts[first.index]
        assert len(all_samples(writing)) == len(prompts) - 1
        given_up = write(prompts, SAMPLING)
        assert given_up.next_sample() is not None
        given_up._work.cancel()
        with pytest.raises(CancelledError):
            all_samples(given_up)
        assert given_up.finished
        with pytest.raises(UserError, match="no token id"):
            all_samples(write([Prompt("p", (500,), {})], SAMPLING))
    asyncio.run_coroutine_threadsafe(double.die(), loop).result()
    loop.call_soon_threadsafe(loop.stop)


def test_the_release_that_is_installed_is_another_one() -> None:
    root = Path(__file__).resolve().parents[2]
    [line] = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["sglang"]
    allowed = Requirement(line).specifier
    assert [v for v in range(15, 30) if allowed.contains(f"0.5.{v}")] == [21, 22, 23]
    assert identity.SGLANG_VERSIONS == ("0.5.21", "0.5.22", "0.5.23")
    for file in ("tools/lib/versions.txt", "slurm/container/versions.txt"):
        [pin] = re.findall(r"^sglang==(.*)$", (root / file).read_text(), re.MULTILINE)
        assert pin in identity.SGLANG_VERSIONS
