"""Verify that a URL is the expected server: version of SGLang, model, shape, vocabulary and context length."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.errors import UserError
from eaopd_megatron.rollout.sglang.requests import RESERVED_TOKENS, LengthLimits
from eaopd_megatron.serving.http import Busy, ServerGone, SGLangClient

SGLANG_VERSIONS = ("0.5.21", "0.5.22", "0.5.23")
"""The releases whose HTTP interface this package uses."""
PAUSE_DETECTION_SECONDS = 5.0
"""Seconds of silence after which a server that is not ready counts as paused rather than warming up: one that warms up
or was found unhealthy is not ready either, but refuses invalid requests at once."""


class ServerPaused(Busy):
    """The server accepts requests but answers none, not even invalid ones."""


@dataclass(frozen=True)
class LogprobProbe:
    """The student's log-probs (nats) of token_ids[1:], and how far a server's may lie from them on average."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]
    tolerance: float = 0.2
    versions: Collection[str] | None = None  # weights that the log-probs are of; None: any


@dataclass(frozen=True)
class ExpectedModel:
    """The model that a server must serve.

    total_tokens: maximum of a prompt and its response. config: the model's config.json. role: its name in messages.
    scores_only: all of total_tokens are prompt; nothing is generated.
    """

    architecture: str  # such as Qwen3ForCausalLM
    vocab_size: int
    total_tokens: int
    probe: LogprobProbe | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    role: str = "student"
    scores_only: bool = False

    @classmethod
    def of(cls, folder: HfFolder, total_tokens: int, *, role: str = "student", scores_only: bool = False) -> Self:
        """Return what a server of the model in `folder` must be."""
        architecture, config = folder.family.architecture, folder.config.to_dict()
        return cls(architecture, folder.vocab_size, total_tokens, None, config, role, scores_only)


_SHAPE_KEYS = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
)
"""Keys of config.json that must be equal for the weights of one model to fit the other."""


async def verify_server(client: SGLangClient, expected: ExpectedModel) -> LengthLimits:
    """Return the server's limits, once it is known to be the expected one.

    Raises UserError with the first difference, ServerPaused, Busy and ServerGone. Harmless to a server of any model: no
    token id is sent that may be outside its vocabulary.
    """
    settings = await client.server_info()
    version = settings.get("version")
    if version is None:
        raise UserError(f"{client.url} answers, but is no SGLang server")
    if version not in SGLANG_VERSIONS:
        raise UserError(
            f"{client.url} runs SGLang {version}; this speaks to {', '.join(SGLANG_VERSIONS)}: start one of those"
        )
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
        gap, answered_with = await _gap(client, probe, limits)
        updated = probe.versions is not None and answered_with not in probe.versions  # since `model` was read
        if not gap <= probe.tolerance and not updated:
            raise UserError(
                f"{serves}, whose log-probs of a probe lie {gap:.3g} nats from the student's on average (at most "
                f"{probe.tolerance:g}): it holds other weights"
            )
    return limits


def _check_shape(serves: str, folder: str, expected: ExpectedModel) -> None:
    """Raise UserError for another shape, if the folder of the server's model can be read here."""
    actual: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        actual = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    config = expected.config
    for key in _SHAPE_KEYS:
        if key in actual and key in config and actual[key] != config[key]:
            raise UserError(f"{serves}, whose {key} is {actual[key]}; the {expected.role}'s is {config[key]}")


async def _vocab_size(client: SGLangClient) -> int:
    """Return the vocabulary size, which the server names only when it refuses an id in `token_ids_logprob`, here -1."""
    body = {
        "input_ids": [0],
        "sampling_params": {"max_new_tokens": 1},
        "return_logprob": True,
        "token_ids_logprob": [-1],
    }
    # nothing is generated, so this takes no longer than a control request
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
        if match := re.search(r"valid range is \[0, (\d+)\)", str(refusal)):
            return int(match[1])
        raise
    raise UserError(f"{client.url} takes -1 for a token id: it is not SGLang {SGLANG_VERSIONS[-1]}")


async def _gap(client: SGLangClient, probe: LogprobProbe, limits: LengthLimits) -> tuple[float, str]:
    """Return the mean absolute difference (nats) from the probe's log-probs, and the weights' version."""
    body = {
        "input_ids": list(probe.token_ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "top_p": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    limits.validate(body)
    answer = await client.generate(body)
    logprobs = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    gap = sum(abs(a - b) for a, b in zip(logprobs, probe.logprobs, strict=True)) / len(logprobs)
    return gap, str(answer["meta_info"]["weight_version"])


ROUTER_READY_PATH = "/readiness"
"""`SGLangClient.ready_path` of a router."""


async def verify_workers(
    router: SGLangClient,
    admit: Callable[[SGLangClient], Awaitable[LengthLimits]],
    worker: Callable[[str], SGLangClient],
    keep: Collection[SGLangClient] = (),
) -> LengthLimits:
    """Admit every reachable server behind a router; return what all of them accept.

    worker: returns the client of a server's URL; closed after use unless it is in `keep`: closing it would break off
    its other requests. Raises ServerGone if none is reachable, and UserError.
    """
    clients = [worker(url) for url in await worker_urls(router)]
    try:
        results = await asyncio.gather(*(admit(client) for client in clients), return_exceptions=True)
    finally:
        for client in clients:
            if client not in keep:
                await client.close()
    limits: LengthLimits | None = None
    for result in results:
        if isinstance(result, LengthLimits):
            limits = result if limits is None else limits.intersect(result)
        elif not isinstance(result, ServerGone | Busy):
            raise result
    if limits is None:
        raise ServerGone(f"none of the router's {len(clients)} servers is there")
    return limits


async def worker_urls(router: SGLangClient) -> list[str]:
    """Return the URLs of the servers behind a router. Raises UserError if it is no router."""
    answer = await router.request("GET", "/workers")
    if not isinstance(answer, dict) or "workers" not in answer:
        raise UserError(f"{router.url} is no sglang-router: it lists no workers")
    return [str(worker["url"]) for worker in answer["workers"]]
