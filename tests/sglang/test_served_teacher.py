"""A teacher on an SGLang server: what is made of its answers, and which of them are refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.data.types import Prompt, Sample
from eaopd_megatron.errors import UserError
from eaopd_megatron.objective import TeacherTopK
from eaopd_megatron.rollout.sglang.requests import RequestAborted
from eaopd_megatron.serving.http import SGLangClient
from eaopd_megatron.teacher.eos_map import TerminalMap
from eaopd_megatron.teacher.served import ServedBackend
from tools.sglang_double.server import Double, toy_policy

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = Sample(Prompt("p", (5, 6, 7), {}), [20, 9, 111, 3], "stop", [], 0)
NONE, SWAP = TerminalMap("none", -1, -1), TerminalMap("swap", student_id=3, teacher_id=9)


class Sized:
    """As much of a folder as the source needs to ask."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size


def source(k: int, terminal: TerminalMap = NONE, *, teacher: int = 112, student: int = 112) -> ServedBackend:
    return ServedBackend(cast(HfFolder, Sized(teacher)), vocab_size=student, k=k, terminal=terminal, connections=4)


def scored(asked: ServedBackend, double: Double, spoil: Callable[[dict[str, Any]], Any] | None = None) -> TeacherTopK:
    """What is made of the double's answer. spoil: changes its meta_info first."""
    ((call, _),) = asked.calls([SAMPLE], "test")

    async def score() -> torch.Tensor:
        async with double:
            client = asked.client(double.url, None)
            generate = client.generate

            async def spoiled(body: Any) -> dict[str, Any]:
                answer = await generate(body)
                if spoil is not None:
                    spoil(answer["meta_info"])
                return answer

            client.generate = spoiled  # type: ignore[method-assign]
            try:
                return await call.attempt(client, 0)
            finally:
                await client.close()

    return asked.payload_format.decode(asyncio.run(score()))


def rows(policy: Callable[[list[int]], list[float]]) -> torch.Tensor:
    """[response tokens, vocabulary] log-probs."""
    ids, start = SAMPLE.token_ids, len(SAMPLE.prompt.token_ids)
    return torch.tensor([policy(ids[:end]) for end in range(start, len(ids))])


@pytest.mark.parametrize("kind", ["none", "swap", "label"])
def test_a_terminal_map_names_another_token(kind: str) -> None:
    """`swap` in all places, `label` in that of the last token alone."""
    terminal = replace(SWAP, kind=kind)
    said = scored(source(16, terminal), Double())
    expected = rows(toy_policy(112))
    tokens = torch.tensor(SAMPLE.response_ids)
    if kind == "swap":
        expected[:, [3, 9]] = expected[:, [9, 3]]
    elif kind == "label":
        tokens[-1] = 9
    best, ids = expected.topk(16)
    assert torch.equal(said.ids, ids)
    torch.testing.assert_close(said.logprobs, best)
    torch.testing.assert_close(said.token_logprob, expected.gather(1, tokens[:, None])[:, 0])
    assert said.entropy is None


def test_equal_log_probs_stand_in_the_order_of_the_teachers_ids() -> None:
    """After the exchange of ids they are sorted again: larger log-prob first, then lower id."""
    level = torch.zeros(112)
    level[[3, 5, 9, 20]] = torch.tensor([2.0, 2.0, 3.0, 3.0])
    said = scored(source(4, SWAP), Double(policy=lambda _: level.log_softmax(0).tolist()))
    assert said.ids.tolist() == [[3, 20, 5, 9]] * 4


def test_a_larger_teacher_names_ids_that_the_student_lacks() -> None:
    expected = rows(toy_policy(120))
    assert (expected.topk(8).indices >= 112).any()
    said = scored(source(8, teacher=120, student=112), Double(vocab_size=120))
    best, ids = expected[:, :112].topk(8)
    assert torch.equal(said.ids, ids)
    torch.testing.assert_close(said.logprobs, best)

    def beyond(_: object) -> list[float]:
        return torch.arange(120.0).log_softmax(0).tolist()

    with pytest.raises(
        UserError, match=r"fewer than 4 ids that all models have among the 8 most probable ones: lower objective\.top_k"
    ):
        scored(source(4, teacher=120), Double(vocab_size=120, policy=beyond))


