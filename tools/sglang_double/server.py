"""A double of an SGLang server: the part of its HTTP interface that the rollout uses, fast, with injectable faults.

`tests/sglang/test_real_server.py` compares it with the real server, field by field. In a test it runs in the test's
event loop::

    async with Double() as double:
        ... SGLangClient(double.url) ...

or as a process that can be killed: `python -m tools.sglang_double.server [--port N] [--config FILE]`. It prints its URL
when it is ready, accepts faults (POST /faults, fields of `Faults`), and saves and forgets the weights it received
(POST /weights, {"path": FILE} for torch.save).

Like the real one it dies on a token id outside its vocabulary, drops the connection after an internal error, truncates
responses two positions before the end of its context, and queues requests while it is paused. It also dies when told to
resume memory that it has or to release memory while it generates, and, like a server with CUDA, when it needs or
releases memory that it has released.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import math
import os
import random
import time
import uuid
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import yaml

from tools.sglang_double.controls import Controlled
from tools.sglang_double.plain_http import Died, Refused
from tools.sglang_double.prefill import logprob_fields

SAMPLING_KEYS = (
    *("max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "json_schema", "regex"),
    *("ebnf", "structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim"),
    *("stream_interval", "logit_bias", "sampling_seed", "custom_params", "beam_width", "watermark", "choice"),
)
"""What the real server takes, in its order; the double heeds max_new_tokens, temperature, top_p, stop_token_ids and
ignore_eos."""

Policy = Callable[[Sequence[int]], list[float]]
"""Token ids so far → log-probs (nats) of the next token over the vocabulary."""


def toy_policy(vocab_size: int, spread: float = 1.0) -> Policy:
    """Return a policy with a fixed distribution for each last token."""

    @cache
    def after(token: int) -> list[float]:
        numbers = random.Random(f"{token} {vocab_size}")
        logits = [numbers.gauss(0, spread) for _ in range(vocab_size)]
        total = math.log(sum(map(math.exp, logits)))
        return [logit - total for logit in logits]

    return lambda ids: after(ids[-1])


def _error(message: str) -> Refused:
    return Refused(400, {"error": {"message": message}})


def _spans(versions: Sequence[str]) -> list[dict[str, Any]]:
    """Version spans of the tokens in the server's format."""
    spans: list[dict[str, Any]] = []
    for version, tokens in groupby(versions):
        start = spans[-1]["end"] if spans else 0
        spans.append({"version": version, "start": start, "end": start + len(list(tokens))})
    return spans


