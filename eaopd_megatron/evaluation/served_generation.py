"""Responses by SGLang servers: started here and ended, or named by their URLs.

The servers draw the tokens from random numbers of their own: an evaluation that was killed keeps every finished
response and draws the others anew.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eaopd_megatron.checkpoint.hf_folder import HfFolder
from eaopd_megatron.data.samples import Sampling
from eaopd_megatron.evaluation.folder import EvaluationFolder
from eaopd_megatron.evaluation.generations import Generation, Place, read_prompts
from eaopd_megatron.rollout.sglang import writing
from eaopd_megatron.rollout.sglang.identity import Expected, identify
from eaopd_megatron.rollout.sglang.keeper import DEATHS, SLACK_TOKENS
from eaopd_megatron.rollout.sglang.server import Servers, ServerSettings
from eaopd_megatron.rollout.sglang.wire import RESERVED_TOKENS, Limits, Request
from eaopd_megatron.services.client import Client, read_api_key
from eaopd_megatron.services.loop import Loop
from eaopd_megatron.services.pool import Pool

REPORT_EVERY = 100  # responses


@dataclass(frozen=True)
class ServerChoice:
    """urls: of servers that run already; else `count` are started, each on `tensor_parallel` GPUs of this host."""

    urls: Sequence[str] = ()
    count: int = 1
    tensor_parallel: int = 1
    max_running: int = 64  # responses that a server writes at the same time
    memory_fraction: float = 0.8  # of a GPU's memory
    api_key_file: Path | None = None  # of servers that run already


def generate(
    folder: EvaluationFolder,
    model: HfFolder,
    missing: dict[str, list[Place]],
    choice: ServerChoice,
    report: Callable[[str], None],
) -> None:
    """Generates what is missing of each benchmark. Raises UserError."""
    settings = folder.settings()
    sampling = Sampling(**{**settings["sampling"], "stop_ids": tuple(settings["sampling"]["stop_ids"])})
    prompts = {name: read_prompts(folder.prompts(name)) for name in missing}
    longest = max(len(prompt.token_ids) for some in prompts.values() for prompt in some) + sampling.max_new_tokens
    config = model.config.to_dict()
    expected = Expected(model.family.architecture, model.vocab_size, longest, config=config)
    tokenizer = model.tokenizer()
    with _pool(choice, model, longest, folder.path / "servers", expected, report) as (loop, pool):
        for name, places in missing.items():
            calls = [
                writing.Generation(Request(f"{problem}-{sample}", prompts[name][problem].token_ids, sampling))
                for problem, sample in places
            ]
            loop.run(_write(pool.run(calls), folder, name, len(places), tokenizer, report))


async def _write(
    answers: AsyncGenerator[Any],
    folder: EvaluationFolder,
    name: str,
    count: int,
    tokenizer: Any,
    report: Callable[[str], None],
) -> None:
    store, finished = folder.generations(name), 0
    async for answer in answers:
        problem, sample = map(int, answer.id.split("-"))
        text = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        store.append([Generation(problem, sample, text, len(answer.token_ids), answer.finish_reason)])
        finished += 1
        if finished % REPORT_EVERY == 0 or finished == count:
            report(f"{name}: {finished} of {count} responses")


@contextlib.contextmanager
def _pool(
    choice: ServerChoice,
    model: HfFolder,
    longest: int,
    logs: Path,
    expected: Expected,
    report: Callable[[str], None],
) -> Iterator[tuple[Loop, Pool[Client, Limits]]]:
    """The servers as one, and the loop in which it lives."""
    with contextlib.ExitStack() as stack:
        key = None if choice.api_key_file is None else read_api_key(choice.api_key_file)
        servers: Servers | None = None
        # the kernel ends the servers with the thread that started them: one thread starts them all, and lives on
        starter = stack.enter_context(ThreadPoolExecutor(1))
        urls = choice.urls
        if not urls:
            key = secrets.token_urlsafe(24)
            settings = ServerSettings(
                model.path,
                longest + RESERVED_TOKENS + SLACK_TOKENS,
                tensor_parallel=choice.tensor_parallel,
                precision="bf16" if model.dtype.itemsize == 2 else "fp32",
                memory_fraction=choice.memory_fraction,
                max_running=choice.max_running,
                api_key=key,
            )
            servers = Servers(settings, choice.count, logs)
            starter.submit(servers.__enter__).result()
            stack.callback(servers.__exit__)
            urls = [server.url for server in servers.all]
        loop = stack.enter_context(Loop())
        clients = [Client(url, api_key=key, connections=choice.max_running) for url in urls]
        pool = Pool(clients, partial(identify, expected=expected), report=report)
        loop.run(pool.open())
        stack.callback(lambda: loop.run(pool.close()))
        for server, client in zip(servers.all if servers else (), clients, strict=False):
            server.on_exit = _restart(server.start, starter, partial(loop.call, pool.lost, client), report)
            stack.callback(setattr, server, "on_exit", None)
        yield loop, pool


def _restart(
    start: Callable[[], None], starter: ThreadPoolExecutor, lost: Callable[[str], None], report: Callable[[str], None]
) -> Callable[[str], None]:
    """What is called when a server has died: it is started again, unless it dies again and again."""
    deaths = 0

    def died(why: str) -> None:
        nonlocal deaths
        deaths += 1
        lost(why)
        if deaths < DEATHS:
            starter.submit(start)
        else:
            report(f"a server died {DEATHS} times and is not started again: it {why}")

    return died