def change(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda meta: meta.update(fields)


def late(meta: dict[str, Any]) -> None:
    """Every log-prob is that of the place before."""
    values = [None, -3.0, *(entry[0] for entry in meta["input_token_logprobs"][1:-1])]
    meta["input_token_logprobs"] = [[lp, *e[1:]] for lp, e in zip(values, meta["input_token_logprobs"], strict=True)]


def other_tokens(meta: dict[str, Any]) -> None:
    meta["input_token_logprobs"][2][1] = 50


def without_one(meta: dict[str, Any]) -> None:
    meta["input_token_logprobs"].pop()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (change(id="other"), UserError, "answered request test-0.0 with the answer to other"),
        (change(finish_reason={"type": "abort", "message": "m"}), RequestAborted, "m"),
        (change(input_top_logprobs_shape=[2, 224]), UserError, r"of shape \[2, 224\]; \[4, 112\] were requested"),
        (change(input_top_logprobs_val_flat_b64="AAAAAA=="), UserError, "is it SGLang's"),
        (change(input_top_logprobs_null_prefix=0), UserError, "about other tokens than its response's"),
        (change(input_top_logprobs_val_flat_b64_dtype="float16"), UserError, "is it SGLang's"),
        (change(input_token_ids_logprobs=[None]), UserError, "without 4 log-probs"),
        (
            change(input_token_ids_logprobs=[None] + 4 * [2 * [[None, 0, None]]]),
            UserError,
            "with invalid log-probs",
        ),
        (other_tokens, UserError, "about other tokens than its response's"),
        (without_one, UserError, "about other tokens than its response's"),
        (late, UserError, "with invalid log-probs"),
        (lambda meta: meta.pop("input_token_logprobs"), UserError, "without 'input_token_logprobs'"),
    ],
)
def test_an_answer_that_is_none_is_believed(spoil: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scored(source(112, SWAP), Double(), spoil)


def test_log_probs_of_broken_weights_are_believed() -> None:
    with pytest.raises(UserError, match="its weights may hold NaN"):
        scored(source(4), Double(policy=lambda _: [float("nan")] * 112))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (replace(SAMPLE, response_ids=[3, 112]), "112 in its prompt is no token id of the served model"),
        (replace(SAMPLE, response_ids=[3] * 120), "123 prompt tokens and up to 0 new ones do not fit"),
        (replace(SAMPLE, prompt=Prompt("empty", (), {})), "prompt empty has no tokens"),
    ],
)
def test_a_request_that_ends_the_server_is_sent(sample: Sample, message: str) -> None:
    folder = HfFolder.open(str(ROOT / "recipes/countdown/teacher"))
    asked = ServedBackend(folder, vocab_size=112, k=16, terminal=NONE, connections=4)

    async def admitted() -> None:
        async with Double() as double:
            client = asked.client(double.url, None)
            limits = await asked.validate(client, 121)
            ((call, _),) = asked.calls([sample], "test")
            with pytest.raises(UserError, match=message):
                call.validate(limits)
            with pytest.raises(UserError, match=r"takes 121 tokens a request .* need 122"):
                await asked.validate(client, 122)
            await client.close()

    asyncio.run(admitted())


def test_another_server_is_taken_for_the_teachers() -> None:
    folder = HfFolder.open(str(ROOT / "recipes/countdown/teacher"))
    asked = ServedBackend(folder, vocab_size=112, k=16, terminal=NONE, connections=4)

    async def refused(double: Double, message: str, key: str | None = None) -> None:
        async with double:
            client: SGLangClient = asked.client(double.url, key)
            with pytest.raises(UserError, match=message):
                await asked.validate(client, 64)
            await client.close()

    double = Double()
    double.model_path = str(ROOT / "recipes/countdown/student")
    asyncio.run(refused(double, "whose hidden_size is 64; the teacher's is 96"))
    asyncio.run(refused(Double(vocab_size=200), "with 200 tokens; the teacher's vocabulary has 112"))
    asyncio.run(refused(Double(api_key="right"), "the key .* into teacher.api_key_file", "wrong"))