class Double(Controlled):
    """See the module. The arguments are the real server's settings and the distribution to sample from."""

    def __init__(
        self,
        *,
        vocab_size: int = 112,
        context_length: int = 128,
        max_total_num_tokens: int = 16384,
        architecture: str = "Qwen3ForCausalLM",
        version: str = "0.5.23",
        weight_version: str = "0",
        eos_id: int = 109,
        api_key: str | None = None,
        policy: Policy | None = None,
        port: int = 0,
    ) -> None:
        super().__init__(port, model_path="student", weight_version=weight_version)
        self.vocab_size, self.eos_id, self.policy = vocab_size, eos_id, policy or toy_policy(vocab_size)
        self.context_length, self.max_total_num_tokens = context_length, max_total_num_tokens
        self.architecture = architecture
        self.version, self.api_key = version, api_key
        self.finished: list[str] = []  # ids of the finished requests
        self.released = asyncio.Event()
        self.released.set()
        self._random = random.Random(0)
        self.dead = asyncio.Event()

    async def __aenter__(self) -> Double:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        await super().die()
        self.dead.set()

    def hold(self) -> None:
        """Finish no response until `released` is set."""
        self.released.clear()

    async def until_running(self, count: int) -> None:
        """Wait until `count` requests are running."""
        while len(self.running) < count:
            await asyncio.sleep(0.001)

    async def until_finished(self, count: int) -> None:
        """Wait until `count` requests are finished."""
        while len(self.finished) < count:
            await asyncio.sleep(0.001)

    async def answer(self, method: str, path: str, headers: dict[str, str], raw: bytes) -> Any:
        if self.faults.mute:
            await asyncio.Event().wait()
        if method == "GET" and path == "/ready":
            if self.paused:
                raise Refused(503, None)
            return None
        if self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
            raise Refused(401, {"error": "Unauthorized"})
        if method == "GET" and path in ("/model_info", "/server_info"):
            return self._model_info() if path == "/model_info" else self._server_info()
        handler = getattr(self, f"_post{path.replace('/', '_')}", None) if method == "POST" else None
        if handler is None:
            raise Refused(404, {"detail": "Not Found"})
        body = json.loads(raw or b"{}")
        answer = handler(body)
        return await answer if inspect.isawaitable(answer) else answer

    def _model_info(self) -> dict[str, Any]:
        return {
            "model_path": self.model_path,
            "served_model_name": self.model_path,
            "tokenizer_path": self.model_path,
            "is_generation": True,
            "weight_version": self.weight_version,
            "model_type": "qwen3",
            "architectures": [self.architecture],
        }

    def _server_info(self) -> dict[str, Any]:
        return {
            "model_path": self.model_path,
            "api_key": self.api_key,
            "context_length": self.context_length,
            "tp_size": 1,
            "dp_size": 1,
            "status": "ready",
            "max_total_num_tokens": self.max_total_num_tokens,
            "max_req_input_len": min(self.context_length, self.max_total_num_tokens) - 6,
            "internal_states": [{}],
            "version": self.version,
        }

    async def _post_generate(self, body: dict[str, Any]) -> dict[str, Any]:
        await self.going.wait()  # before the request is checked, as in the real server
        sampling = body.get("sampling_params") or {}
        ids: list[int] = body.get("input_ids", [])
        new, wanted = sampling.get("max_new_tokens", 128), body.get("token_ids_logprob") or []
        if "input_ids" not in body:
            raise _error("Either text, input_ids or input_embeds should be provided.")
        self._check(ids, sampling, new, wanted)
        rid = str(body.get("rid") or uuid.uuid4().hex)
        if self.faults.take("drop"):
            raise ConnectionResetError
        if self.faults.take("fail"):
            raise RuntimeError("on command")
        started = time.monotonic()
        self.running.add(rid)
        try:
            if (
                not all(0 <= token < self.vocab_size for token in ids)
                or body.get("top_logprobs_num", 0) > self.vocab_size
            ):
                raise Died
            self.need("weights", "kv_cache")
            new = min(new, self.context_length - 2 - len(ids))
            tokens, logprobs, reason, versions = await self._respond(rid, ids, sampling, new)
            written = [[lp, t, None] for lp, t in zip(logprobs, tokens, strict=True)]
            with_logprobs = await self._logprobs(body, ids, written) if body.get("return_logprob") else {}
            await self.released.wait()
        finally:
            self.running.discard(rid)
        if rid in self.aborting or self.faults.take("abort"):
            self.aborting.discard(rid)
            reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
        elif self.faults.take("nan"):
            reason = {"type": "stop", "matched": "NaN happened"}
        self.finished.append(rid)
        meta = {
            "id": rid,
            "finish_reason": reason,
            "prompt_tokens": len(ids),
            "weight_version": self.weight_version,
            "num_retractions": 0,
            **with_logprobs,
            "reasoning_tokens": 0,
            "completion_tokens": len(tokens),
            "cached_tokens": 0,
            "weight_versions": _spans(versions) or [{"version": self.weight_version, "start": 0, "end": 0}],
            "cached_tokens_details": None,
            "dp_rank": None,
            "e2e_latency": time.monotonic() - started,
            "response_sent_to_client_ts": time.time(),
        }
        return {"output_ids": tokens, "meta_info": meta}

    def _check(self, ids: list[int], sampling: dict[str, Any], new: int, wanted: list[int]) -> None:
        context = self.context_length
        if not ids:
            raise _error("input_ids cannot be empty.")
        if len(ids) >= context:
            raise _error(f"The input ({len(ids)} tokens) is longer than the model's context length ({context} tokens).")
        if "max_new_tokens" in sampling and len(ids) + new > context:
            raise _error(
                f"Requested token count exceeds the model's maximum context length of {context} tokens. You "
                f"requested a total of {len(ids) + new} tokens: {len(ids)} tokens from the input messages and {new} "
                "tokens for the completion. Please reduce the number of tokens in the input messages or the completion "
                "to fit within the limit."
            )
        if (unknown := next((key for key in sampling if key not in SAMPLING_KEYS), None)) is not None:
            known = ", ".join(f"`{key}`" for key in SAMPLING_KEYS)
            raise Refused(400, {"error": f"unknown field `{unknown}`, expected one of {known}"})
        if (temperature := sampling.get("temperature", 1.0)) < 0:
            raise _error(f"temperature must be a non-negative finite number, got {temperature}.")
        wrong = next((token for token in wanted if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            valid = f"valid range is [0, {self.vocab_size})."
            raise _error(f"token_ids_logprob contains out-of-vocabulary token id {wrong}; {valid}")
        longest = self._server_info()["max_req_input_len"]
        if len(ids) >= longest:
            raise _error(
                f"Input length ({len(ids)} tokens) exceeds the maximum allowed length ({longest} tokens). "
                "Use a shorter input or enable --allow-auto-truncate."
            )

    async def _next(self, ids: Sequence[int]) -> tuple[list[float], str]:
        """Log-probs of the token after `ids`, and the version of the weights."""
        return self.policy(ids), self.weight_version

    async def _respond(
        self, rid: str, ids: list[int], sampling: dict[str, Any], new: int
    ) -> tuple[list[int], list[float], dict[str, Any], list[str]]:
        """Tokens, their log-probs, the finish reason, and each token's weight version."""
        temperature = sampling.get("temperature", 1.0)
        stops = set() if sampling.get("ignore_eos") else {self.eos_id, *(sampling.get("stop_token_ids") or ())}
        tokens: list[int] = []
        logprobs: list[float] = []
        versions: list[str] = []
        while len(tokens) < new and rid not in self.aborting:
            await self.going.wait()
            policy, version = await self._next([*ids, *tokens])
            if temperature == 0:
                token = max(range(self.vocab_size), key=policy.__getitem__)
            else:
                scaled = [lp / temperature for lp in policy]
                total = math.log(sum(map(math.exp, scaled)))
                policy = [lp - total for lp in scaled]
                token = self._draw([math.exp(lp) for lp in policy], sampling.get("top_p", 1.0))
            tokens.append(token)
            logprobs.append(policy[token])
            versions.append(version)
            if token in stops:
                return tokens, logprobs, {"type": "stop", "matched": token}, versions
        return tokens, logprobs, {"type": "length", "length": len(tokens)}, versions

    def _draw(self, probabilities: list[float], top_p: float) -> int:
        """Sample from the tokens whose more probable ones sum to at most top_p."""
        tokens = sorted(range(self.vocab_size), key=probabilities.__getitem__, reverse=True)
        weights = [probabilities[token] for token in tokens]
        count = sum(before <= top_p for before in accumulate(weights[:-1], initial=0.0))
        return self._random.choices(tokens[:count], weights[:count])[0]

    async def _logprobs(self, body: dict[str, Any], ids: list[int], written: list[list[Any]]) -> dict[str, Any]:
        first = body.get("logprob_start_len", -1)
        scored = ids[first:] if first >= 0 else []
        ends = [*range(len(ids) - len(scored) + 1, len(ids)), *([] if written else [len(ids)])]
        rows = [policy for policy, _ in await asyncio.gather(*(self._next(ids[:end]) for end in ends))]
        following = None if written else rows.pop()
        return logprob_fields(body, scored, rows, written, following)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A double of an SGLang server. Unknown flags are ignored.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--config", type=Path, help="a YAML file with the api-key")
    return parser


def serve(make: Callable[..., Double], arguments: argparse.Namespace) -> None:
    """Serve until the process is killed. make: returns a double for a port and an API key."""
    key = yaml.safe_load(arguments.config.read_text())["api-key"] if arguments.config else None

    async def run() -> None:
        async with make(port=arguments.port, api_key=key) as double:
            print(double.url, f"{key=}", flush=True)  # the real server prints its key, too
            await double.dead.wait()
            os._exit(1)  # its threads may wait in a process group that never completes

    asyncio.run(run())


if __name__ == "__main__":
    serve(Double, command_line().parse_known_args()[0])
