"""Is this the server that we mean? A URL may answer and be another model, another version, or another context."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang.wire import RESERVED_TOKENS, LengthLimits
from eaopd_megatron.serving.client import Busy, ServerGone, SGLangClient

SGLANG_VERSION = "0.5.21"
"""The release whose interface this package speaks."""
PAUSE_DETECTION_SECONDS = 5.0
"""A server that calls itself not ready and says nothing for so long is paused; one that warms up, or was once found
unhealthy, is not ready either, but refuses at once what it has to."""


class ServerPaused(Busy):
    """The server takes requests and answers none, be it one that it has to refuse."""


@dataclass(frozen=True)
class LogprobProbe:
    """Log-probs (nats) that the student gives to token_ids[1:], and how far a server's may lie from them on average."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    tolerance: float = 0.2
    versions: Collection[str] | None = None  # of the weights that it holds for; none: of any


@dataclass(frozen=True)
class ExpectedModel:
    """The model that a server must hold. total_tokens: prompt and response together, at the most. config: its
    config.json. role: what messages call it. prefill: the server is given all of total_tokens, and writes nothing."""

    architecture: str  # such as Qwen3ForCausalLM
    vocab_size: int
    total_tokens: int
    probe: LogprobProbe | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    role: str = "student"
    scores_only: bool = False


_SHAPE_KEYS = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
)
"""Keys of a configuration that must be alike, or weights of one model cannot be given to the other."""


async def verify_server(client: SGLangClient, expected: ExpectedModel) -> LengthLimits:
    """What the server can take, once it is known to be the expected one.

    Raises UserError with the first difference, Paused, Busy and ServerGone. Harmless to a server of any model: nothing
    is sent that it might not have in its vocabulary before its vocabulary is known.
    """
    settings = await client.server_info()
    version = settings.get("version")
    if version is None:
        raise UserError(f"{client.url} answers, but is no SGLang server")
    if version != SGLANG_VERSION:
        raise UserError(f"{client.url} runs SGLang {version}; this speaks to {SGLANG_VERSION}: start that one")
    model = await client.model_info()
    architectures = model.get("architectures") or []
    serves = f"{client.url} serves {model.get('model_path')}"
    if expected.architecture not in architectures:
        raise UserError(f"{serves}, a {'/'.join(architectures)}; the {expected.role} is a {expected.architecture}")
    _check_shape(serves, str(model.get("model_path")), expected)
    vocab_size = await _vocab_size(client)
    if vocab_size != expected.vocab_size:
        raise UserError(
            f"{serves} with {vocab_size} tokens; the {expected.role}'s vocabulary has {expected.vocab_size}"
        )
    limits = LengthLimits(
        vocab_size,
        int(settings["max_req_input_len"]) - 1,
        min(int(settings["context_length"]), int(settings["max_total_num_tokens"])) - RESERVED_TOKENS,
    )
    taken = limits.prompt_tokens if expected.scores_only else limits.total_tokens
    if taken < expected.total_tokens:
        raise UserError(
            f"{client.url} takes {taken} tokens a request (context length "
            f"{settings['context_length']}, cache of {settings['max_total_num_tokens']} tokens); "
            f"the recipe's prompts and responses need {expected.total_tokens}"
        )
    probe = expected.probe
    if probe is not None and (probe.versions is None or str(model.get("weight_version")) in probe.versions):
        gap = await _gap(client, probe, limits)
        if not gap <= probe.tolerance:
            raise UserError(
                f"{serves}, whose log-probs of a probe lie {gap:.3g} nats from the student's on average (at most "
                f"{probe.tolerance:g}): it holds other weights"
            )
    return limits


def _check_shape(serves: str, folder: str, expected: ExpectedModel) -> None:
    """Raises UserError for another shape, where the server's model lies in a folder that can be read here."""
    found: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        found = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    config = expected.config
    for key in _SHAPE_KEYS:
        if key in found and key in config and found[key] != config[key]:
            raise UserError(f"{serves}, whose {key} is {found[key]}; the {expected.role}'s is {config[key]}")


async def _vocab_size(client: SGLangClient) -> int:
    """The server names its vocabulary only in the refusal of a token id, here -1, whose log-prob is asked for."""
    body = {
        "input_ids": [0],
        "sampling_params": {"max_new_tokens": 1},
        "return_logprob": True,
        "token_ids_logprob": [-1],
    }
    # nothing is generated, so this is not waited for as long as a response is
    seconds = client.timeouts.control
    if not await client.ready():
        seconds = min(seconds, PAUSE_DETECTION_SECONDS)
    try:
        await client.request("POST", "/generate", body, seconds=seconds)
    except ServerGone:
        if await client.ready():
            raise
        raise ServerPaused(f"{client.url} is paused") from None
    except UserError as refusal:
        if found := re.search(r"valid range is \[0, (\d+)\)", str(refusal)):
            return int(found[1])
        raise
    raise UserError(f"{client.url} takes -1 for a token id: it is not SGLang {SGLANG_VERSION}")


async def _gap(client: SGLangClient, probe: LogprobProbe, limits: LengthLimits) -> float:
    """Mean absolute difference of the log-probs of the probe's tokens, nats."""
    body = {
        "input_ids": list(probe.token_ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    limits.validate(body)
    answer = await client.generate(body)
    found = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    return sum(abs(a - b) for a, b in zip(found, probe.logprobs, strict=True)) / len(found)


ROUTER_READY_PATH = "/readiness"
"""The `ready_path` of a router's client."""


async def verify_workers(
    router: SGLangClient,
    admit: Callable[[SGLangClient], Awaitable[LengthLimits]],
    worker: Callable[[str], SGLangClient],
) -> LengthLimits:
    """What `pool.Pool` asks of a router: each of its servers that is there is admitted; what all of them can take.

    worker: a client for a server's URL, closed after use. Raises ServerGone where none is there, and UserError.
    """
    clients = [worker(url) for url in await worker_urls(router)]
    try:
        found = await asyncio.gather(*(admit(client) for client in clients), return_exceptions=True)
    finally:
        for client in clients:
            await client.close()
    limits: LengthLimits | None = None
    for one in found:
        if isinstance(one, LengthLimits):
            limits = one if limits is None else limits.intersect(one)
        elif not isinstance(one, ServerGone | Busy):
            raise one
    if limits is None:
        raise ServerGone(f"none of the router's {len(clients)} servers is there")
    return limits


async def worker_urls(router: SGLangClient) -> list[str]:
    """The URLs of the servers behind a router. Raises UserError where it is none."""
    found = await router.request("GET", "/workers")
    if not isinstance(found, dict) or "workers" not in found:
        raise UserError(f"{router.url} is no sglang-router: it lists no workers")
    return [str(worker["url"]) for worker in found["workers"]]
