"""What goes to a server and what comes back: token ids in and out, never text.

Every body is checked here before it is sent, because SGLang does not: an id outside of the vocabulary, or more top
log-probs than it has tokens, ends the whole server, and a length over the limit is cut without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from eaopd_megatron.data.types import Prompt, Sample, SamplingParams
from eaopd_megatron.errors import UserError
from eaopd_megatron.serving.client import Busy

RESERVED_TOKENS = 2
"""Positions of the context length that a server keeps: it cuts responses at context_length - 2."""
SLACK_TOKENS = 6
"""By how much more than RESERVED_TOKENS a server wants a prompt to be shorter than its context."""


class WeightSpan(NamedTuple):
    """Response tokens [start, end) were sampled by weights `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class GenerateRequest:
    """One response that is wanted. `id` is the caller's, and unique among the requests of a call."""

    id: str
    token_ids: Sequence[int]
    sampling: SamplingParams

    def body(self, attempt: int = 0) -> dict[str, Any]:
        """The body of POST /generate. Each attempt has an id of its own on the servers, so that the answer to one that
        was given up can never be taken for the answer to the next."""
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
                "ignore_eos": not sampling.stop_token_ids,  # otherwise it stops at the model's own end tokens as well
            },
        }


@dataclass(frozen=True)
class LengthLimits:
    """What a server can take: token ids [0, vocab_size), `prompt_tokens` in, `total_tokens` in and out together."""

    vocab_size: int
    prompt_tokens: int
    total_tokens: int

    def intersect(self, other: LengthLimits) -> LengthLimits:
        """What two servers of the same vocabulary can both take."""
        return LengthLimits(
            self.vocab_size,
            min(self.prompt_tokens, other.prompt_tokens),
            min(self.total_tokens, other.total_tokens),
        )

    def validate(self, body: Mapping[str, Any]) -> None:
        """Raises UserError for a body of POST /generate that would end the server or be cut by it."""
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
    """A finished response. logprobs: nats, one per token, at the sampling temperature, before top_p (of greedy
    responses: at temperature 1); at temperature 1 and top_p 1 they are the policy's own."""

    id: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str  # "stop" | "length"
    weight_spans: tuple[WeightSpan, ...]
    server: str

    def to_sample(self, prompt: Prompt, index: int = 0) -> Sample:
        """The response as the trainer takes it. Raises UserError where the weights have no version of the trainer's."""
        try:
            spans = [(int(version), start, end) for version, start, end in self.weight_spans]
        except ValueError:
            named = ", ".join(sorted({span.version for span in self.weight_spans}))
            raise UserError(f"{self.server} answered with weights '{named}', which no trainer sent") from None
        return Sample(
            prompt,
            self.token_ids,
            self.finish_reason,
            self.logprobs,
            min(version for version, _, _ in spans),
            index=index,
            weight_versions=spans,
        )


class RequestAborted(Busy):
    """The server gave a request up before its response was finished."""


@contextmanager
def checking_answer(rid: str, server: str) -> Iterator[None]:
    """What an answer lacks that is read inside becomes a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{server} answered request {rid} without {error}: is it SGLang's /generate?") from None


def checked_meta_info(rid: str, answer: Mapping[str, Any], server: str) -> dict[str, Any]:
    """meta_info of the answer to this request, inside of `reading`. Raises Aborted, and UserError."""
    meta: dict[str, Any] = answer["meta_info"]
    if meta["id"] != rid:
        raise UserError(f"{server} answered request {rid} with the answer to {meta['id']}")
    if meta["finish_reason"]["type"] == "abort":
        raise RequestAborted(str(meta["finish_reason"].get("message", "")))
    return meta


def parse_output(request: GenerateRequest, rid: str, answer: Mapping[str, Any], server: str) -> GenerationOutput:
    """An answer of /generate, checked.

    Raises Aborted, and UserError for an answer that is not one to this request or that no healthy model gives.
    """
    with checking_answer(rid, server):
        meta = checked_meta_info(rid, answer, server)
        reason = meta["finish_reason"]
        kind = reason["type"]
        ids = answer["output_ids"]
        logprobs, named = zip(*((lp, token) for lp, token, _ in meta["output_token_logprobs"]), strict=True)
        spans = tuple(WeightSpan(span["version"], span["start"], span["end"]) for span in meta["weight_versions"])
    if list(named) != ids or not 0 < len(ids) <= request.sampling.max_new_tokens:
        raise UserError(f"{server} answered request {rid} with {len(ids)} tokens and log-probs of {len(named)} others")
    if not all(isinstance(lp, float | int) and -math.inf < lp <= 1e-3 for lp in logprobs):
        raise UserError(f"{server} answered request {rid} with log-probs that are none: its weights may hold NaN")
    if kind == "stop" and reason.get("matched") not in request.sampling.stop_token_ids:
        raise UserError(
            f"{server} ended request {rid} at {reason.get('matched')!r}, which is none of its end tokens "
            f"{list(request.sampling.stop_token_ids)}: add it to "
            "rollout.stop_token_ids, or, where it says NaN, look at the weights"
        )
    if kind not in ("stop", "length") or (kind == "length" and len(ids) < request.sampling.max_new_tokens):
        raise UserError(f"{server} cut request {rid} after {len(ids)} tokens ('{kind}'): its context is too short")
    if [span.start for span in spans] != [0, *(span.end for span in spans[:-1])] or spans[-1].end != len(ids):
        raise UserError(f"{server} answered request {rid} with weight versions that do not cover its tokens: {spans}")
    return GenerationOutput(request.id, list(ids), list(logprobs), kind, spans, server)
