"""Generate the missing responses of an evaluation, by Megatron ranks of this host or by SGLang servers.

Servers, started here or given by URL, sample with their own random numbers: an evaluation that is resumed keeps every
finished response and samples the others anew.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.config.parallel import ParallelLayout
from eaopd_megatron.config.schema import ServersConfig
from eaopd_megatron.data.types import SamplingParams
from eaopd_megatron.errors import UserError
from eaopd_megatron.evaluation.folder import EvaluationFolder, ResponseFile, SampleIndex, read_prompts
from eaopd_megatron.evaluation.grading import DecodedResponse
from eaopd_megatron.rollout.sglang.identity import ExpectedModel, verify_server
from eaopd_megatron.rollout.sglang.requests import GenerateRequest, LengthLimits
from eaopd_megatron.rollout.sglang.server import SGLangServer, sglang_servers
from eaopd_megatron.rollout.sglang.server_manager import rollout_server_settings
from eaopd_megatron.serving.http import EventLoopThread, SGLangClient, read_api_key
from eaopd_megatron.serving.pool import ServerPool
from eaopd_megatron.serving.supervisor import RestartPolicy, Supervisor

_REPORT_EVERY = 100  # responses
_SLOWEST_BATCH_MINUTES = 24 * 60.0


def generate_on_ranks(
    folder: EvaluationFolder, model: Path, missing: dict[str, list[SampleIndex]], tensor_parallel: int, batch_size: int
) -> int:
    """Generate the missing responses of each benchmark, on all GPUs of this host; return the ranks' exit code."""
    from eaopd_megatron.launch.local_ranks import launch_ranks, replicas_that_fit

    replicas = min(replicas_that_fit(tensor_parallel), -(-sum(map(len, missing.values())) // batch_size))
    path = folder.path / "work.json"
    work = {"model": str(model), "tensor_parallel": tensor_parallel, "batch_size": batch_size, "missing": missing}
    path.write_text(json.dumps({**work, "folder": str(folder.path)}))
    try:
        return launch_ranks(["evaluate", str(path)], tensor_parallel * replicas)
    finally:
        path.unlink()


def generate_on_rank(work: dict[str, Any]) -> None:
    """Run one rank of `generate_on_ranks`. work: what that wrote to work.json."""
    import torch

    from eaopd_megatron.checkpoint.hf_import import load_hf
    from eaopd_megatron.distributed import parallel_state as groups
    from eaopd_megatron.megatron.model import build_model
    from eaopd_megatron.models.supported import check_supported
    from eaopd_megatron.rollout.local import LocalRollout

    tensor_parallel, batch_size = work["tensor_parallel"], work["batch_size"]
    layout = ParallelLayout(tensor_parallel, sequence_parallel=tensor_parallel > 1)  # MoE models require it
    # replicas wait for the slowest batch of all; the launcher notices a dead rank
    parallel, _ = groups.init_distributed(layout, timeout_minutes=_SLOWEST_BATCH_MINUTES)
    source = HfFolder.open(work["model"], "MODEL")
    check_supported(source.config, layout, f"MODEL: {work['model']}")
    model = build_model(source.config, layout, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    load_hf(model, source, parallel)
    rollout = LocalRollout(model, parallel, vocab_size=source.vocab_size, batch_size=batch_size)
    folder, tokenizer = EvaluationFolder(Path(work["folder"])), source.tokenizer()
    settings = folder.settings()
    sampling = SamplingParams.from_json(settings["sampling"])
    for name, places in work["missing"].items():
        prompts, store = read_prompts(folder.prompts(name)), folder.response_file(name)
        missing = set(map(tuple, places))
        every = [(problem, sample) for problem in range(len(prompts)) for sample in range(settings["samples"])]
        batches = [every[start : start + batch_size] for start in range(0, len(every), batch_size)]
        batches = [batch for batch in batches if not missing.isdisjoint(batch)]
        for first in range(0, len(batches), parallel.dp_size):
            finished: list[DecodedResponse] = []
            for batch in batches[first : first + parallel.dp_size][parallel.dp_rank :][:1]:
                keys = [(settings["seed"], "evaluation", name, *place) for place in batch]
                samples = rollout.generate([prompts[problem] for problem, _ in batch], keys, sampling, 0)
                finished = [
                    decode_response(tokenizer, source.vocab_size, place, one.response_ids, one.finish_reason)
                    for place, one in zip(batch, samples, strict=True)
                    if place in missing
                ]
            gathered = groups.gather_objects(finished, parallel.dp_size, parallel.dp_group)
            if parallel.is_main:
                store.append(one for part in gathered for one in part)
                problem, sample = batches[min(first + parallel.dp_size, len(batches)) - 1][-1]
                reached = problem * settings["samples"] + sample + 1
                print(f"{name}: {reached} of {len(every)} responses", flush=True)
    groups.shutdown_distributed()


def decode_response(
    tokenizer: Any, vocab_size: int, place: SampleIndex, token_ids: Sequence[int], finish_reason: str
) -> DecodedResponse:
    """Return a response as text. As in training, a token id outside the vocabulary ends it, as cut off."""
    end = next((i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size), len(token_ids))
    text = str(tokenizer.decode(list(token_ids[:end]), skip_special_tokens=True))
    return DecodedResponse(*place, text, end, finish_reason if end == len(token_ids) else "length")


def check_length(positions: int, response: int, setting: str = "--max-response-tokens ") -> int:
    """Return the maximum number of prompt tokens that leaves room for the response.

    Raises UserError, naming the setting, if there is none.
    """
    if positions <= response:
        raise UserError(
            f"{setting}{response}: the model has {positions} positions for prompt and response together; lower it"
        )
    return positions - response


def generate_on_servers(
    folder: EvaluationFolder,
    model: HfFolder,
    missing: dict[str, list[SampleIndex]],
    config: ServersConfig,
    report: Callable[[str], None],
) -> None:
    """Generate the missing responses of each benchmark. Raises UserError."""
    settings = folder.settings()
    sampling = SamplingParams.from_json(settings["sampling"])
    prompts = {name: read_prompts(folder.prompts(name)) for name in missing}
    longest = max(len(prompt.token_ids) for group in prompts.values() for prompt in group) + sampling.max_new_tokens
    tokenizer = model.tokenizer()
    with _pool(config, model, longest, folder.path / "servers", report) as (loop, pool):
        for name, places in missing.items():
            calls = [
                GenerateRequest(f"{problem}-{sample}", prompts[name][problem].token_ids, sampling)
                for problem, sample in places
            ]
            decode = partial(decode_response, tokenizer, model.vocab_size)
            loop.run(_write(pool.run(calls), folder.response_file(name), len(places), decode, report))


async def _write(
    answers: AsyncGenerator[Any],
    store: ResponseFile,
    count: int,
    decode: Callable[[SampleIndex, Sequence[int], str], DecodedResponse],
    report: Callable[[str], None],
) -> None:
    finished = 0
    async for answer in answers:
        problem, sample = map(int, answer.id.split("-"))
        store.append([decode((problem, sample), answer.token_ids, answer.finish_reason)])
        finished += 1
        if finished % _REPORT_EVERY == 0 or finished == count:
            report(f"{store.path.stem}: {finished} of {count} responses")


@contextlib.contextmanager
def _pool(
    config: ServersConfig, model: HfFolder, longest: int, logs: Path, report: Callable[[str], None]
) -> Iterator[tuple[EventLoopThread, ServerPool[SGLangClient, LengthLimits]]]:
    """Start or find the servers; return their pool and the event loop that it runs in."""
    with contextlib.ExitStack() as stack:
        key = None if config.api_key_file is None else read_api_key(Path(config.api_key_file))
        servers: list[SGLangServer] = []
        urls = config.urls
        if not urls:
            key, precision = secrets.token_urlsafe(24), "bf16" if model.dtype.itemsize == 2 else "fp32"
            settings = rollout_server_settings(config, model, precision, longest, key)
            servers = sglang_servers(settings, config.count, logs)
            stack.enter_context(Supervisor(servers, policy=RestartPolicy(4), report=report))
            urls = [server.url for server in servers]
        loop = stack.enter_context(EventLoopThread())
        clients = [SGLangClient(url, api_key=key, connections=config.max_concurrent_requests) for url in urls]
        pool = ServerPool(clients, partial(verify_server, expected=ExpectedModel.of(model, longest)), report=report)
        stack.callback(lambda: loop.run(pool.close()))
        loop.run(pool.open())
        for server, client in zip(servers, clients, strict=False):
            server.on_exit = partial(loop.call_soon, pool.mark_lost, client)
            stack.callback(setattr, server, "on_exit", None)
        yield loop, pool
