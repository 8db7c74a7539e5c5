"""Requests to SGLang's /generate and its answers: token ids in and out, never text.

Every body is validated before it is sent, because SGLang does not: an id outside the vocabulary, or more top log-probs
than the vocabulary has tokens, kills the whole server, and a response over the context length is cut silently.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from eaopd_megatron.data.types import Prompt, Sample, SamplingParams
from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.http import Busy, EventLoopThread, SGLangClient
from eaopd_megatron.serving.pool import ServerPool, StaleServer

RESERVED_TOKENS = 2  # a server cuts responses at context_length - 2
_PROMPT_SLACK_TOKENS = 6  # a server refuses prompts that are not shorter than its context by this much more


def required_context_length(total_tokens: int) -> int:
    """Return the --context-length with which a server takes `total_tokens` of a prompt and its response."""
    return total_tokens + RESERVED_TOKENS + _PROMPT_SLACK_TOKENS


class WeightSpan(NamedTuple):
    """Response tokens [start, end) were sampled by weights `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class LengthLimits:
    """What a server accepts: token ids [0, vocab_size), prompts of up to `prompt_tokens`, and up to `total_tokens` of a
    prompt and its response."""

    vocab_size: int
    prompt_tokens: int
    total_tokens: int

    def intersect(self, other: LengthLimits) -> LengthLimits:
        """Return what two servers of the same vocabulary both accept."""
        prompt, total = min(self.prompt_tokens, other.prompt_tokens), min(self.total_tokens, other.total_tokens)
        return LengthLimits(self.vocab_size, prompt, total)

    def validate(self, body: Mapping[str, Any]) -> None:
        """Raise UserError for a body of POST /generate that would kill the server or be cut by it."""
        ids, name = body["input_ids"], f"request {body.get('rid', '')}"
        sampling = body["sampling_params"]
        new = sampling["max_new_tokens"]
        if not ids:
            raise UserError(f"{name} has no prompt tokens")
        for what, values in (("prompt", ids), ("stop_token_ids", sampling.get("stop_token_ids", ()))):
            wrong = next((v for v in values if type(v) is not int or not 0 <= v < self.vocab_size), None)
            if wrong is not None:
                raise UserError(
                    f"{name}: {wrong!r} in its {what} is no token id of the served model, whose vocabulary has "
                    f"{self.vocab_size} tokens"
                )
        top = body.get("top_logprobs_num", 0)
        if not 0 <= top <= self.vocab_size:
            raise UserError(f"{name} wants the log-probs of {top} tokens; the vocabulary has {self.vocab_size}")
        if new < 0 or not 0 <= sampling["temperature"] < math.inf or not 0 < sampling["top_p"] <= 1:
            raise UserError(
                f"{name}: max_new_tokens {new}, temperature {sampling['temperature']}, top_p {sampling['top_p']} are "
                "no sampling parameters (at least 0, at least 0, in (0, 1])"
            )
        if len(ids) > self.prompt_tokens or len(ids) + new > self.total_tokens:
            raise UserError(
                f"{name}: {len(ids)} prompt tokens and up to {new} new ones do not fit into the server's context "
                f"({self.prompt_tokens} prompt tokens, {self.total_tokens} in all); lower the lengths or start the "
                "servers with a greater --context-length"
            )


@dataclass(frozen=True)
class GenerationOutput:
    """A finished response. logprobs: nats, one per token, at the sampling temperature and before top_p (of greedy
    responses: at temperature 1); at temperature 1 and top_p 1 they are the policy's own."""

    id: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" | "length"
    weight_spans: tuple[WeightSpan, ...]
    server: str

    def to_sample(self, prompt: Prompt, index: int = 0) -> Sample:
        """Raise UserError if the version of the weights is none of the trainer's."""
        try:
            spans = [(int(version), start, end) for version, start, end in self.weight_spans]
        except ValueError:
            versions = ", ".join(sorted({span.version for span in self.weight_spans}))
            raise UserError(f"{self.server} answered with weights '{versions}', which no trainer sent") from None
        oldest = min(version for version, _, _ in spans)
        response = self.token_ids, self.finish_reason, self.logprobs
        return Sample(prompt, *response, oldest, index=index, weight_versions=spans)


class RequestAborted(Busy):
    """The server aborted the request before its response was finished."""


@contextmanager
def checking_answer(rid: str, server: str) -> Iterator[None]:
    """Turn errors of reading an answer, such as a missing field, into a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{server} answered request {rid} without {error}: is it SGLang's /generate?") from None


def checked_meta_info(rid: str, answer: Mapping[str, Any], server: str) -> dict[str, Any]:
    """Return `meta_info` of the answer. Call it in `checking_answer`. Raises RequestAborted and UserError."""
    meta: dict[str, Any] = answer["meta_info"]
    if meta["id"] != rid:
        raise UserError(f"{server} answered request {rid} with the answer to {meta['id']}")
    if meta["finish_reason"]["type"] == "abort":
        raise RequestAborted(str(meta["finish_reason"].get("message", "")))
    return meta


@dataclass(frozen=True)
class GenerateRequest:
    """A request for one response, as a `PoolCall`. id: the caller's, unique among the calls of one `ServerPool.run`.

    allowed_versions: returns the weight versions that may answer, evaluated when the answer arrives; None: any.
    """

    id: str
    token_ids: Sequence[int]
    sampling: SamplingParams
    allowed_versions: Callable[[], Collection[str] | None] = lambda: None

    def body(self, attempt: int = 0) -> dict[str, Any]:
        """Return the body of POST /generate. Each attempt has its own id on the servers, so that the answer to an
        abandoned attempt is never taken for the answer to the next."""
        sampling = self.sampling
        return {
            "rid": f"{self.id}.{attempt}",
            "input_ids": list(self.token_ids),
            "return_logprob": True,
            "sampling_params": {
                "max_new_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "stop_token_ids": list(sampling.stop_token_ids),
                "ignore_eos": not sampling.stop_token_ids,  # otherwise the model's own end tokens stop it as well
            },
        }

    def validate(self, limits: LengthLimits) -> None:
        limits.validate(self.body())

    async def attempt(self, client: SGLangClient, number: int) -> GenerationOutput:
        """Raise StaleServer for a server that has older weights, e.g. because it was restarted unnoticed."""
        body = self.body(number)
        output = self.parse(body["rid"], await client.generate(body), client.url)
        allowed = self.allowed_versions()
        old = [span.version for span in output.weight_spans if allowed is not None and span.version not in allowed]
        if old:
            raise StaleServer(f"it has weights of version '{old[0]}'")
        return output

    def parse(self, rid: str, answer: Mapping[str, Any], server: str) -> GenerationOutput:
        """Return the answer of /generate, checked.

        Raises RequestAborted, and UserError for an answer to another request or one that no healthy model gives.
        """
        with checking_answer(rid, server):
            meta = checked_meta_info(rid, answer, server)
            reason = meta["finish_reason"]
            kind = reason["type"]
            ids = answer["output_ids"]
            logprobs, named = zip(*((lp, token) for lp, token, _ in meta["output_token_logprobs"]), strict=True)
            spans = tuple(WeightSpan(span["version"], span["start"], span["end"]) for span in meta["weight_versions"])
        limit, stop_ids = self.sampling.max_new_tokens, self.sampling.stop_token_ids
        if list(named) != ids or not 0 < len(ids) <= limit:
            raise UserError(
                f"{server} answered request {rid} with {len(ids)} tokens and log-probs of {len(named)} others"
            )
        if not all(isinstance(lp, float | int) and -math.inf < lp <= 1e-3 for lp in logprobs):
            raise UserError(f"{server} answered request {rid} with log-probs that are none: its weights may hold NaN")
        if kind == "stop" and reason.get("matched") not in stop_ids:
            raise UserError(
                f"{server} ended request {rid} at {reason.get('matched')!r}, which is none of its end tokens "
                f"{list(stop_ids)}: add it to rollout.stop_token_ids, or, where it says NaN, look at the weights"
            )
        if kind not in ("stop", "length") or (kind == "length" and len(ids) < limit):
            raise UserError(f"{server} cut request {rid} after {len(ids)} tokens ('{kind}'): its context is too short")
        if [span.start for span in spans] != [0, *(span.end for span in spans[:-1])] or spans[-1].end != len(ids):
            raise UserError(
                f"{server} answered request {rid} with weight versions that do not cover its tokens: {spans}"
            )
        return GenerationOutput(self.id, list(ids), list(logprobs), kind, spans, server)


class BackgroundGeneration:
    """One response to each prompt, generated by a pool in the background; `Sample.index` is the prompt's index.

    Servers sample with their own random numbers: unlike `rollout.local`'s, the samples do not depend on the recipe's
    seed.
    """

    def __init__(
        self,
        loop: EventLoopThread,
        pool: ServerPool[SGLangClient, LengthLimits],
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        allowed_versions: Callable[[], Collection[str] | None] = lambda: None,
    ) -> None:
        self.prompts = prompts
        self._outputs: queue.SimpleQueue[GenerationOutput | None] = queue.SimpleQueue()
        self._exhausted = False
        requests = [
            GenerateRequest(f"{i}-{prompt.id}", prompt.token_ids, sampling, allowed_versions)
            for i, prompt in enumerate(prompts)
        ]
        self._indices = {request.id: i for i, request in enumerate(requests)}
        self._work = loop.submit(self._generate(pool, requests))

    async def _generate(
        self, pool: ServerPool[SGLangClient, LengthLimits], requests: Sequence[GenerateRequest]
    ) -> None:
        try:
            async for output in pool.run(requests):
                self._outputs.put(output)
        finally:
            self._outputs.put(None)

    def next_sample(self, seconds: float | None = None) -> Sample | None:
        """Return the next finished response; None after the last one.

        Raises queue.Empty after `seconds` without one, and UserError as `ServerPool.run` does.
        """
        output = None if self._exhausted else self._outputs.get(timeout=seconds)
        if output is None:
            self._exhausted = True
            self._work.result()
            return None
        index = self._indices[output.id]
        return output.to_sample(self.prompts[index], index)

    @property
    def finished(self) -> bool:
        """Whether all responses are generated, or no more will be."""
        return self._work.done()
